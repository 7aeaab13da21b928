"""Which part of a graph a gradient passes through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import NodeProto

from explainserve.onnx_vjp.graph import Graph, consumed
from explainserve.onnx_vjp.registry import Refused, State, Table, ZeroGradient


@dataclass(frozen=True)
class LivePath:
    """The nodes between `wrt` and `of` in topological order, and the tensors that carry a cotangent."""

    nodes: tuple[NodeProto, ...]
    tensors: frozenset[str]


def state_in(table: Table, graph: Graph, node: NodeProto) -> State | None:
    """The state of a node's operator in the operator set that the graph imports, or None where it is not registered."""
    return table.lookup(node.domain, node.op_type, graph.version(node))


def live_path(graph: Graph, wrt: Sequence[str], of: Sequence[str], table: Table) -> LivePath:
    """Everything that depends on a `wrt` and on which an `of` depends, through float tensors and operators whose
    gradient is not zero.
    """
    dependent = set(wrt)
    for node in graph.nodes:
        if dependent.intersection(consumed(node)) and not _is_flat(graph, node, table):
            # Quantized values must not end the path silently: what is refused carries it on.
            through = isinstance(state_in(table, graph, node), Refused)
            dependent.update(name for name in node.output if name and (through or _carries(graph, name)))
    needed = dependent.intersection(of)
    nodes: list[NodeProto] = []
    for node in reversed(graph.nodes):
        sources = dependent.intersection(consumed(node))
        if needed.intersection(node.output) and sources and not _is_flat(graph, node, table):
            nodes.append(node)
            needed.update(sources)
    return LivePath(tuple(reversed(nodes)), frozenset(needed))


def _carries(graph: Graph, name: str) -> bool:
    return graph.is_float(name) or graph.is_narrow_float(name)


def _is_flat(graph: Graph, node: NodeProto, table: Table) -> bool:
    return isinstance(state_in(table, graph, node), ZeroGradient)
