"""Subnormal probabilities behind a mask become zero; nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from explainserve.backends.onnx_subnormal import flush_subnormals
from explainserve.backends.onnx_weights import Weights

TOKENS = 20


def attention(masked: float, *, joined: str = "Add", outputs: tuple[str, ...] = ("y",)) -> onnx.ModelProto:
    """y = softmax(scores + mask) values, with every second key masked."""
    mask = np.zeros((1, TOKENS, TOKENS), np.float32)
    mask[..., 1::2] = masked
    join = {
        "Add": helper.make_node("Add", ["scores", "mask"], ["joined"]),
        "Where": helper.make_node("Where", ["hidden", "mask", "scores"], ["joined"]),
    }[joined]
    nodes = [
        join,
        helper.make_node("Reshape", ["joined", "shape"], ["rows"]),
        helper.make_node("Softmax", ["rows"], ["probabilities"]),
        helper.make_node("MatMul", ["probabilities", "values"], ["y"]),
    ]
    weights = {"mask": mask, "shape": np.array([-1, TOKENS, TOKENS]), "hidden": mask != 0}
    values = [
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", TOKENS, TOKENS]),
        helper.make_tensor_value_info("values", TensorProto.FLOAT, [TOKENS, 1]),
    ]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "attention", values, results, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(model: onnx.ModelProto, values: np.ndarray) -> list[np.ndarray]:
    scores = np.random.default_rng(0).standard_normal((2, TOKENS, TOKENS)).astype(np.float32)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"scores": scores, "values": values})


@pytest.mark.parametrize("joined", ["Add", "Where"])
def test_subnormal_probabilities_become_zero(joined: str) -> None:
    """Values of 1e38 make the probabilities near 1e-44 of masked keys visible."""
    model, values = attention(-100, joined=joined), np.zeros((TOKENS, 1), np.float32)
    values[1::2] = 1e38
    assert np.all(run(model, values)[0] > 0)
    flush_subnormals(model, {})
    np.testing.assert_array_equal(run(model, values)[0], 0)


def test_nan_stays_nan() -> None:
    model, values = attention(-100), np.ones((TOKENS, 1), np.float32)
    flush_subnormals(model, {})
    scores = np.zeros((1, TOKENS, TOKENS), np.float32)
    scores[0, 3, 0] = np.nan
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"scores": scores, "values": values})
    np.testing.assert_array_equal(np.isnan(y[0, :, 0]), np.arange(TOKENS) == 3)


def test_ordinary_values_are_the_same_bit_by_bit() -> None:
    model, values = attention(-100), np.random.default_rng(1).standard_normal((TOKENS, 1)).astype(np.float32)
    before = run(model, values)[0]
    flush_subnormals(model, {})
    np.testing.assert_array_equal(run(model, values)[0], before)


@pytest.mark.parametrize("masked", [0.0, -10.0, -1e4, -np.inf])
def test_masks_that_leave_no_subnormal_numbers_cost_nothing(masked: float) -> None:
    model = attention(masked)
    before = model.SerializeToString()
    flush_subnormals(model, {})
    assert model.SerializeToString() == before


def test_old_models_are_left_as_they_are() -> None:
    model = attention(-100)
    model.opset_import[0].version = 11
    before = model.SerializeToString()
    flush_subnormals(model, {})
    assert model.SerializeToString() == before


def test_a_softmax_that_is_an_output_is_left_as_it_is() -> None:
    model, values = attention(-100, outputs=("y", "probabilities")), np.ones((TOKENS, 1), np.float32)
    before = run(model, values)[1]
    flush_subnormals(model, {})
    np.testing.assert_array_equal(run(model, values)[1], before)


def test_masks_held_elsewhere_are_read_and_a_second_pass_adds_nothing() -> None:
    model, weights = attention(-100), Weights()
    weights.take(model)
    flush_subnormals(model, weights.of(model))
    once = [node.op_type for node in model.graph.node]
    flush_subnormals(model, weights.of(model))
    assert [node.op_type for node in model.graph.node] == once == [
        "Add", "Reshape", "Softmax", "GreaterOrEqual", "Cast", "Mul", "MatMul",
    ]  # fmt: skip
