"""The softmax or sigmoid in which an output of a graph ends, and what stands before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import NodeProto, TensorProto, helper

from explainserve.onnx_vjp.opset import SINGLE_AXIS_SOFTMAX, version_of
from explainserve.onnx_vjp.subgraphs import is_standard

_ACTIVATIONS = ("Softmax", "Sigmoid")
_FLOATS = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE})

_REARRANGES: Mapping[str, Callable[[dict[str, Any]], bool]] = {
    **dict.fromkeys(("Identity", "Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"), lambda attributes: True),
    "Cast": lambda attributes: attributes["to"] in _FLOATS,
}
"""Operators that keep every number of their first input, as far as its type holds it, and whether a node does."""


@dataclass(frozen=True, eq=False)
class FinalActivation:
    """The last operator of an output that changes its numbers, where that is a Softmax or Sigmoid.

    Attributes:
        node: it.
        behind: what renames, casts or rearranges its numbers, in order, the output last.
        version: operator set of the graph.
    """

    node: NodeProto
    behind: tuple[NodeProto, ...]
    version: int

    @property
    def operator(self) -> str:
        """ "Softmax" or "Sigmoid"."""
        return self.node.op_type

    @property
    def source(self) -> str:
        """The tensor that it is computed from."""
        return self.node.input[0]

    @property
    def results(self) -> tuple[str, ...]:
        """The tensors that hold the output's numbers, the output last."""
        return tuple(node.output[0] for node in (self.node, *self.behind))

    def axis(self, rank: int) -> int | None:
        """Of an output of that rank the axis over which the Softmax runs, or the first of them; None where something
        behind it gives axes another extent."""
        axis = attributes_of(self.node).get("axis", -1 if self.version >= SINGLE_AXIS_SOFTMAX else 1) % rank
        for node in self.behind:
            if node.op_type == "Transpose":
                axis = list(attributes_of(node).get("perm", reversed(range(rank)))).index(axis)
            elif node.op_type not in ("Identity", "Cast"):
                return None
        return int(axis)


def final_activation(model: onnx.ModelProto, output: str) -> FinalActivation | None:
    """That of an output, or None where it ends in another operator."""
    producers = {name: node for node in model.graph.node for name in node.output}
    behind: list[NodeProto] = []
    node = producers.get(output)
    while node is not None and _rearranges(node):
        behind.insert(0, node)
        node = producers.get(node.input[0])
    if node is None or not any(is_standard(node, operator) for operator in _ACTIVATIONS):
        return None
    return FinalActivation(node, tuple(behind), version_of(model) or 1)


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Attributes by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _rearranges(node: NodeProto) -> bool:
    return any(is_standard(node, own) and keeps(attributes_of(node)) for own, keeps in _REARRANGES.items())
