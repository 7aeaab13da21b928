"""The same model with its floating-point tensors in another type."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper

FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
# Attributes that name an element type.
TYPES = ("to", "dtype", "stash_type", "softmax_precision", "softmax_precision_type", "output_datatype")


def in_type(model: onnx.ModelProto, target: int) -> onnx.ModelProto:
    """A copy of `model` in which every tensor and attribute of a floating-point type of 16 bits or more has the type
    `target`.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _retype_graph(copy.graph, target)
    for node in (node for function in copy.functions for node in function.node):
        _retype_node(node, target)
    return copy


def _retype_graph(graph: GraphProto, target: int) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        _retype(value.type, target)
    for tensor in graph.initializer:
        _convert(tensor, target)
    for node in graph.node:
        _retype_node(node, target)


def _retype(kind: TypeProto, target: int) -> None:
    """Tensors, sequences of tensors, and what is optional."""
    if kind.HasField("sequence_type"):
        _retype(kind.sequence_type.elem_type, target)
    elif kind.HasField("optional_type"):
        _retype(kind.optional_type.elem_type, target)
    elif kind.tensor_type.elem_type in FLOATS:
        kind.tensor_type.elem_type = target


def _retype_node(node: NodeProto, target: int) -> None:
    if node.op_type == "GroupNormalization" and not any(a.name == "stash_type" for a in node.attribute):
        node.attribute.append(helper.make_attribute("stash_type", target))
    if node.op_type == "ConstantOfShape" and not node.attribute:
        node.attribute.append(helper.make_attribute("value", helper.make_tensor("zero", target, [1], [0.0])))
    for attribute in node.attribute:
        if attribute.name in TYPES and attribute.i in FLOATS:
            attribute.i = target
        elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            attribute.CopyFrom(_as_tensor(attribute))
        if attribute.type == AttributeProto.TENSOR:
            _convert(attribute.t, target)
        elif attribute.type == AttributeProto.TYPE_PROTO:
            _retype(attribute.tp, target)
        for graph in subgraphs(attribute):
            _retype_graph(graph, target)


def _as_tensor(attribute: AttributeProto) -> AttributeProto:
    value = np.array(helper.get_attribute_value(attribute), np.float32)
    return helper.make_attribute("value", numpy_helper.from_array(value))


def subgraphs(attribute: AttributeProto) -> Iterator[GraphProto]:
    """The graphs that an attribute holds."""
    if attribute.type == AttributeProto.GRAPH:
        yield attribute.g
    yield from attribute.graphs


def _convert(tensor: TensorProto, target: int) -> None:
    if tensor.data_type in FLOATS and tensor.data_type != target:
        value = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(target))
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
