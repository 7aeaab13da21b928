"""Slices that a probe cuts short.

Inference clamps the bounds of a Slice to its axis. Where the axis has a fixed size, as a table of positions does, and a
bound is computed from a dynamic one, the number that stands for the dynamic size mostly lies beyond the axis, and the
result seems to be of a fixed size too. What such a Slice gives is not known.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np
from onnx import GraphProto, NodeProto, TensorShapeProto, TypeProto

from explainserve.onnx_vjp.lost_shapes import Evaluate, Types, Values, values_of
from explainserve.onnx_vjp.registry import canonical_domain

_START, _END, _AXES = 1, 2, 3


def clamped_axes(
    graph: GraphProto, probes: Sequence[Types], evaluate: Evaluate, known: Set[str]
) -> dict[str, list[int]]:
    """The axes of each Slice's output along which a bound differs between the probes and lies beyond the axis.

    Less the outputs of `known`, and those behind another one that is found: what is known of them is wrong as yet.
    """
    stored = {tensor.name for tensor in graph.initializer}
    slices = [node for node in graph.node if _is_computed(node, stored) and node.output[0] not in known]
    if not slices:
        return {}
    names = {node.output[0] for node in slices}
    bounds = {name for node in slices for name in node.input[_START:]}
    values = [values_of(graph, bounds, types, evaluate) for types in probes]
    found: dict[str, list[int]] = {}
    behind: set[str] = set()
    for node in graph.node:
        if behind.intersection(node.input):
            behind.update(node.output)
        elif node.output and node.output[0] in names and (axes := _clamped(node, probes, values)):
            found[node.output[0]] = axes
            behind.update(node.output)
    return found


def with_unknown(kind: TypeProto, axes: Sequence[int]) -> TypeProto:
    """A type with the sizes of these axes unknown."""
    copy = TypeProto()
    copy.CopyFrom(kind)
    for axis in axes:
        copy.tensor_type.shape.dim[axis].Clear()
    return copy


def _is_computed(node: NodeProto, stored: Set[str]) -> bool:
    """Whether a node is a Slice with a bound that is not an initializer."""
    is_slice = node.op_type == "Slice" and canonical_domain(node.domain) == "" and len(node.input) > _END
    return is_slice and any(name not in stored for name in node.input[_START : _END + 1])


def _clamped(node: NodeProto, probes: Sequence[Types], values: Sequence[Values]) -> list[int]:
    shapes = [list(types[node.input[0]].tensor_type.shape.dim) for types in probes if node.input[0] in types]
    read = [name for name in node.input[_START:] if name]
    if len(shapes) < len(probes) or not all(shapes) or not all(name in known for name in read for known in values):
        return []
    bounds = np.array([[known[name] for known in values] for name in node.input[_START : _END + 1]])
    stated = len(node.input) > _AXES and node.input[_AXES]
    axes = values[0][node.input[_AXES]] if stated else np.arange(bounds.shape[-1])
    places = [(place, int(axis) % len(shapes[0])) for place, axis in enumerate(axes)]
    return [
        axis
        for place, axis in places
        if any(_lies_beyond(pair, [shape[axis] for shape in shapes]) for pair in bounds[..., place])
    ]


def _lies_beyond(bounds: Sequence[int], dims: Sequence[TensorShapeProto.Dimension]) -> bool:
    """Whether a bound differs between the probes and is larger than the axis in one."""
    beyond = (dim.HasField("dim_value") and abs(bound) > dim.dim_value for bound, dim in zip(bounds, dims, strict=True))
    return len(set(bounds)) > 1 and any(beyond)
