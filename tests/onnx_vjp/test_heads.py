"""Score heads: values, gradients, and numbers that a naive formula would lose."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

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
