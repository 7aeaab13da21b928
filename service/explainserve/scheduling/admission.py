"""Admission: how many rows the requests that are answered may need together, and when there will be room again."""

from __future__ import annotations

from dataclasses import dataclass, field

from explainserve.errors import QueueFull
from explainserve.scheduling.job import Request

_SPEED_SECONDS = 30.0
"""Device time over which its speed is averaged: several models, a few batches of a slow one."""


@dataclass
class Admission:
    """Admits requests as long as their rows fit. Nothing that was admitted is refused later.

    Attributes:
        max_rows: rows that all admitted requests together may still bring to the device.
        reserved_rows: rows that they may still bring.
    """

    max_rows: int
    reserved_rows: int = field(init=False, default=0)
    _speed: _Speed = field(init=False)
    _seconds: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._speed = _Speed()

    @property
    def reserved_seconds(self) -> float:
        """Time that the reserved rows take, each as long as its request says."""
        return self._seconds

    def admit(self, request: Request, row_count: int) -> None:
        """Reserves all rows that a request may need.

        Raises:
            QueueFull: others may still need too many (QUEUE_FULL).
        """
        excess = self.reserved_rows + row_count - self.max_rows
        if excess > 0:
            raise QueueFull(
                "QUEUE_FULL",
                f"requests that are being answered may still need {self.reserved_rows} rows, and {row_count} more "
                f"would exceed {self.max_rows}; try again later",
                self._speed.seconds(excess),
                bound="rows",
                reserved=self.reserved_rows,
                needed=row_count,
                limit=self.max_rows,
            )
        self._reserve(request, row_count)

    def release(self, request: Request) -> None:
        """Gives back what a request did not need, when it ends."""
        self._reserve(request, -request.reserved_rows)

    def packed(self, request: Request, row_count: int) -> None:
        """Counts rows that went to the device: they need no place any more."""
        self._reserve(request, -min(row_count, request.reserved_rows))

    def put_back(self, request: Request, row_count: int) -> None:
        """Counts rows that go to the device once more; they have a place, even where others took it meanwhile."""
        self._reserve(request, row_count)

    def evaluated(self, row_count: int, seconds: float) -> None:
        """Learns how fast the device is."""
        self._speed.add(row_count, seconds)

    def _reserve(self, request: Request, row_count: int) -> None:
        request.reserved_rows += row_count
        self.reserved_rows += row_count
        self._seconds += row_count * request.seconds_per_row


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
