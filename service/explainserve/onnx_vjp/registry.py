"""The three states of an operator, and the tables that hold them.

An operator has a gradient rule, a gradient that is zero wherever it exists, or is refused with a reason. Instead of a
rule of its own it can be a composition of operators that have one. An operator that is in no table is expanded when
ONNX defines it as a function, and is a gap otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from explainserve.onnx_vjp.emitter import Emitter, Node

Gradients = Sequence["str | None"]
Formula = Callable[["Emitter", "Node", Any], Gradients]


@dataclass(frozen=True)
class Rule:
    """A vector-Jacobian product as a formula `(op, node, cotangent) -> one value or None per input`.

    `broadcasts`: the returned values have the broadcast shape, and the walk sums them down to each input's own shape.
    `every_output`: the formula receives a list with one cotangent (or None) per output, instead of the first output's.
    `compares`: the formula reads a second forward pass, at the baseline, through `Node.twin`.
    """

    formula: Formula
    broadcasts: bool = False
    every_output: bool = False
    compares: bool = False


@dataclass(frozen=True)
class Composition:
    """An operator written in others, which take its place before the walk.

    `formula(op, node)` emits them and returns one value, or None where it computes none, per output of the node.
    `everywhere`: the values are laid out otherwise than the operator's own, so that it is replaced beside the path too.
    """

    formula: Callable[[Emitter, Node], Sequence[str | None]]
    everywhere: bool = False


@dataclass(frozen=True)
class ZeroGradient:
    """The derivative is zero wherever it exists, so nothing flows through."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """No gradient is offered, and why."""

    reason: str
    remedy: str


class Refusal(Exception):
    """Raised by a formula that cannot differentiate this particular node (its attributes, or what is unknown about
    its shapes).
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


State = Rule | Composition | ZeroGradient | Refused
Key = tuple[str, str, int]
Table = Mapping[Key, State]

_standard: dict[Key, State] = {}


def canonical_domain(domain: str) -> str:
    """The default operator set has two spellings; the empty one is used as key."""
    return "" if domain == "ai.onnx" else domain


def rule(
    *operators: str, domain: str = "", since: int = 1, broadcasts: bool = False, every_output: bool = False
) -> Callable[[Formula], Formula]:
    """Register the decorated formula as the gradient of the operators, from opset version `since` on."""

    def register(formula: Formula) -> Formula:
        for operator in operators:
            _register((domain, operator, since), Rule(formula, broadcasts, every_output))
        return formula

    return register


def composition(
    *operators: str, domain: str = "", since: int = 1, everywhere: bool = False
) -> Callable[[Callable[[Emitter, Node], Sequence[str | None]]], Callable[[Emitter, Node], Sequence[str | None]]]:
    """Register the decorated formula as what the operators are made of, from opset version `since` on."""

    def register(formula: Callable[[Emitter, Node], Sequence[str | None]]) -> Any:
        for operator in operators:
            _register((domain, operator, since), Composition(formula, everywhere))
        return formula

    return register


def zero_gradient(*operators: str, reason: str, domain: str = "", since: int = 1) -> None:
    """Register operators through which nothing flows."""
    for operator in operators:
        _register((domain, operator, since), ZeroGradient(reason))


def refused(*operators: str, reason: str, remedy: str, domain: str = "", since: int = 1) -> None:
    """Register operators that are never differentiated."""
    for operator in operators:
        _register((domain, operator, since), Refused(reason, remedy))


def _register(key: Key, state: State) -> None:
    if key in _standard:
        raise ValueError(f"operator {key} is registered twice")
    _standard[key] = state


def standard() -> Table:
    """The true derivative of every registered operator."""
    return _standard


def overridden(table: Table, overrides: Table) -> Table:
    """`table` with the states of `overrides` in place of its own."""
    return {**table, **overrides}


def lookup(table: Table, domain: str, operator: str, version: int) -> State | None:
    """The state of the newest entry whose since_version is not above `version`, or None where there is none."""
    versions = [since for since in _versions(table, canonical_domain(domain), operator) if since <= version]
    return table[canonical_domain(domain), operator, max(versions)] if versions else None


def state_of(domain: str, operator: str, version: int) -> State | None:
    """The state of an operator of opset `version` under the standard rules, or None where it is not registered."""
    return lookup(_standard, domain, operator, version)


def _versions(table: Table, domain: str, operator: str) -> Iterator[int]:
    # Operators have at most a handful of versions, so probing the known opset range beats an index that tables
    # would have to keep.
    return (since for since in range(1, MAX_OPSET + 1) if (domain, operator, since) in table)


MAX_OPSET = 64
