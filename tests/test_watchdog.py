"""When a run has taken too long, with fake time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from closed_form import ClosedForm, served
from explainserve.watchdog import BATCHES, HANGS, INTERRUPTION_SECONDS, Conduct, Watchdog


def conduct(*batch_seconds: float, seconds_per_row: float | None = None) -> Conduct:
    """Of a model with batches of four rows, which took so long."""
    known = Conduct.at_load(replace(served(ClosedForm()), seconds_per_row=seconds_per_row))
    for seconds in batch_seconds:
        known.completed(1, seconds)
    return known


@pytest.mark.parametrize(
    ("known", "limit"),
    [
        (conduct(), 60.0),
        (conduct(0.1), 60.0),
        (conduct(30.0), 30.0 * BATCHES),
        (conduct(seconds_per_row=10.0), 4 * 10.0 * BATCHES),
    ],
    ids=["unknown", "fast", "slow", "slow at load"],
)
def test_a_slow_model_gets_more_time_than_any_other(known: Conduct, limit: float) -> None:
    assert Watchdog(60.0).due_at(known, now=100.0) == pytest.approx(100.0 + limit)


def test_the_usual_time_follows_slowly() -> None:
    """One slow batch, such as the first of a function, does not make the model a slow one."""
    known = conduct(*[1.0] * 50, 100.0)

    assert 1.0 < known.batch_seconds < 12.0


def test_a_run_that_was_asked_to_end_has_little_time() -> None:
    assert Watchdog(60.0).given_up_at(100.0) == 100.0 + INTERRUPTION_SECONDS
    assert Watchdog(0.5).given_up_at(100.0) == 100.5


def test_without_a_watchdog_any_run_may_take_for_ever() -> None:
    assert Watchdog(0).due_at(conduct(30.0), now=100.0) == math.inf


def test_some_hangs_are_forgiven() -> None:
    known = conduct()

    assert [known.hung() for _ in range(HANGS)] == [*[False] * (HANGS - 1), True]
