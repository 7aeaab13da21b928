"""Affine maps of channels, merged into the linear layer whose output they take.

LRP shares relevance out by the weights of a layer, and those are what the layer and a normalization behind it compute
together (Montavon et al. 2019, section 10.3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from explainserve.onnx_vjp.emitter import Emitter
from explainserve.onnx_vjp.graph import Graph
from explainserve.onnx_vjp.subgraphs import is_standard

Array = NDArray[Any]


class _Affine(NamedTuple):
    """scale x source + shift, both broadcastable to the source."""

    source: str
    scale: Array
    shift: Array


class _Layer(NamedTuple):
    """A linear layer with weights and a bias of its own, whose channels run along `axis` of the weights."""

    node: NodeProto
    weights: Array
    bias: Array
    axis: int


def merge_affine(graph: Graph, kept: Collection[str]) -> None:
    """Put a layer of merged weights in the place of each BatchNormalization behind a linear layer with stored weights,
    and of each constant that is added, subtracted, multiplied or divided by there.

    The layer itself stays for what else reads it, and outputs that are `kept` stay apart from what is behind them. A
    MatMul becomes a Gemm, between reshapes where its input has more than two axes.
    """
    merged: dict[str, _Layer] = {}
    for node in graph.nodes:
        layer = None if set(kept).intersection(node.input) else _merged(graph, node, merged)
        if layer is not None:
            merged[node.output[0]] = layer
    nodes = []
    for node in graph.nodes:
        layer = merged.get(node.output[0]) if node.output else None
        nodes += [node] if layer is None else _written(graph, layer, node.output[0])
    graph.rewrite(nodes)


def _merged(graph: Graph, node: NodeProto, before: Mapping[str, _Layer]) -> _Layer | None:
    """The layer that a node and the one in front of it are together, `before` being such layers by their output."""
    affine = _affine(graph, node)
    layer = None if affine is None else before.get(affine.source) or _layer(graph, affine.source)
    if affine is None or layer is None or _adds_axes(graph, affine):
        return None
    count, trailing = layer.weights.shape[layer.axis], _trailing(graph, layer.node)
    vectors = [_vector(affine.scale, trailing, count), _vector(affine.shift, trailing, count)]
    if any(vector is None for vector in vectors):
        return None
    scale, shift = (np.broadcast_to(vector, count) for vector in vectors if vector is not None)
    along = [-1 if index == layer.axis else 1 for index in range(layer.weights.ndim)]
    return layer._replace(weights=layer.weights * scale.reshape(along), bias=layer.bias * scale + shift)


def _layer(graph: Graph, name: str) -> _Layer | None:
    """The layer whose output a tensor is, if it is one to merge into."""
    node = graph.producers.get(name)
    axis = None if node is None else _channel_axis(graph, node)
    if node is None or axis is None:
        return None
    weights, bias = graph.constant(node.input[1]), _bias(graph, node)
    if weights is None or bias is None:
        return None
    vector = _vector(bias, 0, weights.shape[axis])
    return None if vector is None else _Layer(node, weights, np.broadcast_to(vector, weights.shape[axis]), axis)


def _written(graph: Graph, layer: _Layer, output: str) -> list[NodeProto]:
    """The nodes of a merged layer that compute `output`."""
    node, own = layer.node, f"{output}/merged"
    kind = helper.tensor_dtype_to_np_dtype(graph.dtype(node.input[1]))
    parameters = [graph.add_constant(np.ascontiguousarray(value, kind), own) for value in (layer.weights, layer.bias)]
    if node.op_type != "MatMul":
        written = NodeProto()
        written.CopyFrom(node)
        written.input[:] = [node.input[0], *parameters]
        written.output[:], written.name = [output], graph.fresh(own)
        graph.register(written)
        return [written]
    with graph.collecting() as nodes:
        op = Emitter(graph)
        flat = op.rank(node.input[0]) == 2
        rows = node.input[0] if flat else op.Reshape(node.input[0], [-1, len(layer.weights)])
        product = op.Gemm(rows, *parameters)
        value = product if flat else op.reshape_like(product, node.output[0])
        graph.append(helper.make_node("Identity", [value], [output], name=graph.fresh(own)))
    return nodes


def _channel_axis(graph: Graph, layer: NodeProto) -> int | None:
    """The axis of the weights that runs over the layer's channels; None for what is no layer to merge into."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in layer.attribute}
    if is_standard(layer, "Conv"):
        return 0
    if is_standard(layer, "ConvTranspose"):
        return 1 if attributes.get("group", 1) == 1 else None
    if is_standard(layer, "Gemm"):
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        return 1 - attributes.get("transB", 0) if plain else None
    if is_standard(layer, "MatMul"):
        of_rows, matrix = len(graph.shape(layer.input[0]) or ()) > 1, len(graph.shape(layer.input[1]) or ()) == 2
        return 1 if of_rows and matrix else None
    return None


def _bias(graph: Graph, layer: NodeProto) -> Array | None:
    """A layer's bias, zero where it has none; None where it is not stored."""
    return graph.constant(layer.input[2]) if len(layer.input) > 2 and layer.input[2] else np.zeros(1)


def _trailing(graph: Graph, layer: NodeProto) -> int:
    """The number of axes behind that of the channels, which is the second of a convolution, and the last otherwise."""
    return _behind_second(graph, layer.output[0]) if layer.op_type in ("Conv", "ConvTranspose") else 0


def _behind_second(graph: Graph, name: str) -> int:
    """The number of a tensor's axes behind its second."""
    return max(len(graph.shape(name) or ()) - 2, 0)


def _adds_axes(graph: Graph, affine: _Affine) -> bool:
    """Whether the output of an affine map has more axes than its source."""
    shape = graph.shape(affine.source)
    return shape is not None and max(affine.scale.ndim, affine.shift.ndim) > len(shape)


def _vector(value: Array, trailing: int, count: int) -> Array | None:
    """What varies along the axis before the `trailing` last ones only, as a vector over it; None for what does not."""
    position = value.ndim - 1 - trailing
    of_channels = value.size == 1 or (position >= 0 and value.shape[position] == value.size == count)
    return value.reshape(-1) if of_channels else None


def _affine(graph: Graph, node: NodeProto) -> _Affine | None:
    """What a node computes, where that is an affine map with stored coefficients."""
    if is_standard(node, "BatchNormalization"):
        return _normalization(graph, node)
    constants = [graph.constant(name) if name else None for name in node.input]
    stored = [index for index, constant in enumerate(constants) if constant is not None]
    if len(constants) != 2 or len(stored) != 1 or not is_standard(node, node.op_type):
        return None
    (position,) = stored
    coefficients = _COEFFICIENTS.get((node.op_type, position))
    if coefficients is None:
        return None
    with np.errstate(divide="ignore"):  # as the node itself divides
        return _Affine(node.input[1 - position], *map(np.asarray, coefficients(np.asarray(constants[position]))))


# Scale and shift, by the operator and the position of the constant.
_COEFFICIENTS: dict[tuple[str, int], Callable[[Array], tuple[Any, Any]]] = {
    ("Add", 0): lambda value: (1.0, value),
    ("Add", 1): lambda value: (1.0, value),
    ("Sub", 0): lambda value: (-1.0, value),
    ("Sub", 1): lambda value: (1.0, -value),
    ("Mul", 0): lambda value: (value, 0.0),
    ("Mul", 1): lambda value: (value, 0.0),
    ("Div", 1): lambda value: (1.0 / value, 0.0),
}


def _normalization(graph: Graph, node: NodeProto) -> _Affine | None:
    """A BatchNormalization by stored statistics."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    stored = [value for value in map(graph.constant, node.input[1:]) if value is not None]
    if len(stored) < 4 or attributes.get("training_mode", 0):
        return None
    columns = [value.reshape(-1, *[1] * _behind_second(graph, node.input[0])).astype(np.float64) for value in stored]
    scale, bias, mean, variance = columns
    slope = scale / np.sqrt(variance + attributes.get("epsilon", 1e-5))
    return _Affine(node.input[0], slope, bias - mean * slope)
