"""Lines of requests: who goes first, found without looking at everyone."""

from __future__ import annotations

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


class Line:
    """Requests in the order of their turns, higher priorities first.

    Among equals it holds two orders: of short requests, whose waiting rows fit into one batch, and of long ones.
    """

    def __init__(self) -> None:
        self._short = SortedRequests(_turn)
        self._long = SortedRequests(_turn)

    def __len__(self) -> int:
        return len(self._short) + len(self._long)

    def add(self, request: Request) -> None:
        """Puts one in its place."""
        self._part(request).add(request)

    def remove(self, request: Request) -> None:
        """Takes out one that is in it."""
        self._part(request).remove(request)

    def order(self, *, short_first: bool) -> Iterator[Request]:
        """All of them; `short_first` says which of the two orders comes first among requests of one priority."""
        parts = (self._short, self._long) if short_first else (self._long, self._short)
        return heapq.merge(*parts, key=lambda request: -request.priority)

    def _part(self, request: Request) -> SortedRequests:
        return self._short if request.short else self._long


def deadline(request: Request) -> tuple[float, ...]:
    """Key of requests by the time that they have."""
    return request.expires_at, request.arrival


def _turn(request: Request) -> tuple[float, ...]:
    return -request.priority, request.waits_since, request.expires_at, request.arrival
