"""What of a graph is converted to float16, and what is not."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from explainserve.backends.onnx_float16 import in_float16
from explainserve.backends.onnx_weights import Weights
from explainserve.onnx_vjp import input_gradient
from onnx_graphs import model, node

RANDOM = np.random.default_rng(0)
WEIGHTS = {"W": RANDOM.standard_normal((32, 32)).astype(np.float32)}
X = RANDOM.standard_normal((4, 32)).astype(np.float32)
PORTS = [("x", ["n", 32])], [("y", ["n", 32])]


def converted(plain: onnx.ModelProto) -> tuple[onnx.ModelProto, Weights]:
    weights = Weights()
    weights.take(plain)
    return in_float16(plain, weights)


def kinds(graph: onnx.ModelProto) -> dict[str, int]:
    """The element type of each tensor by its name."""
    inferred = onnx.shape_inference.infer_shapes(graph).graph
    return {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }


def outputs(graph: onnx.ModelProto, weights: Weights, **feeds: np.ndarray) -> np.ndarray:
    complete = weights.embedded(graph)
    onnx.checker.check_model(complete, full_check=True)
    session = onnxruntime.InferenceSession(complete.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], feeds)[0]


def narrow(nodes: list[onnx.NodeProto], weights: Mapping[str, np.ndarray] = WEIGHTS) -> set[str]:
    """The tensors of a model that the nodes compute in float16."""
    found, held = converted(model(nodes, *PORTS, weights))
    assert outputs(found, held, x=X).dtype == np.float32
    own = {name for each in nodes for name in each.output}
    return {name for name, kind in kinds(found).items() if kind == TensorProto.FLOAT16 and name in own}


def test_products_are_and_inputs_and_outputs_are_not() -> None:
    found, weights = converted(model([node("MatMul", ["x", "W"], ["y"])], *PORTS, WEIGHTS))
    multiplied = next(each for each in found.graph.node if each.op_type == "MatMul")
    of = kinds(found)

    assert [of.get(name, TensorProto.FLOAT16) for name in (*multiplied.input, *multiplied.output)] == [
        TensorProto.FLOAT16
    ] * 3
    assert of["x"] == of["y"] == TensorProto.FLOAT
    exact = X.astype(np.float64) @ WEIGHTS["W"]
    error = np.linalg.norm(outputs(found, weights, x=X) - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 2e-3


def test_weights_take_half_the_bytes() -> None:
    plain = model([node("MatMul", ["x", "W"], ["y"])], *PORTS, WEIGHTS)
    _, weights = converted(plain)

    assert weights.byte_count == WEIGHTS["W"].nbytes // 2


def test_what_joins_follows_its_operands() -> None:
    nodes = [
        node("MatMul", ["x", "W"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Add", ["b", "a"], ["c"]),
        node("Add", ["c", "x"], ["d"]),
        node("MatMul", ["d", "W"], ["e"]),
        node("Identity", ["e"], ["y"]),
    ]

    assert narrow(nodes) == {"a", "b", "c", "e"}


@pytest.mark.parametrize("operator", ["Softmax", "Exp", "Sqrt", "Erf", "GlobalAveragePool"])
def test_sums_and_functions_that_lose_too_much_are_not(operator: str) -> None:
    nodes = [
        node("MatMul", ["x", "W"], ["a"]),
        node("Reshape", ["a", "images"], ["b"]),
        node(operator, ["b"], ["c"]),
        node("Mul", ["c", "c"], ["d"]),
        node("Reshape", ["d", "rows"], ["e"]),
        node("Expand", ["e", "wide"], ["y"]),
    ]
    shapes = {"images": np.array([0, 2, 4, 4]), "rows": np.array([0, -1]), "wide": np.array([1, 1])}
    if operator == "GlobalAveragePool":
        shapes["rows"], shapes["wide"] = np.array([0, 2, 1]), np.array([1, 1, 16])
        nodes[-1:] = [node("Expand", ["e", "wide"], ["f"]), node("Reshape", ["f", "flat"], ["y"])]
        shapes["flat"] = np.array([0, -1])

    assert narrow(nodes, {**WEIGHTS, **shapes}) == {"a", "b"}


def test_a_variance_is_computed_in_float32() -> None:
    """Of numbers that are near to each other, and far from zero."""
    nodes = [
        node("MatMul", ["x", "W"], ["a"]),
        node("ReduceMean", ["a", "last"], ["mean"]),
        node("Sub", ["a", "mean"], ["b"]),
        node("Mul", ["b", "b"], ["c"]),
        node("Add", ["c", "epsilon"], ["y"]),
    ]

    assert narrow(nodes, {**WEIGHTS, "last": np.array([1]), "epsilon": np.array(1e-5, np.float32)}) == {"a"}


def test_a_node_with_a_constant_beyond_float16_stays_and_infinity_is_none() -> None:
    nodes = [
        node("MatMul", ["x", "W"], ["a"]),
        node("Max", ["a", "infinity"], ["b"]),
        node("Add", ["b", "mask"], ["c"]),
        node("Softmax", ["c"], ["y"]),
    ]
    bounds = {"infinity": np.array(-np.inf, np.float32), "mask": np.array(-1e9, np.float32)}

    assert narrow(nodes, {**WEIGHTS, **bounds}) == {"a", "b"}


def test_constants_of_nodes_are_converted_and_those_that_float32_reads_are_kept() -> None:
    value = onnx.numpy_helper.from_array(WEIGHTS["W"])
    nodes = [
        node("Constant", [], ["V"], value=value),
        node("MatMul", ["x", "V"], ["a"]),
        node("Exp", ["V"], ["b"]),
        node("MatMul", ["a", "b"], ["y"]),
    ]
    found, weights = converted(model(nodes, *PORTS))
    exact = X.astype(np.float64) @ WEIGHTS["W"] @ np.exp(WEIGHTS["W"].astype(np.float64))

    assert [each.op_type for each in found.graph.node].count("Constant") == 1
    assert np.linalg.norm(outputs(found, weights, x=X) - exact) / np.linalg.norm(exact) < 5e-3


def test_what_branches_read_stays_in_float32() -> None:
    inner = helper.make_graph([node("Neg", ["a"], ["t"])], "then", [], [onnx.ValueInfoProto(name="t")])
    other = helper.make_graph([node("Identity", ["a"], ["e"])], "else", [], [onnx.ValueInfoProto(name="e")])
    nodes = [
        node("MatMul", ["x", "W"], ["a"]),
        node("Greater", ["a", "zero"], ["positive"]),
        node("Cast", ["positive"], ["counted"], to=TensorProto.FLOAT),
        node("ReduceSum", ["counted"], ["count"], keepdims=0),
        node("Greater", ["count", "zero"], ["c"]),
        node("If", ["c"], ["y"], then_branch=inner, else_branch=other),
    ]
    found, weights = converted(model(nodes, *PORTS, {**WEIGHTS, "zero": np.array(0, np.float32)}))

    assert kinds(found)["a"] == TensorProto.FLOAT
    np.testing.assert_allclose(outputs(found, weights, x=X), -(X @ WEIGHTS["W"]), rtol=1e-2, atol=2e-2)


def test_integers_and_unknown_types_are_left_alone() -> None:
    nodes = [
        node("Gather", ["table", "x"], ["e"]),
        node("Own", ["e"], ["u"], domain="own"),
        node("MatMul", ["u", "W"], ["y"]),
    ]
    ports = [("x", ["n"], TensorProto.INT64)], [("y", ["n", 32])]
    found, _ = converted(model(nodes, *ports, {**WEIGHTS, "table": WEIGHTS["W"]}, domains=["own"]))

    assert TensorProto.FLOAT16 not in kinds(found).values()


@pytest.mark.parametrize(
    ("operator", "given", "attributes"),
    [
        ("MaxPool", (), {"kernel_shape": [3], "strides": [1]}),
        ("GatherElements", ("repeated",), {"axis": 2}),
        ("Gather", ("index",), {"axis": 2}),
        ("GatherND", ("places",), {}),
    ],
)
def test_gradients_that_add_up_in_places_run_in_float16(
    operator: str, given: tuple[str, ...], attributes: Mapping[str, object]
) -> None:
    """onnxruntime's CPU provider adds up in float32 only."""
    nodes = [
        node("MatMul", ["x", "W"], ["a"]),
        node("Unsqueeze", ["a", "one"], ["b"]),
        node(operator, ["b", *given], ["c"], **attributes),
        node("Flatten", ["c"], ["y"]),
    ]
    shapes = {"one": np.array([1]), "index": np.array([3, 3, 3]), "places": np.array([[0], [0], [1], [2]])}
    shapes["repeated"] = np.zeros((4, 1, 2), np.int64)
    plain, held = model(nodes, [("x", [4, 32])], [("y", [4, "m"])], {**WEIGHTS, **shapes}), Weights()
    held.take(plain)
    exact, found = gradient_of(plain, held), gradient_of(*in_float16(plain, held))

    assert 0 < np.linalg.norm(found - exact) < 5e-3 * np.linalg.norm(exact)


def gradient_of(graph: onnx.ModelProto, weights: Weights) -> np.ndarray:
    """Of the sum of the outputs."""
    found = input_gradient(weights.embedded(graph), ["x"], "y")
    ones = np.ones_like(outputs(graph, weights, x=X))
    session = onnxruntime.InferenceSession(found.model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run([found.gradients["x"]], {"x": X, found.cotangent: ones})[0]
