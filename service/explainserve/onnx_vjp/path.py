"""Which part of a graph a gradient passes through.

Quantized values carry no gradient, but must not end the path silently, or a model that rounds all of its input would
get zeros: a cast to 8 bits or less is on the path, whatever rounded its operand before, and so is all arithmetic behind
it. The rules of its nodes refuse it then. Integers that only say which element is meant are no such arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onnx import NodeProto

from explainserve.onnx_vjp.graph import FLOATS, Graph, consumed
from explainserve.onnx_vjp.registry import Refused, State, Table, ZeroGradient
from explainserve.onnx_vjp.subgraphs import is_standard


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
    gradient is not zero, and through quantized values.
    """
    search = _Search(graph, table)
    dependent = search.dependent(wrt)
    needed = dependent.intersection(of)
    nodes: list[NodeProto] = []
    for node in reversed(graph.nodes):
        sources = search.operands(node, dependent)
        passes = (sources and not search.is_flat(node)) or search.quantizes(node)
        if passes and needed.intersection(node.output):
            nodes.append(node)
            needed.update(sources)
    return LivePath(tuple(reversed(nodes)), frozenset(needed))


class _Search:
    def __init__(self, graph: Graph, table: Table) -> None:
        self.graph, self.table = graph, table

    def dependent(self, wrt: Sequence[str]) -> set[str]:
        """The tensors that a cotangent for `wrt` passes, and those quantized from what depends on a `wrt` in steps."""
        dependent, stepped = set(wrt), set[str]()
        for node in self.graph.nodes:
            sources, steps = self.operands(node, dependent), stepped.intersection(consumed(node))
            if (sources and not self.is_flat(node)) or (steps and self.quantizes(node)):
                dependent.update(name for name in node.output if name and self._carries(node, sources, name))
            elif sources or steps:
                stepped.update(name for name in node.output if self.graph.dtype(name) in FLOATS)
        return dependent

    def operands(self, node: NodeProto, tensors: set[str]) -> set[str]:
        """Those of `tensors` that a node calculates with: where a float comes out, an integer is a place or a size."""
        read = tensors.intersection(consumed(node))
        if self._is_cast(node) or isinstance(self._state(node), Refused):
            return read
        if not any(self.graph.is_float(name) for name in node.output if name):
            return read
        return {name for name in read if not self.graph.is_integer(name)}

    def quantizes(self, node: NodeProto) -> bool:
        """Whether a node casts floating-point numbers to 8 bits or less."""
        return (
            self._is_cast(node) and self.graph.dtype(node.input[0]) in FLOATS and self.graph.is_narrow(node.output[0])
        )

    def is_flat(self, node: NodeProto) -> bool:
        return isinstance(self._state(node), ZeroGradient)

    def _is_cast(self, node: NodeProto) -> bool:
        return is_standard(node, "Cast") or is_standard(node, "CastLike")

    def _carries(self, node: NodeProto, sources: Iterable[str], name: str) -> bool:
        """Whether an output is as much on the path as the sources are."""
        if isinstance(self._state(node), Refused) or self.graph.is_float(name) or self.graph.is_narrow(name):
            return True
        return self.graph.is_integer(name) and any(self.graph.is_integer(source) for source in sources)

    def _state(self, node: NodeProto) -> State | None:
        return state_in(self.table, self.graph, node)
