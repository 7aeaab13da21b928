"""Affine maps of channels, merged into the linear layer whose output they take.

LRP shares relevance out by the weights of a layer, and those are what the layer and a normalization behind it compute
together (Montavon et al. 2019, section 10.3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from explainserve.onnx_vjp.graph import Graph
from explainserve.onnx_vjp.subgraphs import is_standard

Array = NDArray[Any]


class _Affine(NamedTuple):
    """scale x source + shift, both broadcastable to the source."""

    source: str
    scale: Array
    shift: Array


def merge_affine(graph: Graph, kept: Collection[str]) -> None:
    """Put a layer of merged weights in the place of each BatchNormalization behind a linear layer with stored weights,
    and of each constant that is added, subtracted, multiplied or divided by there.

    The layer itself stays for what else reads it, and outputs that are `kept` stay apart from what is behind them. A
    MatMul of two axes becomes a Gemm.
    """
    nodes = []
    for node in graph.nodes:
        merged = None if set(kept).intersection(node.input) else _merged(graph, node)
        if merged is not None:
            graph.register(merged)
        nodes.append(node if merged is None else merged)
    graph.rewrite(nodes)


def _merged(graph: Graph, node: NodeProto) -> NodeProto | None:
    affine = _affine(graph, node)
    layer = None if affine is None else graph.producers.get(affine.source)
    axis = None if layer is None else _channel_axis(graph, layer)
    if affine is None or layer is None or axis is None:
        return None
    weights, bias = graph.constant(layer.input[1]), _bias(graph, layer)
    if weights is None or bias is None:
        return None
    count, trailing = weights.shape[axis], _trailing(graph, affine.source)
    vectors = [_vector(affine.scale, trailing, count), _vector(affine.shift, trailing, count), _vector(bias, 0, count)]
    if any(vector is None for vector in vectors):
        return None
    scale, shift, offset = (np.broadcast_to(vector, count) for vector in vectors if vector is not None)
    along = [-1 if index == axis else 1 for index in range(weights.ndim)]
    return _layer(graph, node, layer, weights * scale.reshape(along), offset * scale + shift)


def _layer(graph: Graph, node: NodeProto, layer: NodeProto, weights: Array, bias: Array) -> NodeProto:
    """`layer` with other weights, in the place of `node`."""
    own, kind = f"{node.output[0]}/merged", helper.tensor_dtype_to_np_dtype(graph.dtype(layer.input[1]))
    merged = NodeProto()
    merged.CopyFrom(layer)
    merged.op_type = "Gemm" if layer.op_type == "MatMul" else layer.op_type
    parameters = [graph.add_constant(np.ascontiguousarray(value, kind), own) for value in (weights, bias)]
    merged.input[:] = [layer.input[0], *parameters]
    merged.output[:] = node.output[:1]
    merged.name = graph.fresh(own)
    return merged


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
    matrices = is_standard(layer, "MatMul") and all(len(graph.shape(name) or ()) == 2 for name in layer.input)
    return 1 if matrices else None


def _bias(graph: Graph, layer: NodeProto) -> Array | None:
    """A layer's bias, zero where it has none; None where it is not stored."""
    return graph.constant(layer.input[2]) if len(layer.input) > 2 and layer.input[2] else np.zeros(1)


def _trailing(graph: Graph, source: str) -> int:
    """The number of axes behind that of the channels, which is the second."""
    return max(len(graph.shape(source) or ()) - 2, 0)


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
    columns = [value.reshape(-1, *[1] * _trailing(graph, node.input[0])).astype(np.float64) for value in stored]
    scale, bias, mean, variance = columns
    slope = scale / np.sqrt(variance + attributes.get("epsilon", 1e-5))
    return _Affine(node.input[0], slope, bias - mean * slope)
