"""The softmax or sigmoid in which an output of an exported graph ends, and what stands before it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch.fx import Graph, Node

from explainserve.backends.aten import arguments, operator, tensor_of
from explainserve.signature import Activation, OutputKind, OutputSpec

_ACTIVATIONS: Mapping[str, Activation] = {
    **dict.fromkeys(("softmax", "_softmax"), Activation.SOFTMAX),
    "sigmoid": Activation.SIGMOID,
}
_SAME_AXES: Collection[str] = frozenset({"alias", "clone", "contiguous", "to", "_to_copy"})
_OTHER_AXES: Collection[str] = frozenset(
    {"flatten", "permute", "reshape", "squeeze", "transpose", "unsqueeze", "view", "_unsafe_view"}
)
"""Operators that keep every number of their first argument, as far as a floating-point type holds it."""


@dataclass(frozen=True, eq=False)
class FinalActivation:
    """The last operator of an output that changes its numbers, where that is a softmax or sigmoid.

    Attributes:
        node: it.
        behind: what copies, casts or rearranges its numbers, in order, the output last.
    """

    node: Node
    behind: tuple[Node, ...]

    @property
    def source(self) -> Node:
        """The tensor that it is computed from."""
        return self.node.all_input_nodes[0]

    @property
    def results(self) -> tuple[Node, ...]:
        """The tensors that hold the output's numbers, the output last."""
        return (self.node, *self.behind)

    def runs_over(self, class_axis: int, rank: int) -> bool:
        """Whether the probabilities of an output of that rank are of its classes, as those of a sigmoid always are."""
        if _ACTIVATIONS[operator(self.node)] is Activation.SIGMOID:
            return True
        same = all(operator(node) in _SAME_AXES for node in self.behind)
        return same and rank > 0 and arguments(self.node)["dim"] % rank == class_axis

    def left_out(self, graph: Graph) -> Node:
        """What the output would be without it: its source, or copies on that of what is behind, added to the graph."""
        copies = {self.node: self.source}
        with graph.inserting_before(graph.output_node()):
            for node in self.behind:
                copies[node] = graph.node_copy(node, lambda read: copies.get(read, read))
        return copies[self.results[-1]]


def final_activation(output: Node) -> FinalActivation | None:
    """That of an output, or None where it ends in another operator."""
    behind: list[Node] = []
    node = output
    while operator(node) in {*_SAME_AXES, *_OTHER_AXES} and _is_floating(node):
        behind.insert(0, node)
        node = node.all_input_nodes[0]
    return FinalActivation(node, tuple(behind)) if operator(node) in _ACTIVATIONS and _is_floating(node) else None


def with_kind(spec: OutputSpec, output: Node, class_axis: int) -> OutputSpec:
    """An output with what its numbers are, by the operator in which it ends."""
    found = final_activation(output)
    if found is None or not found.runs_over(class_axis, len(spec.axes)):
        return spec
    activation = _ACTIVATIONS[operator(found.node)]
    return replace(spec, kind=OutputKind.PROBABILITIES, activation=activation, pre_activation=found.source.name)


def _is_floating(node: Node) -> bool:
    value = tensor_of(node)
    return value is not None and value.is_floating_point()
