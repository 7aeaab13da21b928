"""What stands between a model and its gradient, told all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from onnx import NodeProto

from explainserve.onnx_vjp.registry import Refusal


@dataclass(frozen=True)
class Gap:
    """A node on the path of the gradient that cannot be differentiated."""

    operator: str
    domain: str
    node: str
    reason: str
    remedy: str

    @classmethod
    def at(cls, node: NodeProto, refusal: Refusal) -> Self:
        """The gap of a node that was refused, named after its first output where it has no name."""
        return cls(node.op_type, node.domain, node.name or node.output[0], refusal.reason, refusal.remedy)

    def __str__(self) -> str:
        operator = f"{self.domain}.{self.operator}" if self.domain else self.operator
        return f"{operator} (node '{self.node}'): {self.reason}; {self.remedy}"


class UnsupportedOperators(Exception):
    """The gradient passes through nodes that have none. `gaps` lists every one of them."""

    def __init__(self, gaps: Sequence[Gap]) -> None:
        self.gaps = tuple(gaps)
        super().__init__(f"{len(gaps)} node(s) cannot be differentiated:\n" + "\n".join(f"  {gap}" for gap in gaps))
