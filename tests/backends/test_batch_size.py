"""The size of micro-batches that is found fastest, on a model that takes the time it is told to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from closed_form import ClosedForm
from explainserve.backends.batch_size import CALL_SECONDS, UNMEASURED_ROWS, BatchSize, fastest
from explainserve.errors import EvaluationFailed
from explainserve.plan import Rows, SegmentEvaluation
from explainserve.signature import Axis, InputSpec, Signature

SECONDS = 1e6


class Timed(ClosedForm):
    """Advances its clock by what a batch of n rows is said to take."""

    def __init__(self, seconds: Callable[[int], float], most: int = 10**6) -> None:
        super().__init__()
        self.now = 0.0
        self.sizes: list[int] = []
        self._seconds, self._most = seconds, most

    def evaluate(self, rows: Rows) -> tuple[SegmentEvaluation, ...]:
        self.sizes.append(rows.row_count)
        if rows.row_count > self._most:
            raise EvaluationFailed("OUT_OF_MEMORY", "no memory is left")
        self.now += self._seconds(rows.row_count)
        return super().evaluate(rows)

    def fastest(self, limit: int = 64, seconds: float = SECONDS) -> BatchSize:
        return fastest(self, limit, seconds, lambda: self.now)


@pytest.mark.parametrize(
    ("seconds", "rows"),
    [
        (lambda n: 1.0 + 0.001 * n, 64),  # a call costs, rows are free
        (lambda n: 0.1 * n, 1),  # rows cost, calls are free
        (lambda n: CALL_SECONDS / 2 * n, 64),  # but the server's own part of a call is not
        (lambda n: 0.1 * n * (1.0 if n <= 4 else 1.5) + 0.1, 4),  # more rows do not fit into a cache
        (lambda n: 0.1 * n * {2: 1.2, 4: 0.7}.get(n, 1.0), 4),  # one slow size does not end the search
    ],
)
def test_the_fastest_size_is_found(seconds: Callable[[int], float], rows: int) -> None:
    found = Timed(seconds).fastest()

    assert found.rows == rows
    assert found.seconds_per_row == pytest.approx(seconds(rows) / rows)


def test_short_disturbances_do_not_end_the_search() -> None:
    """On a busy machine a transformer got 2 rows for 64 so, and was twenty times slower until the next start."""
    disturbed = {2: 4.0, 4: 8.0}

    assert Timed(lambda n: 1e-3 * disturbed.get(n, 1.0)).fastest().rows == 64


def test_of_equally_fast_sizes_the_smallest_is_taken() -> None:
    assert Timed(lambda n: 0.1 * n + (0.002 if n == 1 else 0.001)).fastest().rows == 1


def test_the_search_ends_where_more_rows_bring_nothing() -> None:
    model = Timed(lambda n: 0.1 * n)
    model.fastest()

    assert max(model.sizes) == 4


def test_the_limit_is_tried_and_never_exceeded() -> None:
    model = Timed(lambda n: 1.0)

    assert model.fastest(limit=12).rows == 12
    assert max(model.sizes) == 12


def test_a_size_that_does_not_run_ends_the_search() -> None:
    model = Timed(lambda n: 1.0, most=8)

    assert model.fastest().rows == 8


def test_no_size_is_begun_that_the_time_does_not_suffice_for() -> None:
    model = Timed(lambda n: 1.0)

    assert model.fastest(seconds=3.0).rows == 1
    assert max(model.sizes) == 1


def test_nothing_is_timed_without_time_or_with_free_extents() -> None:
    model = Timed(lambda n: 1.0)
    assert model.fastest(seconds=0.0) == BatchSize(UNMEASURED_ROWS)
    assert model.fastest(limit=5, seconds=0.0) == BatchSize(5)

    free = InputSpec("x", np.dtype(np.float32), (Axis("batch"), Axis("n", None)), batched=True)
    model.signature = Signature((free,), model.signature.outputs)
    assert model.fastest() == BatchSize(UNMEASURED_ROWS)
    assert not model.sizes


def test_a_model_without_gradients_is_timed_forward() -> None:
    model = Timed(lambda n: 1.0)
    model.gaps = (object(),)  # type: ignore[assignment]

    assert model.fastest(limit=4).rows == 4
    assert model.gradient_rows == 0
