"""Shapes that depend on integers which ONNX's inference does not follow."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
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


def relative_scores() -> onnx.ModelProto:
    """Scores of every row of x against every other, with a bias that is cut from a wide table: y (rows, rows)."""
    stored = {"table": np.random.default_rng(2).standard_normal((5, 19)).astype(np.float32)}
    stored |= {name: np.array([value], np.int64) for name, value in (("zero", 0), ("axis", 1))}
    nodes = [
        helper.make_node("Shape", ["x"], ["rows"], start=0, end=1),
        helper.make_node("MatMul", ["x", "table"], ["wide"]),
        helper.make_node("Slice", ["wide", "zero", "rows", "axis"], ["bias"]),
        helper.make_node("Transpose", ["x"], ["transposed"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "transposed"], ["scores"]),
        helper.make_node("Add", ["scores", "bias"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "relative_scores",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_a_slice_up_to_a_dynamic_size_is_not_as_long_as_its_axis() -> None:
    shapes = Graph(relative_scores()).shapes
    assert shapes.shape("wide") == ("rows", 19)
    rows, width = shapes.shape("bias") or ()
    assert rows == "rows" and width not in ("rows", 19)
    assert shapes.shape("y") == ("rows", "rows")


def test_a_slice_of_a_slice_is_open_along_both_axes() -> None:
    """A causal mask is cut from a square table, first to its rows, then to its columns."""
    model = relative_scores()
    again = [
        helper.make_node("Slice", ["transposed_bias", "zero", "rows", "axis"], ["square"]),
        helper.make_node("Slice", ["square", "zero", "rows", "zero"], ["corner"]),
        helper.make_node("Slice", ["corner", "zero", "rows", "axis"], ["mask"]),
    ]
    square = numpy_helper.from_array(np.zeros((19, 19), np.float32), "transposed_bias")
    model.graph.initializer.append(square)
    model.graph.node.extend(again)
    shapes = Graph(model).shapes
    size, cut = shapes.shape("square") or ()
    assert size == 19 and cut not in ("rows", 19)
    assert shapes.shape("corner") == shapes.shape("mask") == (cut, cut)


@pytest.mark.parametrize("rows", [3, 19])
def test_a_gradient_passes_a_slice_up_to_a_dynamic_size(rows: int) -> None:
    model = relative_scores()
    gradient = input_gradient(model, ["x"], "y")
    generator = np.random.default_rng(0)
    x, g = (generator.standard_normal((rows, width)).astype(np.float32) for width in (5, rows))
    (dx,) = run(gradient.model, {"x": x, gradient.cotangent: g}, [gradient.gradients["x"]])
    (table,) = (numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "table")
    np.testing.assert_allclose(dx, (g + g.T) @ x + g @ table[:, :rows].T, rtol=1e-4, atol=1e-4)


def test_any_number_of_symbols_stay_symbols() -> None:
    names = [f"x{index}" for index in range(40)]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [name]) for name in names]
    graph = Graph(helper.make_model(helper.make_graph([], "symbols", inputs, []), ir_version=10))
    assert [graph.shape(name) for name in names] == [(name,) for name in names]
