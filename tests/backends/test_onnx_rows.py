"""Graphs that interpolate, seed and sum by themselves, against numpy; on every device's way of doing so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from explainserve.backends.onnx_rows import RowGraph
from explainserve.backends.row_feeds import RowFeeds, selector_feeds
from explainserve.plan import Differentiation, Rows, Segment, Selector
from explainserve.signature import Axis, InputSpec, ScoreHead
from onnx_graphs import model, node

Array = NDArray[Any]

FUNCTION = Differentiation("y", ScoreHead.IDENTITY, ("x",))
FLOATS = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}

both_ways = pytest.mark.parametrize("multiplies", [True, False], ids=["products", "selections"])
every_float = pytest.mark.parametrize("dtype", FLOATS)


def input_spec(name: str, shape: Sequence[int], dtype: str = "float32") -> InputSpec:
    return InputSpec(name, np.dtype(dtype), (Axis("batch"), *(Axis("", size) for size in shape)))


def segment(
    start: Array, end: Array, alphas: Sequence[float], weights: Sequence[float] = (), fixed: Mapping[str, Array] = {}
) -> Segment:
    shares = np.array(weights or [1.0] * len(alphas))
    return Segment({"x": start}, {"x": end}, fixed, FUNCTION, np.array(alphas), shares)


def run(graph: RowGraph, feeds: Mapping[str, Array], outputs: Sequence[str], **fed: Array) -> list[Array]:
    """What a graph returns; `fed` are inputs that are not of its rows."""
    del graph.model.graph.output[:]
    graph.model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = 4
    session = onnxruntime.InferenceSession(graph.model.SerializeToString(), settings, ["CPUExecutionProvider"])
    named = {graph.prefix + name: array for name, array in feeds.items()} | fed
    return list(session.run(None, {value.name: named[value.name] for value in session.get_inputs()}))


def points(rows: Rows, spec: InputSpec, multiplies: bool, opset: int = 18) -> Array:
    """The batch that a graph makes of a micro-batch."""
    kind = helper.np_dtype_to_tensor_dtype(spec.dtype)
    shape = ["batch", *(axis.size for axis in spec.instance_axes)]
    identity = model([node("Identity", [spec.name], ["y"])], [(spec.name, shape, kind)], [("y", shape, kind)])
    identity.opset_import[0].version = opset
    graph = RowGraph(identity, multiplies=multiplies)
    graph.interpolate({spec.name})
    (batch,) = run(graph, RowFeeds(rows, multiplies=graph.multiplies).of_input(spec), ["y"])
    return batch


def sums(rows: Rows, gradients: Array, multiplies: bool) -> Array:
    """The weighted sums that a graph returns of the gradients of all rows."""
    kind = helper.np_dtype_to_tensor_dtype(gradients.dtype)
    shape = [None, *gradients.shape[1:]]
    graph = RowGraph(
        model([node("Identity", ["g"], ["y"])], [("g", shape, kind)], [("y", shape, kind)]), multiplies=multiplies
    )
    graph.reduce({"g": kind})
    (found,) = run(graph, RowFeeds(rows, multiplies=multiplies).of_segments(), graph.outputs, g=gradients)
    return found.reshape(len(rows.segments), *gradients.shape[1:])


def selected(rows: Rows, scores: Array, selectors: Sequence[Selector]) -> tuple[list[int], Array, Array]:
    """The shape of the scores, what the selectors have of them, and the cotangent."""
    kind = helper.np_dtype_to_tensor_dtype(scores.dtype)
    shape = [None, *scores.shape[1:]]
    nodes = [node("Identity", ["s"], ["y"]), node("Identity", ["cotangent"], ["seeded"])]
    inputs = [("s", shape, kind), ("cotangent", shape, kind)]
    graph = RowGraph(model(nodes, inputs, [("y", shape, kind), ("seeded", shape, kind)]), multiplies=False)
    graph.select("y", "cotangent")
    feeds = RowFeeds(rows, multiplies=False).of_segments() | selector_feeds(selectors)
    found, picked, seeded = run(graph, feeds, [*graph.outputs, "seeded"], s=scores)
    return found.tolist(), picked, seeded


def paths(dtype: str, shape: tuple[int, ...] = (2, 3)) -> tuple[Segment, ...]:
    """Three segments: two on one path, one on another."""
    random = np.random.default_rng(0)
    first, last, here, there = random.standard_normal((4, *shape)).astype(dtype)
    return (
        segment(first, last, [0.0, 0.3, 1.0]),
        segment(first, last, [0.7]),
        segment(here, there, [1.0, 0.25]),
    )


def expected_points(rows: Rows) -> Array:
    """In float64."""
    return np.concatenate(
        [
            np.stack([(1 - a) * s.start["x"].astype(np.float64) + a * s.end["x"].astype(np.float64) for a in s.alphas])
            for s in rows.segments
        ]
    )


# -- points ------------------------------------------------------------------------------------------------------------


@both_ways
@every_float
def test_points_lie_on_their_paths(dtype: str, multiplies: bool) -> None:
    rows = Rows(FUNCTION, paths(dtype))
    found = points(rows, input_spec("x", (2, 3), dtype), multiplies)

    assert found.dtype == dtype
    precision = max(np.finfo(dtype).eps, 0.0)
    np.testing.assert_allclose(found, expected_points(rows), rtol=0, atol=4 * precision)


@both_ways
@pytest.mark.parametrize("opset", [7, 8, 9, 11, 13, 15, 18, 21])
def test_points_are_computed_in_every_operator_set(opset: int, multiplies: bool) -> None:
    rows = Rows(FUNCTION, paths("float32"))
    found = points(rows, input_spec("x", (2, 3)), multiplies, opset)

    np.testing.assert_allclose(found, expected_points(rows), rtol=1e-6, atol=1e-6)


@both_ways
@every_float
def test_points_are_exact_at_both_ends_whatever_the_magnitudes(dtype: str, multiplies: bool) -> None:
    near, far = np.array([0.1, 1.7, -1e-7, 3.0], dtype), np.array([6e4, -3.0, 1e-3, -6e4], dtype)
    other = segment(far * far.dtype.type(0.3), near, [0.4])
    rows = Rows(FUNCTION, (segment(far, near, [0.0, 1.0]), other, segment(near, far, [1.0])))
    found = points(rows, input_spec("x", (4,), dtype), multiplies)

    np.testing.assert_array_equal(found[[0, 1, 3]], [far, near, far])


@both_ways
def test_what_is_not_finite_stays_in_its_own_segment(multiplies: bool) -> None:
    plain = np.array([1.0, 2.0, 3.0], np.float32)
    broken = np.array([np.nan, np.inf, -np.inf], np.float32)
    rows = Rows(
        FUNCTION, (segment(plain, 2 * plain, [0.5]), segment(plain, broken, [0.5]), segment(0 * plain, plain, [1.0]))
    )
    found = points(rows, input_spec("x", (3,)), multiplies)

    np.testing.assert_array_equal(found, [1.5 * plain, broken, plain])


@both_ways
def test_a_fixed_input_keeps_its_value_even_where_it_is_not_finite(multiplies: bool) -> None:
    """As the masks of attention do."""
    mask = np.array([0.0, -np.inf, -0.0], np.float32)
    held = Segment({}, {}, {"x": mask}, FUNCTION, np.array([0.0, 0.3]), np.ones(2))
    moving = segment(np.zeros(3, np.float32), np.ones(3, np.float32), [0.25])
    found = points(Rows(FUNCTION, (held, moving)), input_spec("x", (3,)), multiplies)

    np.testing.assert_array_equal(found, [mask, mask, [0.25] * 3])


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "bool"])
def test_inputs_that_are_not_floating_point_keep_their_value_on_each_row(dtype: str) -> None:
    values = [np.array([1, 0, 1], dtype), np.array([0, 0, 1], dtype)]
    rows = Rows(
        FUNCTION,
        tuple(
            Segment({}, {}, {"x": value}, FUNCTION, np.zeros(count), np.ones(count))
            for value, count in zip(values, (2, 1), strict=True)
        ),
    )
    found = points(rows, input_spec("x", (3,), dtype), multiplies=True)

    np.testing.assert_array_equal(found, [values[0], values[0], values[1]])
    assert found.dtype == dtype


def test_arrays_that_are_one_object_are_fed_once() -> None:
    rows = Rows(FUNCTION, paths("float32"))
    equal = Rows(
        FUNCTION, (*rows.segments, segment(rows.segments[0].start["x"].copy(), rows.segments[0].end["x"], [0.1]))
    )
    spec = input_spec("x", (2, 3))

    assert len(RowFeeds(rows, multiplies=True).of_input(spec)["ends/x"]) == 4
    assert len(RowFeeds(equal, multiplies=True).of_input(spec)["ends/x"]) == 5


@both_ways
def test_a_single_row_may_lack_the_batch_axis(multiplies: bool) -> None:
    inputs = [("x", [2]), ("scale", []), ("id", [], TensorProto.INT64)]
    nodes = [
        node("Mul", ["x", "scale"], ["scaled"]),
        node("Cast", ["id"], ["number"], to=TensorProto.FLOAT),
        node("Add", ["scaled", "number"], ["y"]),
    ]
    bare = {"x", "scale", "id"}
    graph = RowGraph(model(nodes, inputs, [("y", [2])]), multiplies=multiplies, bare=bare)
    graph.interpolate(bare)
    start = {"x": np.array([0.0, 2.0], np.float32), "scale": np.array(2.0, np.float32)}
    end = {"x": np.array([4.0, 2.0], np.float32), "scale": np.array(4.0, np.float32)}
    rows = Rows(FUNCTION, (Segment(start, end, {"id": np.array(7)}, FUNCTION, np.array([0.5]), np.ones(1)),))
    specs = [input_spec("x", (2,)), input_spec("scale", ()), input_spec("id", (), "int64")]
    own, feeds = RowFeeds(rows, multiplies=multiplies), dict[str, Array]()
    for spec in specs:
        feeds |= own.of_input(spec, bare=True)

    np.testing.assert_allclose(run(graph, feeds, ["y"])[0], [13.0, 13.0])


def test_names_of_the_model_are_left_alone() -> None:
    proto = model([node("Identity", ["x"], ["rows/ends/x"])], [("x", ["batch", 2])], [("rows/ends/x", ["batch", 2])])
    graph = RowGraph(proto, multiplies=True)
    graph.interpolate({"x"})
    rows = Rows(FUNCTION, paths("float32", (2,)))

    (found,) = run(graph, RowFeeds(rows, multiplies=True).of_input(input_spec("x", (2,))), ["rows/ends/x"])
    np.testing.assert_allclose(found, expected_points(rows), rtol=1e-6, atol=1e-6)


# -- sums --------------------------------------------------------------------------------------------------------------


def weighted(*weights: Sequence[float]) -> Rows:
    """Segments with these weights of their rows."""
    x = np.zeros(1, np.float32)
    return Rows(FUNCTION, tuple(segment(x, x, [0.0] * len(own), own) for own in weights))


@both_ways
@every_float
def test_gradients_are_summed_per_segment(dtype: str, multiplies: bool) -> None:
    rows = weighted([0.2, -0.5, 3.0], [1.0], [0.25, 0.75])
    gradients = np.random.default_rng(1).standard_normal((6, 2, 3)).astype(dtype)
    found = sums(rows, gradients, multiplies)
    g = gradients.astype(np.float64)

    assert found.dtype == np.result_type(dtype, np.float32)
    expected = [0.2 * g[0] - 0.5 * g[1] + 3.0 * g[2], g[3], 0.25 * g[4] + 0.75 * g[5]]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@both_ways
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_stays_in_its_own_segment(value: float, multiplies: bool) -> None:
    gradients = np.arange(1.0, 9.0, dtype=np.float32).reshape(4, 2)
    gradients[2, 0] = value
    found = sums(weighted([1.0, 1.0], [2.0], [1.0]), gradients, multiplies)

    np.testing.assert_array_equal(found, [[4.0, 6.0], [value, 12.0], [7.0, 8.0]])


@both_ways
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_of_weight_zero_are_left_out(value: float, multiplies: bool) -> None:
    gradients = np.array([[value, 1.0], [2.0, 3.0], [value, value]], np.float32)
    found = sums(weighted([0.0, 0.5], [0.0]), gradients, multiplies)

    np.testing.assert_array_equal(found, [[1.0, 1.5], [0.0, 0.0]])


@both_ways
def test_many_rows_on_several_threads_lose_no_term(multiplies: bool) -> None:
    """Threads that scatter into one place overwrite each other's sums in onnxruntime's ScatterND."""
    gradients = np.ones((64, 50_000), np.float32)
    gradients[63, 0] = np.nan  # so that products are not used
    for _ in range(5):
        found = sums(weighted([1.0] * 63, [1.0]), gradients, multiplies)

        np.testing.assert_array_equal(found[0], np.full(50_000, 63.0))


@both_ways
def test_float16_gradients_are_summed_in_float32(multiplies: bool) -> None:
    found = sums(weighted([1.0] * 4096), np.ones((4096, 1), np.float16), multiplies)

    np.testing.assert_array_equal(found, [[4096.0]])


# -- selectors ---------------------------------------------------------------------------------------------------------


def selector(entries: Mapping[int, float]) -> Selector:
    return Selector(np.array(list(entries), np.int64), np.array(list(entries.values()), np.float32))


@every_float
def test_each_segment_has_its_selector(dtype: str) -> None:
    scores = np.arange(18.0, dtype=dtype).reshape(3, 2, 3)
    shape, picked, seeded = selected(
        weighted([1.0, 1.0], [1.0]), scores, [selector({1: 2.0, 5: -1.0}), selector({4: 0.5})]
    )

    assert shape == [3, 2, 3]
    np.testing.assert_array_equal(picked[:2], [[1.0, 5.0], [7.0, 11.0]])
    assert picked[2, 0] == 16.0
    expected = np.zeros((3, 6))
    expected[:2, 1], expected[:2, 5], expected[2, 4] = 2.0, -1.0, 0.5
    np.testing.assert_array_equal(seeded, expected.reshape(3, 2, 3))
    assert seeded.dtype == dtype


def test_weights_of_an_entry_that_comes_twice_add_up() -> None:
    twice = Selector(np.array([1, 1, 0]), np.array([2.0, 3.0, 1.0], np.float32))
    _, _, seeded = selected(weighted([1.0]), np.zeros((1, 2), np.float32), [twice])

    np.testing.assert_array_equal(seeded, [[1.0, 5.0]])


def test_a_score_of_each_row_may_be_a_single_number() -> None:
    shape, picked, seeded = selected(weighted([1.0], [1.0]), np.array([3.0, 4.0], np.float32), [selector({0: 2.0})] * 2)

    assert shape == [2]
    np.testing.assert_array_equal(picked, [[3.0], [4.0]])
    np.testing.assert_array_equal(seeded, [2.0, 2.0])


def test_a_selector_without_entries_selects_nothing() -> None:
    nothing = Selector(np.empty(0, np.int64), np.empty(0, np.float32))
    _, _, seeded = selected(weighted([1.0]), np.ones((1, 3), np.float32), [nothing])

    np.testing.assert_array_equal(seeded, np.zeros((1, 3)))


# -- ranks -------------------------------------------------------------------------------------------------------------


@both_ways
def test_the_rank_of_every_tensor_is_known(multiplies: bool) -> None:
    """TensorRT's provider refuses graphs in which one is not."""
    shape, integers = ["batch", 2, 3], TensorProto.INT64
    nodes = [node("Identity", ["x"], ["y"]), node("Mul", ["cotangent", "cotangent"], ["g"]), node("Neg", ["id"], ["n"])]
    inputs = [("x", shape), ("cotangent", shape), ("id", ["batch"], integers)]
    graph = RowGraph(
        model(nodes, inputs, [("y", shape), ("g", shape), ("n", ["batch"], integers)]), multiplies=multiplies
    )
    graph.interpolate({"x", "id"})
    graph.select("y", "cotangent")
    graph.reduce({"g": TensorProto.FLOAT})
    inferred = onnx.shape_inference.infer_shapes(graph.model, data_prop=True, strict_mode=True).graph
    known = {
        value.name
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
        if value.type.tensor_type.HasField("shape")
    }

    assert {value.name for value in graph.model.graph.input} <= known
    if not multiplies:  # what a branch returns has a rank only when it runs
        assert {name for each in graph.model.graph.node for name in each.output} <= known
