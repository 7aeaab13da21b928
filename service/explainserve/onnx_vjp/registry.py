"""The three states of an operator, and the tables that hold them.

An operator has a gradient rule, a gradient that is zero wherever it exists, or is refused with a reason. Instead of a
rule of its own it can be a composition of operators that have one. An operator that is in no table is expanded when
ONNX defines it as a function, and is a gap otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from explainserve.onnx_vjp.emitter import Emitter, Node
    from explainserve.onnx_vjp.graph import Graph

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


def canonical_domain(domain: str) -> str:
    """The default operator set has two spellings; the empty one is used as key."""
    return "" if domain == "ai.onnx" else domain


class Table(Mapping[Key, State]):
    """States by domain, operator and since_version. Only the registry changes a table once it is made.

    `canonised` rewrites a graph, in place, to the form that the rules are defined on; it is given the tensors that must
    stay on the path too. Where the table carries `relevance`, the walk starts from cotangent times value, and hands
    down shares of it.
    """

    def __init__(
        self,
        states: Mapping[Key, State] = MappingProxyType({}),
        *,
        canonised: Callable[[Graph, Sequence[str]], None] | None = None,
        relevance: bool = False,
    ) -> None:
        self.canonised, self.relevance = canonised, relevance
        self._states: dict[Key, State] = {}
        self._versions: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
        for key, state in states.items():
            self._add(key, state)

    def __getitem__(self, key: Key) -> State:
        return self._states[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

    def lookup(self, domain: str, operator: str, version: int) -> State | None:
        """The state of the newest entry whose since_version is not above `version`, or None where there is none."""
        domain = canonical_domain(domain)
        found = (since for since in self._versions.get((domain, operator), ()) if since <= version)
        newest = max(found, default=None)
        return None if newest is None else self._states[domain, operator, newest]

    def _add(self, key: Key, state: State) -> None:
        domain, operator, since = key
        self._states[key] = state
        self._versions[domain, operator].append(since)


_standard = Table()


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
    _standard._add(key, state)


def standard() -> Table:
    """The true derivative of every registered operator."""
    return _standard


def overridden(table: Table, overrides: Mapping[Key, State]) -> Table:
    """`table` with the states of `overrides` in place of its own."""
    return Table({**table, **overrides})


def state_of(domain: str, operator: str, version: int) -> State | None:
    """The state of an operator of opset `version` under the standard rules, or None where it is not registered."""
    return _standard.lookup(domain, operator, version)
