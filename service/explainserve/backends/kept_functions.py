"""The functions of a model that were built, by what they are: the usual ones for good, and the latest of the others.

Clients choose layers and options of rules, so there is no end to what they can ask for, and each function takes memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from explainserve.plan import Differentiation

MOST_CHOSEN = 16
"""Functions of layers or of rules with options that are kept; the one whose use is longest ago is built anew."""

F = TypeVar("F")


class KeptFunctions(Generic[F]):
    """Functions of one model. Used by one thread at a time."""

    def __init__(self) -> None:
        self._usual: dict[Differentiation, F] = {}
        self._chosen: OrderedDict[Differentiation, F] = OrderedDict()

    def get(self, function: Differentiation, build: Callable[[Differentiation], F]) -> F:
        """The function, which is built where it is not there."""
        if not _is_chosen(function):
            if function not in self._usual:
                self._usual[function] = build(function)
            return self._usual[function]
        if function not in self._chosen:
            self._chosen[function] = build(function)
        self._chosen.move_to_end(function)
        if len(self._chosen) > MOST_CHOSEN:
            self._chosen.popitem(last=False)
        return self._chosen[function]

    @property
    def all(self) -> list[F]:
        """Those that are there."""
        return [*self._usual.values(), *self._chosen.values()]


def _is_chosen(function: Differentiation) -> bool:
    return bool(function.taps or function.cut or function.rule.options)
