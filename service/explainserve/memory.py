"""The host's memory that all requests together may take, and when there will be room again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from explainserve.errors import QueueFull
from explainserve.metrics import Metrics

UNLIMITED = sys.maxsize

_KEPT = 0.9
"""Share of the usual time that stays when a further reservation ends."""


class Memory:
    """Reserves memory, as much as there is; used by one thread.

    Args:
        limit: bytes of all reservations together.
        metrics: instruments to feed, where there are any.
        clock: in seconds.
    """

    def __init__(
        self,
        limit: int = UNLIMITED,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit = limit
        self._metrics = metrics
        self._clock = clock
        self._reserved = 0
        self._usual_seconds = 0.0

    @contextmanager
    def reserved(self, byte_count: int) -> Iterator[None]:
        """Reserves so many bytes as long as the context lasts.

        Raises:
            QueueFull: others have reserved too much (QUEUE_FULL).
        """
        self._check(byte_count)
        began = self._clock()
        self._change(byte_count)
        try:
            yield
        finally:
            self._change(-byte_count)
            self._learn(self._clock() - began)

    def _check(self, byte_count: int) -> None:
        excess = self._reserved + byte_count - self.limit
        if excess > 0:
            raise QueueFull(
                "QUEUE_FULL",
                f"requests that are being answered may take {self._reserved} bytes, and {byte_count} more would exceed "
                f"{self.limit}; try again later",
                self._usual_seconds * excess / max(self._reserved, 1),  # if all that is reserved goes at one pace
                bound="bytes",
                reserved=self._reserved,
                needed=byte_count,
                limit=self.limit,
            )

    def _change(self, byte_count: int) -> None:
        self._reserved += byte_count
        if self._metrics is not None:
            self._metrics.reserved_bytes.set(self._reserved)

    def _learn(self, seconds: float) -> None:
        kept = _KEPT if self._usual_seconds else 0.0
        self._usual_seconds = kept * self._usual_seconds + (1 - kept) * seconds
