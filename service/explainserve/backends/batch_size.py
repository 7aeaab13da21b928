"""How many rows a model evaluates fastest together, found by timing micro-batches of random rows at load.

More rows share the cost of a call, until what they need no longer fits into a processor's cache or a device is full.
Where that is differs by a factor of ten between models and between machines, so it is measured, not guessed. Smaller
micro-batches also wait less for each other, so the smallest of those that are about as fast is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from explainserve.backends.contract import LoadedModel
from explainserve.backends.probe import gradient_rows, has_free_axes, output_rows, sample_instances
from explainserve.errors import EvaluationFailed, Unsupported
from explainserve.plan import Rows, Segment

UNMEASURED_ROWS = 16
"""Rows of a micro-batch where none was timed: extents of free axes are known only when a request comes."""
AS_FAST = 1.03
"""Time per row, relative to the fastest, that counts as equally fast."""

_RUNS = 2
_LEAST_SECONDS = 0.01
"""A size is run at least `_RUNS` times, and until it has taken this long: short runs are noisy."""


@dataclass(frozen=True)
class BatchSize:
    """How many rows a micro-batch of a model has at most.

    Attributes:
        rows: at least 1.
        seconds_per_row: of a micro-batch of that size, with gradients where the model has them; None where none was
            timed.
    """

    rows: int
    seconds_per_row: float | None = None


def fastest(
    model: LoadedModel, limit: int, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> BatchSize:
    """Times micro-batches of 1, 2, 4... rows until two sizes in a row bring nothing.

    Args:
        limit: most rows.
        seconds: after which no larger size is begun; 0 times nothing. One size may take longer.

    Returns:
        The smallest size that is as fast as the fastest; a size that does not run ends the search.
    """
    if seconds == 0 or has_free_axes(model.signature):
        return BatchSize(min(limit, UNMEASURED_ROWS))
    ends_at = clock() + seconds
    times = dict(_climb(model, limit, lambda: clock() < ends_at, clock))
    if not times:
        return BatchSize(min(limit, UNMEASURED_ROWS))
    rows = min(size for size, time_per_row in times.items() if time_per_row <= AS_FAST * min(times.values()))
    return BatchSize(rows, times[rows])


def _climb(
    model: LoadedModel, limit: int, time_is_left: Callable[[], bool], clock: Callable[[], float]
) -> Iterator[tuple[int, float]]:
    """Sizes with their seconds per row, ascending."""
    row = _random_row(model)
    best, useless = float("inf"), 0
    for size in _sizes(limit):
        try:
            measured = _seconds(model, _repeated(row, size), clock) / size
        except EvaluationFailed:
            return
        yield size, measured
        useless = 0 if measured * AS_FAST < best else useless + 1
        best = min(best, measured)
        if useless == 2 or not time_is_left():
            return


def _sizes(limit: int) -> Iterator[int]:
    """Powers of two below the limit, and the limit."""
    size = 1
    while size < limit:
        yield size
        size *= 2
    yield limit


def _random_row(model: LoadedModel) -> Segment:
    """One row of the first output that has a gradient; forward-only where none has."""
    instances = sample_instances(model.signature, 1)
    differentiable = not (model.signature.undifferentiable_reason or model.gaps)
    for rows in gradient_rows(model.signature, instances) if differentiable else ():
        try:
            model.evaluate(rows)
        except (Unsupported, EvaluationFailed):
            continue
        return rows.segments[0]
    return next(output_rows(model.signature, instances)).segments[0]


def _repeated(row: Segment, count: int) -> Rows:
    segment = replace(row, alphas=np.ones(count), weights=np.ones(count))
    return Rows(row.function, (segment,))


def _seconds(model: LoadedModel, rows: Rows, clock: Callable[[], float]) -> float:
    """Least time of some evaluations, after one that may prepare what the others use."""
    model.evaluate(rows)
    times: list[float] = []
    while len(times) < _RUNS or sum(times) < _LEAST_SECONDS:
        started = clock()
        model.evaluate(rows)
        times.append(clock() - started)
    return min(times)
