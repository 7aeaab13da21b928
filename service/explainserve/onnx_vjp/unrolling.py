"""Loops that carry sequences or optional values, written out iteration by iteration.

No cotangent can be handed back through a sequence. Where the file tells how often such a Loop runs, its iterations are
written one after the other, and the sequences between them vanish as all whose positions are known do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import GraphProto, NodeProto, TypeProto, helper

from explainserve.onnx_vjp.graph import Graph
from explainserve.onnx_vjp.subgraphs import instance, is_standard, subgraphs

# Nodes of all iterations together, and of the graph with them; what is longer stays a Loop.
_LONGEST, _LARGEST = 4096, 16384


def unrolled(graph: Graph, node: NodeProto) -> list[NodeProto] | None:
    """The iterations of a Loop that carries what is no tensor, or None for another node, or where the number of
    iterations is not known beforehand. A Loop with Loops inside stays one: written out, they would multiply.
    """
    if not is_standard(node, "Loop"):
        return None
    (body,) = subgraphs(node)
    count, states = _limit(graph, node, body), list(node.input[2:])
    if count is None or _has_loops(body) or not any(_is_no_tensor(value.type) for value in body.input[2:]):
        return None
    nodes: list[NodeProto] = []
    pieces: list[Sequence[str]] = []
    for step in range(count):
        numbers = [graph.add_constant(np.array(value)) for value in (step, True)]
        iteration = instance(body, [*numbers, *states], graph.fresh)
        for tensor in iteration.initializer:
            graph.adopt(tensor)
        for part in iteration.node:
            graph.register(part)
        on, *results = (value.name for value in iteration.output)
        nodes += iteration.node
        states, written = results[: len(states)], results[len(states) :]
        pieces.append(written)
        condition = graph.constant(on)
        if condition is None:
            return None
        if not condition.all():
            break
    if not pieces and any(node.output[len(states) :]):
        return None  # of no iteration the shape of what it writes is not known
    return [*nodes, *_handed_out(graph, node, states, pieces)]


def _limit(graph: Graph, node: NodeProto, body: GraphProto) -> int | None:
    """How often a Loop runs at most, or None where that is not known or too much to write out."""
    most, on = (graph.constant(name) if name else None for name in node.input[:2])
    if most is None or (node.input[1] and on is None):
        return None
    count = int(most.item()) if on is None or on.all() else 0
    added = count * len(body.node)
    return count if added <= _LONGEST and len(graph.producers) + added <= _LARGEST else None


def _has_loops(graph: GraphProto) -> bool:
    return any(is_standard(node, "Loop") or any(map(_has_loops, subgraphs(node))) for node in graph.node)


def _is_no_tensor(kind: TypeProto) -> bool:
    return kind.HasField("sequence_type") or kind.HasField("optional_type")


def _handed_out(
    graph: Graph, node: NodeProto, states: Sequence[str], pieces: Sequence[Sequence[str]]
) -> list[NodeProto]:
    """The last states, and what every iteration wrote stacked along a new first axis, under the names of the Loop."""
    last = zip(states, node.output, strict=False)
    parts = [helper.make_node("Identity", [value], [name]) for value, name in last if name]
    first = graph.add_constant(np.zeros(1, np.int64))
    for name, *written in zip(node.output[len(states) :], *pieces, strict=False):
        if not name:
            continue
        rows = [graph.fresh(f"{piece}/row") for piece in written]
        parts += [helper.make_node("Unsqueeze", [p, first], [row]) for p, row in zip(written, rows, strict=True)]
        parts.append(helper.make_node("Concat", rows, [name], axis=0))
    for part in parts:
        graph.register(part)
    return parts
