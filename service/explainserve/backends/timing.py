"""How long a loaded model takes, by evaluating random rows: whatever is chosen at load is measured like this."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import numpy as np

from explainserve.backends.contract import LoadedModel
from explainserve.backends.probe import gradient_rows, output_rows, sample_instances
from explainserve.errors import EvaluationFailed, Unsupported
from explainserve.plan import Rows, Segment

_RUNS = 2
_LEAST_SECONDS = 0.01
"""An evaluation is run at least `_RUNS` times, and until it has taken this long: short runs are noisy."""

_ROUNDS = 5
_COMPARED_SECONDS = 0.1
"""Two models are run in turn at least `_ROUNDS` times, and until the rounds have taken this long."""


def random_row(model: LoadedModel) -> Segment:
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


def repeated(row: Segment, count: int) -> Rows:
    """A micro-batch of the same row, `count` times."""
    segment = replace(row, alphas=np.ones(count), weights=np.ones(count))
    return Rows(row.function, (segment,))


def least_seconds(model: LoadedModel, rows: Rows, clock: Callable[[], float] = time.perf_counter) -> float:
    """Least time of some evaluations, after one that may prepare what the others use."""
    model.evaluate(rows)
    times: list[float] = []
    while len(times) < _RUNS or sum(times) < _LEAST_SECONDS:
        times.append(_seconds(model, rows, clock))
    return min(times)


def is_faster(
    model: LoadedModel, other: LoadedModel, rows: Rows, clock: Callable[[], float] = time.perf_counter
) -> bool:
    """Whether a model evaluates a micro-batch faster than another one by more than its runs differ: half of them take
    less than the fastest of the other."""
    rounds: list[tuple[float, float]] = []
    for each in (model, other):
        each.evaluate(rows)
    while len(rounds) < _ROUNDS or sum(map(sum, rounds)) < _COMPARED_SECONDS:
        rounds.append((_seconds(model, rows, clock), _seconds(other, rows, clock)))
    return median(own for own, _ in rounds) < min(others for _, others in rounds)


def _seconds(model: LoadedModel, rows: Rows, clock: Callable[[], float]) -> float:
    started = clock()
    model.evaluate(rows)
    return clock() - started
