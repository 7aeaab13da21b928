"""Shapes that ONNX's inference loses, found by computing.

Inference follows the integers that shapes are made of through a few operators only. Where every input has a size in
numbers, those integers can simply be computed, and the lost shapes inferred from them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Set

import numpy as np
from onnx import GraphProto, NodeProto, TypeProto, numpy_helper

from explainserve.onnx_vjp.registry import canonical_domain

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
    values = _stored(graph, needed)
    for node in graph.node if lost else ():
        if not _is_known(node, types) and unknown.isdisjoint(node.output):
            found = infer(node, {name: values[name] for name in node.input if name in values})
            types.update((name, kind) for name, kind in found.items() if name and kind.tensor_type.elem_type)
        if needed.intersection(node.output):
            values.update(_computed(node, types, values, evaluate))


def values_of(graph: GraphProto, names: Collection[str], types: Types, evaluate: Evaluate) -> Values:
    """The values of the tensors `names` and of those that they are computed from, as far as types tell."""
    needed = _sources(graph.node, names)
    values = _stored(graph, needed)
    for node in graph.node:
        if needed.intersection(node.output):
            values.update(_computed(node, types, values, evaluate))
    return values


def _stored(graph: GraphProto, needed: Collection[str]) -> Values:
    return {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.name in needed and _is_small(t.dims)}


def _is_known(node: NodeProto, types: Types) -> bool:
    return all(not name or (name in types and _sizes(types[name]) is not None) for name in node.output)


def _sizes(kind: TypeProto) -> tuple[int, ...] | None:
    """The shape of a tensor, or None where a part of it is unknown."""
    dims = kind.tensor_type.shape.dim
    if not kind.tensor_type.HasField("shape") or not all(dim.HasField("dim_value") for dim in dims):
        return None
    return tuple(dim.dim_value for dim in dims)


def _is_small(sizes: Sequence[int]) -> bool:
    return int(np.prod(sizes, dtype=np.int64)) <= _LONGEST


def _sources(nodes: Sequence[NodeProto], names: Collection[str]) -> set[str]:
    """These tensors and every one that they are computed from, back to the shapes of others."""
    needed = set(names)
    for node in reversed(nodes):
        if needed.intersection(node.output) and not _measures(node):
            needed.update(name for name in node.input if name)
    return needed


def _measures(node: NodeProto) -> bool:
    return node.op_type in ("Shape", "Size") and canonical_domain(node.domain) == ""


def _computed(node: NodeProto, types: Types, values: Values, evaluate: Evaluate) -> Values:
    """The values of a node's outputs where they are known and small."""
    inputs = [_measured(types, name) if _measures(node) else values.get(name) for name in node.input]
    small = all(name in types and _is_small(_sizes(types[name]) or ()) for name in node.output if name)
    if not small or any(value is None for value, name in zip(inputs, node.input, strict=True) if name):
        return {}
    try:
        with np.errstate(all="ignore"):
            outputs = evaluate(node, inputs)
    except Exception:  # the evaluator lets through whatever numpy raises on values that do not fit
        return {}
    return {name: value for name, value in zip(node.output, outputs, strict=True) if name and _is_small(value.shape)}


def _measured(types: Types, name: str) -> np.ndarray | None:
    """A tensor of the right shape, which takes no memory: its values are of no interest."""
    sizes = _sizes(types[name]) if name in types else None
    return None if sizes is None else np.broadcast_to(np.int8(0), sizes)
