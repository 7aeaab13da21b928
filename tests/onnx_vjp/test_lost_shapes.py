"""Shapes that depend on integers which ONNX's inference does not follow."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from explainserve.onnx_vjp import input_gradient
from explainserve.onnx_vjp.graph import Graph
from onnx_vjp.vjp_oracle import run


def attention_like(batch: int | str) -> onnx.ModelProto:
    """x is split into heads whose number and size are computed: Mod and Reshape end what inference follows."""
    constants = {"two": [2], "three": [3], "four": [4], "last": [-1], "zero": [0], "axis": [0]}
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Mod", ["last", "three"], ["end"]),  # 2: the first sizes are kept
        helper.make_node("Reshape", ["end", "last"], ["until"]),
        helper.make_node("Slice", ["sizes", "zero", "until", "axis"], ["kept"]),
        helper.make_node("Concat", ["kept", "two", "three"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["heads"]),
        helper.make_node("ReduceMax", ["heads", "last"], ["y"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "attention_like",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_inference_by_itself_loses_the_shape() -> None:
    inferred = onnx.shape_inference.infer_shapes(attention_like("batch"), data_prop=True).graph.output[0]
    assert not inferred.type.tensor_type.HasField("shape")


def test_a_lost_shape_is_computed() -> None:
    assert Graph(attention_like("batch")).shape("y") == ("batch", 4, 2)
    assert Graph(attention_like(5)).shape("y") == (5, 4, 2)


def test_a_gradient_passes_a_lost_shape() -> None:
    gradient = input_gradient(attention_like("batch"), ["x"], "y")
    x = np.random.default_rng(0).permutation(72).reshape(3, 4, 6).astype(np.float32)
    cotangent = np.random.default_rng(1).standard_normal((3, 4, 2)).astype(np.float32)
    (dx,) = run(gradient.model, {"x": x, gradient.cotangent: cotangent}, [gradient.gradients["x"]])
    heads = x.reshape(3, 4, 2, 3)
    expected = np.where(heads == heads.max(-1, keepdims=True), cotangent[..., None], 0).reshape(x.shape)
    np.testing.assert_array_equal(dx, expected)


def test_any_number_of_symbols_stay_symbols() -> None:
    names = [f"x{index}" for index in range(40)]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [name]) for name in names]
    graph = Graph(helper.make_model(helper.make_graph([], "symbols", inputs, []), ir_version=10))
    assert [graph.shape(name) for name in names] == [(name,) for name in names]
