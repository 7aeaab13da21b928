"""Lines of requests: who goes first, found without looking at everyone."""

from __future__ import annotations

import enum
import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from explainserve.scheduling.job import Request

Key = Callable[[Request], tuple[float, ...]]


class SortedRequests:
    """Requests in the order of a key that tells any two of them apart.

    A request in it keeps its key: whoever changes that takes the request out before and puts it back after.
    """

    def __init__(self, key: Key) -> None:
        self._key = key
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, request: Request) -> None:
        """Puts one in its place."""
        insort(self._requests, request, key=self._key)

    def remove(self, request: Request) -> None:
        """Takes out one that is in it."""
        del self._requests[bisect_left(self._requests, self._key(request), key=self._key)]


class Turn(enum.Enum):
    """Whose turn it is."""

    SHORT = enum.auto()
    LONG = enum.auto()
    LONGEST_WAITING = enum.auto()


class Line:
    """Requests in the order of their turns.

    It holds three orders: those of short requests, whose waiting rows fit into one batch, and of long ones, higher
    priorities first; and that of all by the time that they wait.
    """

    def __init__(self) -> None:
        self._short = SortedRequests(_by_priority)
        self._long = SortedRequests(_by_priority)
        self._all = SortedRequests(_by_wait)

    def __len__(self) -> int:
        return len(self._all)

    def add(self, request: Request) -> None:
        """Puts one in its place."""
        for order in self._orders(request):
            order.add(request)

    def remove(self, request: Request) -> None:
        """Takes out one that is in it."""
        for order in self._orders(request):
            order.remove(request)

    def order(self, turn: Turn) -> Iterator[Request]:
        """All of them. Among requests of one priority the turn says whether short or long ones come first."""
        if turn is Turn.LONGEST_WAITING:
            return iter(self._all)
        parts = (self._short, self._long) if turn is Turn.SHORT else (self._long, self._short)
        return heapq.merge(*parts, key=lambda request: -request.priority)

    def _orders(self, request: Request) -> tuple[SortedRequests, SortedRequests]:
        return self._all, self._short if request.short else self._long


def deadline(request: Request) -> tuple[float, ...]:
    """Key of requests by the time that they have."""
    return request.expires_at, request.arrival


def _by_wait(request: Request) -> tuple[float, ...]:
    return request.waits_since, request.expires_at, request.arrival


def _by_priority(request: Request) -> tuple[float, ...]:
    return -request.priority, *_by_wait(request)
