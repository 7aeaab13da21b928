"""Shapes that ONNX's inference loses, found by computing.

Inference follows the integers that shapes are made of through a few operators only. Where every input has a size in
numbers, those integers can simply be computed, and the lost shapes inferred from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence, Set

import numpy as np
from onnx import GraphProto, NodeProto, TypeProto, numpy_helper

from explainserve.onnx_vjp.evaluation import measured, measures

Values = dict[str, np.ndarray]
Types = dict[str, TypeProto]
Infer = Callable[[NodeProto, Mapping[str, np.ndarray]], Mapping[str, TypeProto]]
Evaluate = Callable[[NodeProto, Sequence[np.ndarray | None]], list[np.ndarray]]

# What is longer is no shape.
_LONGEST = 64


def complete(graph: GraphProto, types: Types, infer: Infer, evaluate: Evaluate, unknown: Set[str]) -> None:
    """Add to `types` what `infer` finds of each node whose outputs are not known, given the values of its inputs, less
    the outputs of `unknown`.
    """
    lost = [node for node in graph.node if not _is_known(node, types) and unknown.isdisjoint(node.output)]
    needed = _sources(graph.node, {name for node in lost for name in node.input if name})
    stored = (tensor for tensor in graph.initializer if tensor.name in needed and _is_small(tensor.dims))
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in stored}
    for node in graph.node if lost else ():
        if not _is_known(node, types) and unknown.isdisjoint(node.output):
            found = infer(node, {name: values[name] for name in node.input if name in values})
            types.update((name, kind) for name, kind in found.items() if name and kind.tensor_type.elem_type)
        if needed.intersection(node.output):
            values.update(_computed(node, types, values, evaluate))


def _is_known(node: NodeProto, types: Types) -> bool:
    return all(not name or (name in types and _sizes(types[name]) is not None) for name in node.output)


def _sizes(kind: TypeProto) -> tuple[int, ...] | None:
    """The shape of a tensor, or None where a part of it is unknown."""
    dims = kind.tensor_type.shape.dim
    if not kind.tensor_type.HasField("shape") or not all(dim.HasField("dim_value") for dim in dims):
        return None
    return tuple(dim.dim_value for dim in dims)


def _is_small(sizes: Sequence[int]) -> bool:
    return math.prod(sizes) <= _LONGEST


def _sources(nodes: Sequence[NodeProto], names: Collection[str]) -> set[str]:
    """These tensors and every one that they are computed from, back to the shapes of others."""
    needed = set(names)
    for node in reversed(nodes):
        if needed.intersection(node.output) and not measures(node):
            needed.update(name for name in node.input if name)
    return needed


def _computed(node: NodeProto, types: Types, values: Values, evaluate: Evaluate) -> Values:
    """The values of a node's outputs where they are known and small."""
    if not all(name in types and _is_small(_sizes(types[name]) or ()) for name in node.output if name):
        return {}
    try:
        with np.errstate(all="ignore"):
            outputs = _outputs(node, types, values, evaluate)
    except Exception:  # the evaluator lets through whatever numpy raises on values that do not fit
        return {}
    return {name: value for name, value in zip(node.output, outputs, strict=False) if name and _is_small(value.shape)}


def _outputs(node: NodeProto, types: Types, values: Values, evaluate: Evaluate) -> Sequence[np.ndarray]:
    """The outputs of a node on sizes or on values, none where they are not known."""
    if measures(node):
        sizes = [_sizes(types[name]) for name in node.input if name in types]
        return [measured(node, known) for known in sizes if known is not None]
    inputs = [values.get(name) for name in node.input]
    known = all(value is not None for value, name in zip(inputs, node.input, strict=True) if name)
    return evaluate(node, inputs) if known else []
