"""Sequences and optional values: what is read from them is the tensor that was put in, so they vanish before the walk.

Exports of torch put tensors into sequences and read them again at known positions. A position that only the run
tells is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from onnx import GraphProto, TensorProto

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Refusal, composition, refused
from explainserve.onnx_vjp.subgraphs import instance

_UNROLL = "export the model with its lists unrolled, or use a method that needs no gradient"

refused(
    "Optional",
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceErase",
    "SequenceInsert",
    "SequenceMap",
    "SplitToSequence",
    reason="what is read from the sequence or optional value is not known beforehand",
    remedy=_UNROLL,
)


@dataclass(frozen=True)
class _Elements:
    """The tensors of a sequence: `at` emits the one at a position; `count` is None where only the run tells it."""

    count: int | None
    at: Callable[[int], str]


@composition("SequenceAt")
def sequence_at(op: Emitter, node: Node) -> Sequence[str | None]:
    """The tensor at a known position."""
    elements, position = _elements(op, node.inputs[0]), _position(op, node.inputs[1])
    return (elements.at(position if position >= 0 else position + _count(elements)),)


@composition("ConcatFromSequence")
def concat_from_sequence(op: Emitter, node: Node) -> Sequence[str | None]:
    """All tensors, along an axis that they have or along a new one."""
    axis, elements = node.attribute("axis"), _elements(op, node.inputs[0])
    parts = [elements.at(position) for position in range(_count(elements))]
    if node.attribute("new_axis", 0):
        parts = [op.Unsqueeze(part, [axis]) for part in parts]
    return (op.Concat(*parts, axis=axis),)


@composition("OptionalGetElement")
def optional_get_element(op: Emitter, node: Node) -> Sequence[str | None]:
    """The value itself: one that is absent fails when the model runs."""
    producer = op.graph.producers.get(node.inputs[0])
    return (producer.input[0] if producer is not None and producer.op_type == "Optional" else node.inputs[0],)


@composition("OptionalHasElement")
def optional_has_element(op: Emitter, node: Node) -> Sequence[str | None]:
    """Whether there is a value, where the file tells."""
    producer = op.graph.producers.get(node.input(0))
    if node.input(0) and producer is None:
        raise Refusal(f"whether '{node.inputs[0]}' has a value is not known beforehand", _UNROLL)
    is_absent = producer is None or (producer.op_type == "Optional" and not producer.input)
    return (op.array(np.array(not is_absent)),)


@composition("SequenceLength")
def sequence_length(op: Emitter, node: Node) -> Sequence[str | None]:
    """The number of tensors, where it is known."""
    return (op.array(np.array(_count(_elements(op, node.inputs[0])))),)


def _count(elements: _Elements) -> int:
    if elements.count is None:
        raise Refusal("the length of a sequence is not known beforehand", _UNROLL)
    return elements.count


def _position(op: Emitter, position: str) -> int:
    constant = op.constant(position)
    if constant is None:
        raise Refusal("a position in a sequence is computed from the input", _UNROLL)
    return int(constant.item())


# -- what a sequence holds
# -----------------------------------------------------------------------------------------------------------------


def _elements(op: Emitter, sequence: str) -> _Elements:
    """What the sequence began as, with all insertions and erasures applied."""
    edits: list[Node] = []
    node = _producer(op, sequence)
    while node.proto.op_type not in _BEGINNINGS:
        edits.append(node)
        sequence = node.inputs[0]
        node = _producer(op, sequence)
    elements = _BEGINNINGS[node.proto.op_type](op, node, sequence)
    edits = [edit for edit in reversed(edits) if edit.proto.op_type in _EDITS]
    if not edits:
        return elements
    parts: list[Callable[[], str]] = [partial(elements.at, position) for position in range(_count(elements))]
    for edit in edits:
        _EDITS[edit.proto.op_type](op, edit, parts)
    return _Elements(len(parts), lambda position: parts[position]())


def _producer(op: Emitter, sequence: str) -> Node:
    proto = op.graph.producers.get(sequence)
    if proto is None or proto.op_type not in {*_BEGINNINGS, *_EDITS, *_WRAPPERS}:
        raise Refusal(f"sequence '{sequence}' is made while the model runs", _UNROLL)
    return Node(proto, frozenset())


def _constructed(_op: Emitter, node: Node, _sequence: str) -> _Elements:
    return _Elements(len(node.inputs), lambda position: node.inputs[position])


def _split(op: Emitter, node: Node, _sequence: str) -> _Elements:
    """Rows, or chunks of one size or of several."""
    x, split, axis = node.inputs[0], node.input(1), node.attribute("axis", 0)
    if split and op.rank(split) == 1:
        return _chunks(op, x, op.Cast(split, to=TensorProto.INT64), axis)
    step = op.Reshape(op.Cast(split, to=TensorProto.INT64), [1]) if split else op.array(np.ones(1, np.int64))
    is_row = not split and not node.attribute("keepdims", 1)

    def at(position: int) -> str:
        start, end = (op.Mul(step, np.array(count, np.int64)) for count in (position, position + 1))
        part = op.Slice(x, start, end, [axis])
        return op.Squeeze(part, [axis]) if is_row else part

    size, length = (op.constant(value) for value in (op.dim(x, axis), step))
    return _Elements(None if size is None or length is None else -(-int(size.item()) // int(length.item())), at)


def _chunks(op: Emitter, x: str, sizes: str, axis: int) -> _Elements:
    ends = op.CumSum(sizes, np.array(0, np.int64))
    starts = op.Sub(ends, sizes)
    shape = op.shape(sizes)
    count = shape[0] if shape is not None and isinstance(shape[0], int) else None

    def at(position: int) -> str:
        start, end = (op.Slice(places, [position], [position + 1]) for places in (starts, ends))
        return op.Slice(x, start, end, [axis])

    return _Elements(count, at)


def _mapped(op: Emitter, node: Node, sequence: str) -> _Elements:
    """The body once per position: sequences give it their element there, tensors are the same for all."""
    first, *others = (_elements(op, name) if _is_sequence(op, name) else name for name in node.inputs)
    body, output = node.attribute("body"), node.outputs.index(sequence)

    def at(position: int) -> str:
        operands = [entry if isinstance(entry, str) else entry.at(position) for entry in (first, *others)]
        return _instance(op, body, operands)[output]

    if isinstance(first, str):
        raise Refusal(f"sequence '{first}' is made while the model runs", _UNROLL)
    return _Elements(first.count, at)


def _is_sequence(op: Emitter, name: str) -> bool:
    proto = op.graph.producers.get(name)
    return proto is not None and proto.op_type in {*_BEGINNINGS, *_EDITS, *_WRAPPERS} and op.shape(name) is None


def _instance(op: Emitter, body: GraphProto, operands: Sequence[str]) -> list[str]:
    """The nodes of a body on the given tensors."""
    written = instance(body, operands, op.graph.fresh)
    for tensor in written.initializer:
        op.graph.adopt(tensor)
    for part in written.node:
        op.graph.append(part)
    return [value.name for value in written.output]


def _inserted(op: Emitter, node: Node, parts: list[Callable[[], str]]) -> None:
    place = _position(op, node.inputs[2]) if node.input(2) else len(parts)
    parts.insert(place, lambda: node.inputs[1])


def _erased(op: Emitter, node: Node, parts: list[Callable[[], str]]) -> None:
    del parts[_position(op, node.inputs[1]) if node.input(1) else -1]


_BEGINNINGS: dict[str, Callable[[Emitter, Node, str], _Elements]] = {
    "SequenceConstruct": _constructed,
    "SequenceEmpty": _constructed,
    "SequenceMap": _mapped,
    "SplitToSequence": _split,
}
_EDITS: dict[str, Callable[[Emitter, Node, list[Callable[[], str]]], None]] = {
    "SequenceErase": _erased,
    "SequenceInsert": _inserted,
}
_WRAPPERS = ("Identity", "Optional", "OptionalGetElement")
