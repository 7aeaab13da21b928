"""Cotangents go back to the maxima of disjoint windows by MaxUnpool, and of no others."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from explainserve.onnx_vjp import GradientGraph, input_gradient
from explainserve.onnx_vjp.disjoint_windows import unpool_disjoint_windows

random = np.random.default_rng(5)


def pooled(size: int, kind: int = TensorProto.FLOAT, **geometry: Any) -> GradientGraph:
    """The gradient of a max pooling of square images."""
    pool = helper.make_node("MaxPool", ["x"], ["y"], **geometry)
    x = helper.make_tensor_value_info("x", kind, ["n", 3, size, size])
    y = helper.make_tensor_value_info("y", kind, ["n", 3, "height", "width"])
    graph = helper.make_graph([pool], "pooled", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return input_gradient(model, ["x"], "y")


def operators(gradient: GradientGraph) -> Counter[str]:
    return Counter(node.op_type for node in gradient.model.graph.node)


def gradients(gradient: GradientGraph, x: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(gradient.model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run([gradient.gradients["x"]], {"x": x, gradient.cotangent: cotangent})
    return np.asarray(found)


@pytest.mark.parametrize(
    ("size", "windows", "geometry"),
    [
        (8, 4, {"kernel_shape": [2, 2], "strides": [2, 2]}),
        (9, 4, {"kernel_shape": [2, 2], "strides": [2, 2]}),
        (9, 3, {"kernel_shape": [2, 1], "strides": [3, 3], "auto_pad": "VALID"}),
        (8, 4, {"kernel_shape": [2, 2], "strides": [2, 2], "storage_order": 1}),
    ],
)
def test_disjoint_windows_are_unpooled_with_equal_bits(size: int, windows: int, geometry: dict[str, Any]) -> None:
    gradient = pooled(size, **geometry)
    x = random.integers(-2, 3, (2, 3, size, size)).astype(np.float32)  # with ties
    cotangent = random.standard_normal((2, 3, windows, windows)).astype(np.float32)
    expected = gradients(gradient, x, cotangent)
    unpool_disjoint_windows(gradient.model)
    onnx.checker.check_model(gradient.model, full_check=True)

    assert operators(gradient)["MaxUnpool"] == 1
    assert not operators(gradient).keys() & {"ScatterElements", "ConstantOfShape", "Size"}
    np.testing.assert_array_equal(gradients(gradient, x, cotangent), expected)


@pytest.mark.parametrize(
    ("kind", "geometry"),
    [
        (TensorProto.FLOAT, {"kernel_shape": [3, 3], "strides": [2, 2]}),
        (TensorProto.FLOAT, {"kernel_shape": [2, 2]}),
        (TensorProto.FLOAT, {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        (TensorProto.FLOAT, {"kernel_shape": [2, 2], "strides": [2, 2], "dilations": [2, 2]}),
        (TensorProto.FLOAT, {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
        (TensorProto.FLOAT, {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
        (TensorProto.DOUBLE, {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ],
)
def test_other_windows_and_types_stay_as_they_are(kind: int, geometry: dict[str, Any]) -> None:
    gradient = pooled(9, kind, **geometry)
    before = operators(gradient)
    unpool_disjoint_windows(gradient.model)

    assert before["ScatterElements"] == 1
    assert operators(gradient) == before
