"""Admission: how much the requests that are being answered may need together, and when there will be room again."""

from __future__ import annotations

from dataclasses import dataclass, field

from explainserve.errors import QueueFull
from explainserve.scheduling.job import Request

SHORTEST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 60.0

_SPEED_SECONDS = 30.0
"""Device time over which its speed is averaged: several models, a few batches of a slow one."""


@dataclass
class _Bound:
    """What may be reserved of one thing."""

    limit: int
    reserved: int = 0

    def excess(self, amount: int) -> int:
        """How much of what is reserved must go before this amount has a place; 0 where it has one."""
        return max(0, self.reserved + amount - self.limit)


@dataclass
class Admission:
    """Admits requests as long as rows and bytes fit. Nothing that was admitted is refused later.

    Attributes:
        max_rows: rows that all admitted requests together may still bring to the device.
        max_bytes: of inputs, baselines and maps that they hold in memory.
    """

    max_rows: int
    max_bytes: int
    _rows: _Bound = field(init=False)
    _bytes: _Bound = field(init=False)
    _speed: _Speed = field(init=False)

    def __post_init__(self) -> None:
        self._rows, self._bytes, self._speed = _Bound(self.max_rows), _Bound(self.max_bytes), _Speed()

    @property
    def reserved_bytes(self) -> int:
        """Memory that admitted requests may hold."""
        return self._bytes.reserved

    def admit(self, request: Request, row_count: int, byte_count: int) -> None:
        """Reserves all that a request may need.

        Raises:
            QueueFull: others may still need too much (QUEUE_FULL).
        """
        for name, bound, amount in (("rows", self._rows, row_count), ("bytes", self._bytes, byte_count)):
            if bound.excess(amount):
                raise QueueFull(
                    "QUEUE_FULL",
                    f"requests that are being answered may still need {bound.reserved} {name}, and {amount} more would "
                    f"exceed {bound.limit}; try again later",
                    self._seconds_until(bound, amount),
                    bound=name,
                    reserved=bound.reserved,
                    needed=amount,
                    limit=bound.limit,
                )
        self._reserve(request, row_count, byte_count)

    def release(self, request: Request) -> None:
        """Gives back what a request holds, when it ends."""
        self._reserve(request, -request.reserved_rows, -request.reserved_bytes)

    def packed(self, request: Request, row_count: int) -> None:
        """Counts rows that went to the device: they need no place any more."""
        self._reserve(request, -min(row_count, request.reserved_rows), 0)

    def put_back(self, request: Request, row_count: int) -> None:
        """Counts rows that go to the device once more; they have a place, even where others took it meanwhile."""
        self._reserve(request, row_count, 0)

    def evaluated(self, row_count: int, seconds: float) -> None:
        """Learns how fast the device is."""
        self._speed.add(row_count, seconds)

    def _reserve(self, request: Request, row_count: int, byte_count: int) -> None:
        request.reserved_rows += row_count
        request.reserved_bytes += byte_count
        self._rows.reserved += row_count
        self._bytes.reserved += byte_count

    def _seconds_until(self, bound: _Bound, amount: int) -> float:
        """Time until there is room, if all that is reserved is needed and goes at one pace."""
        share = bound.excess(amount) / max(bound.reserved, 1)
        seconds = share * self._speed.seconds(self._rows.reserved)
        return min(max(seconds, SHORTEST_RETRY_SECONDS), LONGEST_RETRY_SECONDS)


class _Speed:
    """Rows per second of the device, averaged over its last seconds at work."""

    def __init__(self) -> None:
        self._rows = 0.0
        self._seconds = 0.0

    def add(self, row_count: int, seconds: float) -> None:
        kept = max(0.0, 1.0 - seconds / _SPEED_SECONDS)
        self._rows = kept * self._rows + row_count
        self._seconds = kept * self._seconds + seconds

    def seconds(self, row_count: int) -> float:
        """Time for so many rows; 0 before anything was evaluated."""
        return row_count * self._seconds / self._rows if self._rows else 0.0
