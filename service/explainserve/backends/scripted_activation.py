"""The softmax or sigmoid in which an output of a TorchScript graph ends, and a function that leaves it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from explainserve.signature import Activation, OutputKind, OutputSpec, Signature

_ACTIVATIONS: Mapping[str, Activation] = {
    "aten::softmax": Activation.SOFTMAX,
    "aten::sigmoid": Activation.SIGMOID,
}
_REARRANGES = frozenset(
    f"aten::{name}"
    for name in ("clone", "contiguous", "flatten", "permute", "reshape", "squeeze", "transpose", "unsqueeze", "view")
)
"""Operators that keep every number of their first argument."""

_COLLECTIONS = frozenset({"prim::TupleConstruct", "prim::ListConstruct"})


@dataclass(frozen=True, eq=False)
class FinalActivation:
    """The last operator of an output that changes its numbers, where that is a softmax or sigmoid.

    Attributes:
        node: it; lives as long as its graph is held.
        reader: the only node that reads its value.
        rearranged: whether something behind it rearranges its numbers.
    """

    node: Any
    reader: Any
    rearranged: bool

    @property
    def activation(self) -> Activation:
        """Which it is."""
        return _ACTIVATIONS[self.node.kind()]

    @property
    def source(self) -> Any:
        """The value that it is computed from."""
        return next(iter(self.node.inputs()))

    def runs_over(self, class_axis: int, rank: int) -> bool:
        """Whether the probabilities of an output of that rank are of its classes, as those of a sigmoid always are."""
        if self.activation is Activation.SIGMOID:
            return True
        axis = list(self.node.inputs())[1].toIValue()
        return not self.rearranged and rank > 0 and axis is not None and axis % rank == class_axis

    def leave_out(self) -> None:
        """Lets what reads its value read its source instead."""
        read = [value.node() for value in self.reader.inputs()]
        self.reader.replaceInput(read.index(self.node), self.source)


def with_kinds(signature: Signature, module: torch.jit.ScriptModule) -> Signature:
    """With what the numbers of outputs are, as far as the graph of a module shows it: those that end in a softmax over
    classes or in a sigmoid are probabilities, and no other is taken for more than values."""
    graph: Any = module.inlined_graph
    found = _final_activations(graph)
    if len(found) != len(signature.outputs):
        found = [None] * len(signature.outputs)
    return replace(signature, outputs=tuple(map(_with_kind, signature.outputs, found)))


def without_activations(module: torch.jit.ScriptModule) -> Any:
    """A function that returns what a module does, without the softmax or sigmoid in which an output ends."""
    graph: Any = module.inlined_graph.copy()
    for found in _final_activations(graph):
        if found is not None:
            found.leave_out()
    graph.eraseInput(0)  # the module itself
    return torch._C._create_function_from_graph("without_activations", graph)


def _with_kind(spec: OutputSpec, found: FinalActivation | None) -> OutputSpec:
    spec = replace(spec, kind=OutputKind.VALUES, activation=Activation.NONE)
    if found is None or not found.runs_over(spec.class_axis or 1, len(spec.axes)):
        return spec
    name = found.source.debugName()
    return replace(spec, kind=OutputKind.PROBABILITIES, activation=found.activation, pre_activation=name)


def _final_activations(graph: Any) -> list[FinalActivation | None]:
    """Those of the outputs, in order; none of a graph that reads attributes of its module."""
    if next(iter(graph.inputs())).uses():
        return []
    (returned,) = graph.outputs()
    reader = returned.node() if returned.node().kind() in _COLLECTIONS else graph.return_node()
    return [_final_activation(value, reader) for value in reader.inputs()]


def _final_activation(value: Any, reader: Any) -> FinalActivation | None:
    """None too where something else reads the same numbers."""
    node, rearranged = value.node(), False
    while node.kind() in _REARRANGES and len(value.uses()) == 1:
        value, reader, rearranged = next(iter(node.inputs())), node, True
        node = value.node()
    alone = len(value.uses()) == 1
    return FinalActivation(node, reader, rearranged) if node.kind() in _ACTIVATIONS and alone else None
