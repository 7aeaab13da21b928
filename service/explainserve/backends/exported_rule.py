"""What a gradient rule is on an exported graph: how it copies nodes to a new graph, whose backward pass follows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from explainserve.backends.aten import operator
from explainserve.backends.contract import OperatorGap

Copies = Mapping[Node, Any]
"""What stands in a new graph for the nodes of another one."""


@dataclass(frozen=True, eq=False)
class Stated:
    """What the model's owner states beside the file.

    Attributes:
        bounds: least and greatest value of inputs by name, broadcastable to an instance.
        patterns: of linear layers, by the names of their nodes.
    """

    bounds: Mapping[str, tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=dict)
    patterns: Mapping[str, Tensor] = field(default_factory=dict)


Parameters = tuple[Tensor, Tensor | None]
"""Weights and bias."""


class HeldParameters:
    """Parameters that several nodes of a graph make together: computed when they are first needed, and then held."""

    def __init__(self) -> None:
        self._held: dict[tuple[Node, ...], Parameters] = {}

    def once(self, nodes: tuple[Node, ...], compute: Callable[..., Parameters]) -> Callable[..., Parameters]:
        """`compute`, which is called the first time only."""

        def parameters(*given: Any) -> Parameters:
            if nodes not in self._held:
                self._held[nodes] = compute(*given)
            return self._held[nodes]

        return parameters

    @property
    def byte_count(self) -> int:
        """Of all that is held."""
        return sum(t.nbytes for parameters in list(self._held.values()) for t in parameters if t is not None)


@dataclass(frozen=True, eq=False)
class Route:
    """What a backward pass goes through.

    Attributes:
        module: the graph, and its constants.
        inputs: of the model, by name.
        sources: those inputs on which what is explained depends, or which are explained.
        explained: nodes from whose values gradients are taken.
        varying: nodes between those and the output, both included.
        kept: nodes that stay apart from what is behind them.
        held: parameters of the graph's layers together with what is behind them.
    """

    module: GraphModule
    inputs: Mapping[str, Node]
    sources: frozenset[Node]
    explained: frozenset[Node]
    varying: frozenset[Node]
    kept: frozenset[Node]
    held: HeldParameters

    def passes(self, node: Node) -> bool:
        """Whether the backward pass goes through a node, not only from or to it."""
        return node in self.varying and not self.varying.isdisjoint(node.all_input_nodes)


class NoRule(Exception):
    """Raised by a rule that a node does not have.

    Attributes:
        gap: where, and why.
    """

    def __init__(self, node: Node, reason: str, remedy: str = "use a method of true gradients") -> None:
        name = operator(node) or str(node.target)
        self.gap = OperatorGap(name, node.name, reason, remedy)
        super().__init__(str(self.gap))


Copy = Callable[[Graph, Node, Copies], Any]
"""Copies a node that the route passes to another graph, where its backward pass follows the rule; returns what stands
for it there.

Raises:
    NoRule: it has none.
"""
