"""Lists that a Loop appends to, joined afterwards: what scripted networks write where a scan output would do.

Each such list becomes a scan output of the Loop, so that it needs no sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, ValueInfoProto, helper, numpy_helper

from explainserve.onnx_vjp.graph import consumed
from explainserve.onnx_vjp.subgraphs import is_standard, subgraphs


@dataclass(frozen=True)
class _List:
    """Where a Loop carries a list, what its body appends, and the nodes that join it."""

    position: int
    appending: NodeProto
    joins: Sequence[NodeProto]


def unroll_lists(graph: GraphProto) -> None:
    """Turn lists that start empty, get one tensor per iteration, and are stacked or concatenated, into scan outputs."""
    taken = {name for node in graph.node for name in (*node.input, *node.output)}

    def fresh(hint: str) -> str:
        while hint in taken:
            hint += "_"
        taken.add(hint)
        return hint

    nodes: list[NodeProto] = []
    joined: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for found in reversed(list(_lists(graph, node))):
            stack = fresh(f"{node.output[found.position]}/stacked")
            _write(node, found, stack)
            joined |= {join.output[0]: _joined(join, stack, fresh) for join in found.joins}
        nodes += joined.get(next(iter(node.output), ""), [node])
    if joined:
        del graph.node[:]
        graph.node.extend(nodes)


def _lists(graph: GraphProto, node: NodeProto) -> Iterator[_List]:
    if not is_standard(node, "Loop"):
        return
    (body,) = subgraphs(node)
    empty = {other.output[0] for other in graph.node if is_standard(other, "SequenceEmpty")}
    results = {value.name for value in graph.output}
    for position, (initial, name) in enumerate(zip(node.input[2:], node.output, strict=False)):
        before, after = body.input[2 + position].name, body.output[1 + position].name
        uses = [inner for inner in body.node if before in consumed(inner)]
        joins = [other for other in graph.node if name in consumed(other)]
        if (
            initial in empty
            and name not in results
            and all(is_standard(join, "ConcatFromSequence") for join in joins)
            and [(use.op_type, list(use.output), len(use.input)) for use in uses] == [("SequenceInsert", [after], 2)]
        ):
            yield _List(position, uses[0], joins)


def _integer(node: NodeProto, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)


def _write(loop: NodeProto, found: _List, stack: str) -> None:
    """The Loop with a scan output in place of the list."""
    (body,) = subgraphs(loop)
    appended, written = found.appending.input[1], ValueInfoProto(name=found.appending.output[0])
    written.type.CopyFrom(body.output[1 + found.position].type.sequence_type.elem_type)
    missing = len(body.output) - 1 - len(loop.output)
    loop.output.extend([""] * missing)
    del loop.input[2 + found.position], body.input[2 + found.position]
    del loop.output[found.position], body.output[1 + found.position]
    body.node.remove(found.appending)
    body.node.append(helper.make_node("Identity", [appended], [written.name]))
    body.output.append(written)
    loop.output.append(stack)


def _joined(join: NodeProto, stack: str, fresh: Callable[[str], str]) -> list[NodeProto]:
    """The stack with its first axis moved to where the join has it, as an axis of its own or merged with the one there.

    How many axes there are need not be known: those before and behind the place are merged while it moves.
    """
    result, axis, is_new = join.output[0], _integer(join, "axis"), bool(_integer(join, "new_axis"))
    if axis == 0 and is_new:
        return [helper.make_node("Identity", [stack], [result], name=join.name)]
    nodes: list[NodeProto] = []

    def emit(operator: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [fresh(f"{result}/{operator}")], **attributes))
        return str(nodes[-1].output[0])

    def integers(*values: int) -> str:
        return emit("Constant", value=numpy_helper.from_array(np.array(values, np.int64)))

    end, start = _stretches(axis, is_new)
    lead, rest = emit("Shape", stack, start=1, end=end), emit("Shape", stack, start=start)
    length = emit("Shape", stack, end=1) if is_new else integers(-1)
    if axis:
        count = emit("ReduceProd", emit("Concat", integers(1), lead, axis=0), keepdims=1)
        pieces = emit("Reshape", stack, emit("Concat", integers(0), count, integers(-1), axis=0))
        stack = emit("Transpose", pieces, perm=[1, 0, 2])
    shape = emit("Concat", lead, length, rest, axis=0)
    return [*nodes, helper.make_node("Reshape", [stack, shape], [result], name=join.name)]


def _stretches(axis: int, is_new: bool) -> tuple[int, int]:
    """Where in the shape of the stack the axes before the place end, and where those behind it start."""
    end = axis + int(axis >= 0 or is_new)
    start = end + int(not is_new)
    # Counted from the end, zero is behind the last axis.
    return (end, start) if axis >= 0 else (end or _BEHIND_ALL, start or _BEHIND_ALL)


_BEHIND_ALL = 1 << 31
