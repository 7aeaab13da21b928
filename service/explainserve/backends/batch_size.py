"""How many rows a model evaluates fastest together, found by timing micro-batches of random rows at load.

More rows share the cost of a call, until what they need no longer fits into a processor's cache or a device is full.
Where that is differs by a factor of ten between models and between machines, so it is measured, not guessed. Smaller
micro-batches also wait less for each other, so the smallest of those that are about as fast is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from explainserve.backends.contract import LoadedModel
from explainserve.backends.probe import has_free_axes
from explainserve.backends.timing import random_row, repeated
from explainserve.errors import EvaluationFailed

UNMEASURED_ROWS = 16
"""Rows of a micro-batch where none was timed: extents of free axes are known only when a request comes."""
AS_FAST = 1.03
"""Time per row, relative to the fastest, that counts as equally fast."""

PROMISING = 1.2
"""Time per row, relative to the fastest, up to which a size is timed again: what else the machine does disturbs."""

CALL_SECONDS = 2e-4
"""What a micro-batch costs outside of the model, in the scheduler and between threads; measured on two cores."""

CHEAP_SECONDS = 0.01
"""A micro-batch that is shorter ends no search: on a busy machine two sizes in a row can be slow by chance."""

_ROUNDS = 3
_LEAST_SECONDS = 0.01
"""What is shorter is run more often: it is noisier."""


@dataclass(frozen=True)
class BatchSize:
    """How many rows a micro-batch of a model has at most.

    Attributes:
        rows: at least 1.
        seconds_per_row: of a micro-batch of that size, with gradients where the model has them; None where none was
            timed.
        peak_bytes: memory that such a micro-batch takes at most, of one target; None where it was not measured.
    """

    rows: int
    seconds_per_row: float | None = None
    peak_bytes: int | None = None


def fastest(
    model: LoadedModel, limit: int, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> BatchSize:
    """Times micro-batches of 1, 2, 4... rows until two sizes in a row bring nothing and more of them would take long.

    Args:
        limit: most rows.
        seconds: that this should take at most; 0 times nothing. One row is timed however long it takes.

    Returns:
        The smallest size that is as fast as the fastest; a size that does not run ends the search.
    """
    if seconds == 0 or has_free_axes(model.signature):
        return BatchSize(min(limit, UNMEASURED_ROWS))
    timed = _Timed(model, clock)
    ends_at = clock() + seconds
    timed.climb(limit, ends_at)
    timed.repeat(ends_at)
    found = timed.fastest
    return (
        BatchSize(min(limit, UNMEASURED_ROWS)) if found is None else replace(found, peak_bytes=timed.peak_bytes(found))
    )


class _Timed:
    """Least seconds per row of the sizes that were timed so far."""

    def __init__(self, model: LoadedModel, clock: Callable[[], float]) -> None:
        self._model, self._clock = model, clock
        self._row = random_row(model)
        self._times: dict[int, float] = {}

    @property
    def fastest(self) -> BatchSize | None:
        """The smallest size that is as fast as the fastest; None where not even one row runs."""
        rows = min(self._within(AS_FAST), default=None)
        return None if rows is None else BatchSize(rows, self._times[rows])

    def climb(self, limit: int, ends_at: float) -> None:
        """Times ascending sizes until one does not run, long ones bring nothing, or the time does not suffice."""
        useless = 0
        for size in _sizes(limit):
            best = min(self._times.values(), default=0.0)
            if self._clock() + 2 * size * best > ends_at:
                return
            try:
                self._evaluate(size)  # may prepare what the timed runs use
                self._time(size)
            except EvaluationFailed:
                return
            useless = useless + 1 if self._times[size] * AS_FAST > best > 0 else 0
            if useless == 2 and size * self._times[size] >= CHEAP_SECONDS:
                return

    def repeat(self, ends_at: float) -> None:
        """Times the promising sizes again, in turn."""
        for _ in range(_ROUNDS):
            for size in self._within(PROMISING):
                if self._clock() + size * self._times[size] <= ends_at:
                    self._time(size)

    def peak_bytes(self, size: BatchSize) -> int | None:
        """Memory of a micro-batch of that size."""
        return self._model.peak_bytes(repeated(self._row, size.rows))

    def _within(self, factor: float) -> list[int]:
        costs = {size: seconds + CALL_SECONDS / size for size, seconds in self._times.items()}
        best = min(costs.values(), default=0.0)
        return [size for size, cost in costs.items() if cost <= factor * best]

    def _time(self, size: int) -> None:
        """Keeps the least time of one run, or of as many as fill `_LEAST_SECONDS`."""
        began = self._clock()
        while True:
            started = self._clock()
            self._evaluate(size)
            ended = self._clock()
            self._times[size] = min(self._times.get(size, float("inf")), (ended - started) / size)
            if ended - began >= _LEAST_SECONDS:
                return

    def _evaluate(self, size: int) -> None:
        self._model.evaluate(repeated(self._row, size))


def _sizes(limit: int) -> Iterator[int]:
    """Powers of two below the limit, and the limit."""
    size = 1
    while size < limit:
        yield size
        size *= 2
    yield limit
