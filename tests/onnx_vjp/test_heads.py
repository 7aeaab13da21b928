"""Score heads: values, gradients, and numbers that a naive formula would lose."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from explainserve.onnx_vjp import HEADS, append_score_head, input_gradient
from onnx_vjp.vjp_oracle import run

LOGITS = np.array([[0.5, -1.0, 2.0], [300.0, -300.0, 0.0]], np.float32)


def classifier(operator: str = "Identity", version: int = 21) -> onnx.ModelProto:
    attributes = {"axis": 1} if operator == "Softmax" else {}
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"], **attributes)],
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=8)


def log_softmax(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64) - x.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -x.astype(np.float64))


EXPECTED = {
    "identity": lambda x: x,
    "softmax": lambda x: np.exp(log_softmax(x)),
    "log_softmax": log_softmax,
    "sigmoid": lambda x: np.exp(log_sigmoid(x)),
    "log_sigmoid": log_sigmoid,
    "log": lambda x: np.log(x.astype(np.float64)),
}


def score_and_gradient(model: onnx.ModelProto, head: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    extended, score = append_score_head(model, "y", head, axis=1)
    assert score in {output.name for output in extended.graph.output}
    gradient = input_gradient(extended, ["x"], score)
    cotangent = np.eye(3, dtype=np.float32)[[0, 1]]
    value, dx = run(gradient.model, {"x": x, gradient.cotangent: cotangent}, [score, gradient.gradients["x"]])
    return value, dx


def before_an_activation(
    *nodes: onnx.NodeProto, shape: tuple[int | str, ...] = ("batch", 3), version: int = 21
) -> onnx.ModelProto:
    """An output of that shape, from x through the nodes."""
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["z"]), *nodes],
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(shape))],
        [numpy_helper.from_array(np.array([2]), "two"), numpy_helper.from_array(np.array([0, 3, 1]), "column")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=8)


ENDINGS = {
    "as it is": before_an_activation(helper.make_node("Softmax", ["z"], ["y"])),
    "sigmoid": before_an_activation(helper.make_node("Sigmoid", ["z"], ["y"])),
    "named anew": before_an_activation(
        helper.make_node("Softmax", ["z"], ["p"], axis=1), helper.make_node("Identity", ["p"], ["y"])
    ),
    "through float64": before_an_activation(
        helper.make_node("Cast", ["z"], ["wide"], to=TensorProto.DOUBLE),
        helper.make_node("Sigmoid", ["wide"], ["p"]),
        helper.make_node("Cast", ["p"], ["y"], to=TensorProto.FLOAT),
    ),
    "reshaped": before_an_activation(
        helper.make_node("Sigmoid", ["z"], ["p"]),
        helper.make_node("Reshape", ["p", "column"], ["q"]),
        helper.make_node("Squeeze", ["q", "two"], ["y"]),
    ),
    "transposed": before_an_activation(
        helper.make_node("Transpose", ["z"], ["t"], perm=[1, 0]),
        helper.make_node("Softmax", ["t"], ["p"], axis=0),
        helper.make_node("Transpose", ["p"], ["y"], perm=[1, 0]),
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_stands_before_the_last_activation_is_a_head(ending: str) -> None:
    value, dx = score_and_gradient(ENDINGS[ending], "pre_activation", LOGITS)

    np.testing.assert_array_equal(value, -LOGITS)
    np.testing.assert_array_equal(dx, -np.eye(3, dtype=np.float32)[[0, 1]])


@pytest.mark.parametrize("ending", ["as it is", "named anew", "transposed"])
def test_the_logarithm_of_a_softmax_does_not_underflow_behind_what_rearranges_it(ending: str) -> None:
    value, _ = score_and_gradient(ENDINGS[ending], "log", LOGITS)

    np.testing.assert_allclose(value, log_softmax(-LOGITS), rtol=1e-5, atol=1e-7)


def test_an_input_may_stand_before_the_last_activation() -> None:
    value, dx = score_and_gradient(classifier("Softmax"), "pre_activation", LOGITS)

    np.testing.assert_array_equal(value, LOGITS)
    np.testing.assert_array_equal(dx, np.eye(3, dtype=np.float32)[[0, 1]])


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("Relu", ["z"], ["y"])],
        [helper.make_node("Softmax", ["z"], ["p"]), helper.make_node("Exp", ["p"], ["y"])],
        [helper.make_node("Softmax", ["z"], ["p"], domain="com.microsoft"), helper.make_node("Identity", ["p"], ["y"])],
        [helper.make_node("Sigmoid", ["z"], ["p"]), helper.make_node("Cast", ["p"], ["y"], to=TensorProto.INT64)],
    ],
)
def test_an_output_that_ends_otherwise_has_nothing_before_its_activation(nodes: list[onnx.NodeProto]) -> None:
    with pytest.raises(ValueError, match="does not end in a softmax or sigmoid"):
        append_score_head(before_an_activation(*nodes), "y", "pre_activation", axis=1)


def test_every_head_is_tested() -> None:
    assert set(EXPECTED) == set(HEADS)


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("version", [11, 21])
def test_a_head_has_its_closed_form_and_its_gradient(head: str, version: int) -> None:
    x = np.abs(LOGITS) + 0.1 if head == "log" else LOGITS
    value, dx = score_and_gradient(classifier(version=version), head, x)
    np.testing.assert_allclose(value, EXPECTED[head](x), rtol=1e-5, atol=1e-7)
    step = 1e-5
    for row, column in ((0, 0), (1, 1)):
        for position in range(3):
            ahead, behind = x.astype(np.float64), x.astype(np.float64)
            ahead[row, position] += step
            behind[row, position] -= step
            slope = (EXPECTED[head](ahead)[row, column] - EXPECTED[head](behind)[row, column]) / (2 * step)
            assert dx[row, position] == pytest.approx(slope, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("operator", "expected"), [("Softmax", log_softmax), ("Sigmoid", log_sigmoid)])
def test_the_logarithm_of_a_probability_does_not_underflow(operator: str, expected: object) -> None:
    value, dx = score_and_gradient(classifier(operator), "log", LOGITS)
    np.testing.assert_allclose(value, expected(LOGITS), rtol=1e-5, atol=1e-7)  # type: ignore[operator]
    assert np.isfinite(dx).all()
    assert np.abs(dx[1]).max() > 0.5


@pytest.mark.parametrize("version", [7, 11, 12, 13])
@pytest.mark.parametrize("axis", [None, 1, 2, 3])
def test_the_logarithm_of_a_softmax_means_the_same_in_every_operator_set(version: int, axis: int | None) -> None:
    """Before operator set 13 a Softmax runs over all axes from the given one on, and over all but the first."""
    attributes = {} if axis is None else {"axis": axis}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2, 3, 2]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Softmax", ["x"], ["y"], **attributes)], "classifier", values[:1], values[1:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=7)
    x = np.random.default_rng(0).uniform(-2, 2, (2, 2, 3, 2)).astype(np.float32)
    x[0, 0, 0, 0] = x[1, 1, 2, 1] = -200
    over = ((1, 2, 3)[(axis or 1) - 1 :]) if version < 13 else (3 if axis is None else axis,)
    wide = x.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axis=over, keepdims=True))
    extended, score = append_score_head(model, "y", "log", axis=1)
    gradient = input_gradient(extended, ["x"], score)
    g = np.zeros_like(x)
    g[0, 0, 0, 0] = g[1, 1, 2, 0] = 1
    value, dx = run(gradient.model, {"x": x, gradient.cotangent: g}, [score, gradient.gradients["x"]])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    slope = g - np.exp(expected) * g.sum(axis=over, keepdims=True)
    np.testing.assert_allclose(dx, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("version", [7, 12, 13])
@pytest.mark.parametrize(("axis", "position"), [(1, 1), (-1, 2), (2, 2), (0, 0)])
def test_softmax_heads_run_over_the_class_axis_alone(version: int, axis: int, position: int) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, "pixels"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "segmenter", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=7)
    x = np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32)
    g = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)
    p = np.exp(-x.astype(np.float64))
    p /= p.sum(axis=position, keepdims=True)
    slopes = {
        "softmax": p * (g - (g * p).sum(axis=position, keepdims=True)),
        "log_softmax": g - p * g.sum(axis=position, keepdims=True),
    }
    for head, slope in slopes.items():
        extended, score = append_score_head(model, "y", head, axis)
        (alone,) = run(extended, {"x": x}, [score])
        gradient = input_gradient(extended, ["x"], score)
        value, dx = run(gradient.model, {"x": x, gradient.cotangent: g}, [score, gradient.gradients["x"]])
        for found in (alone, value):
            np.testing.assert_allclose(found, p if head == "softmax" else np.log(p), rtol=1e-5)
        np.testing.assert_allclose(dx, -slope, rtol=1e-4, atol=1e-6)


def test_a_softmax_over_an_axis_of_unknown_place_is_refused_where_it_would_flatten() -> None:
    value = onnx.ValueInfoProto(name="y", type=helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    model = classifier(version=12)
    model.graph.output[0].CopyFrom(value)
    append_score_head(model, "y", "softmax", axis=-1)
    with pytest.raises(ValueError, match="'y' declares no shape"):
        append_score_head(model, "y", "softmax", axis=1)


@pytest.mark.parametrize("head", ["identity", "sigmoid", "softmax"])
def test_functions_stay_in_the_operator_set_that_they_are_written_in(head: str) -> None:
    """`axes` of ReduceMean is an attribute in operator set 17, and an input in 18."""
    mean = helper.make_node("ReduceMean", ["a"], ["b"], axes=[2], keepdims=0)
    function = helper.make_function("local", "Mean", ["a"], ["b"], [mean], [helper.make_opsetid("", 17)])
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 4][:rank])
        for name, rank in (("x", 3), ("y", 2))
    )
    graph = helper.make_graph([helper.make_node("Mean", ["x"], ["y"], domain="local")], "pooled", [x], [y])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=8)
    extended, score = append_score_head(model, "y", head, axis=1)
    values = np.random.default_rng(3).standard_normal((2, 3, 4)).astype(np.float32)
    (value,) = run(extended, {"x": values}, [score])
    np.testing.assert_allclose(value, EXPECTED[head](values.mean(axis=2)), rtol=1e-5)
    gradient = input_gradient(extended, ["x"], score)
    outputs = [score, gradient.gradients["x"]]
    again, dx = run(gradient.model, {"x": values, gradient.cotangent: np.eye(3, dtype=np.float32)[:2]}, outputs)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    assert np.abs(dx).max() > 0.01


def test_an_unknown_head_or_tensor_is_named() -> None:
    with pytest.raises(ValueError, match="unknown score head 'tanh'"):
        append_score_head(classifier(), "y", "tanh", axis=1)
    with pytest.raises(ValueError, match="no tensor 'z'"):
        append_score_head(classifier(), "z", "softmax", axis=1)


def test_the_given_model_is_left_as_it_was() -> None:
    model = classifier(version=11)
    before = model.SerializeToString()
    append_score_head(model, "y", "softmax", axis=1)
    input_gradient(model, ["x"], "y")
    assert model.SerializeToString() == before
