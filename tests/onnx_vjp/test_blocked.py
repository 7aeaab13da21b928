"""Sums between convolutions stay in onnxruntime's blocked layout."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from explainserve.onnx_vjp import input_gradient
from explainserve.onnx_vjp.blocked import keep_in_blocks

random = np.random.default_rng(3)


def residual(channels: int, stride: int) -> onnx.ModelProto:
    """A stem and two residual blocks, of which the first may reduce the size."""
    kernels = {
        "stem": random.standard_normal((channels, 3, 3, 3)),
        "enter": random.standard_normal((channels, channels, 1, 1)) / 3,
        "down": random.standard_normal((channels, channels, 3, 3)) / 9,
        "skip": random.standard_normal((channels, channels, 1, 1)) / 3,
        "same": random.standard_normal((channels, channels, 3, 3)) / 9,
    }
    strides, around = [stride, stride], [1, 1, 1, 1]
    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["s"], pads=around),
        helper.make_node("Relu", ["s"], ["r"]),
        helper.make_node("Conv", ["r", "enter"], ["h"]),
        helper.make_node("Relu", ["h"], ["i"]),
        helper.make_node("Conv", ["i", "down"], ["d"], pads=around, strides=strides),
        helper.make_node("Conv", ["r", "skip"], ["k"], strides=strides),
        helper.make_node("Add", ["d", "k"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "same"], ["c"], pads=around),
        helper.make_node("Add", ["b", "c"], ["e"]),
        helper.make_node("Relu", ["e"], ["f"]),
        helper.make_node("GlobalAveragePool", ["f"], ["y"]),
    ]
    weights = [numpy_helper.from_array(kernel.astype(np.float32), name) for name, kernel in kernels.items()]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 16, 16])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", channels, 1, 1])
    graph = helper.make_graph(nodes, "residual", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def optimized(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """How often each operator is in what onnxruntime makes of a model."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], output: str) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (value,) = session.run([output], feeds)
    return np.asarray(value)


@pytest.mark.parametrize(("channels", "stride"), [(16, 1), (16, 2), (12, 2)])
def test_a_model_in_blocks_computes_the_same(channels: int, stride: int) -> None:
    gradient = input_gradient(residual(channels, stride), ["x"], "y")
    x = random.standard_normal((2, 3, 16, 16)).astype(np.float32)
    feeds = {"x": x, gradient.cotangent: random.standard_normal((2, channels, 1, 1)).astype(np.float32)}
    expected = run(gradient.model, feeds, gradient.gradients["x"])
    keep_in_blocks(gradient.model)
    onnx.checker.check_model(gradient.model, full_check=True)
    np.testing.assert_allclose(run(gradient.model, feeds, gradient.gradients["x"]), expected, rtol=1e-4, atol=1e-6)


def test_the_runtime_leaves_blocks_less_often(tmp_path: Path) -> None:
    gradient = input_gradient(residual(16, 2), ["x"], "y")
    before = optimized(gradient.model, tmp_path)
    keep_in_blocks(gradient.model)
    after = optimized(gradient.model, tmp_path)
    if not before["ReorderOutput"]:
        pytest.skip("onnxruntime has no blocked layout on this processor")
    assert after["Add"] < before["Add"]  # fused into convolutions


def test_channels_that_do_not_fill_blocks_stay_as_they_are() -> None:
    gradient = input_gradient(residual(12, 2), ["x"], "y")
    before = gradient.model.SerializeToString(deterministic=True)
    keep_in_blocks(gradient.model)
    assert gradient.model.SerializeToString(deterministic=True) == before
