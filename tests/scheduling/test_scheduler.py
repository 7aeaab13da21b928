"""The scheduler, driven by hand with fake time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from explainserve.errors import DeadlineExceeded, EvaluationFailed
from explainserve.scheduling import Job, Request, RowLimit, Scheduler
from scheduling.fake_device import FORWARD, assert_own_rows_exactly_once, drain, evaluate, job, rows_by_job, run


def test_rows_of_different_requests_share_a_batch() -> None:
    scheduler = Scheduler(1000)
    jobs = [job(3), job(2), job(1)]
    for one in jobs:
        scheduler.submit(one, 0.0)

    batch = scheduler.next_batch(0.0)

    assert rows_by_job(batch) == {jobs[0]: 3, jobs[1]: 2, jobs[2]: 1}
    assert run(scheduler, batch) == jobs


def test_a_batch_never_exceeds_the_models_limit() -> None:
    scheduler = Scheduler(1000)
    scheduler.submit(job(20, 5, batch=8), 0.0)

    sizes = []
    while (batch := scheduler.next_batch(0.0)) is not None:
        sizes.append(batch.rows.row_count)
        run(scheduler, batch)

    assert sizes == [8, 8, 8, 1]


@pytest.mark.parametrize(
    "other",
    [{"model": "other"}, {"shape": (3,)}, {"function": FORWARD}, {"scales": (1.0, 2.0)}],
    ids=["model", "shape", "function", "selectors"],
)
def test_rows_that_differ_in_kind_never_share_a_batch(other: dict[str, object]) -> None:
    scheduler = Scheduler(1000)
    scheduler.submit(job(2), 0.0)
    scheduler.submit(job(2, **other), 0.0)  # type: ignore[arg-type]

    first, second = scheduler.next_batch(0.0), scheduler.next_batch(0.0)

    assert len(rows_by_job(first)) == len(rows_by_job(second)) == 1


@pytest.mark.parametrize("kind", [{}, {"model": "other"}, {"shape": (3,)}], ids=["same kind", "model", "shape"])
@pytest.mark.parametrize("long_count", [1, 2, 20])
@pytest.mark.parametrize("long_kinds", ["alike", "different"])
@pytest.mark.parametrize("batches_before", [1, 2, 7])
def test_a_one_row_request_behind_long_ones_is_answered_within_two_batches(
    kind: dict[str, object], long_count: int, long_kinds: str, batches_before: int
) -> None:
    """Whatever the long ones are, and wherever they stand in their turns: one is on the device, two come after."""
    scheduler = Scheduler(1_000_000)
    for index in range(long_count):
        scheduler.submit(job(10_000, model="m" if long_kinds == "alike" else f"m{index}"), 0.0)
    for _ in range(batches_before):
        on_device = scheduler.next_batch(0.0)
    short = job(1, **kind)  # type: ignore[arg-type]
    scheduler.submit(short, 0.0)
    run(scheduler, on_device)

    finished = [done for _ in range(2) for done in run(scheduler, scheduler.next_batch(0.0))]

    assert finished == [short]


def test_equals_take_turns() -> None:
    """Requests whose rows cannot share batches: each has one batch of every round."""
    scheduler = Scheduler(100_000)
    jobs = [job(100, model=f"m{index}") for index in range(5)]
    for one in jobs:
        scheduler.submit(one, 0.0)

    rounds = [[next(iter(rows_by_job(scheduler.next_batch(0.0)))) for _ in jobs] for _ in range(3)]

    assert rounds == [jobs, jobs, jobs]


def test_more_equals_than_rows_of_a_batch_take_turns() -> None:
    scheduler = Scheduler(100_000)
    jobs = [job(50, batch=4) for _ in range(10)]
    for one in jobs:
        scheduler.submit(one, 0.0)

    shares: Counter[Job] = Counter()
    for _ in range(5):  # 20 rows for 10 requests
        shares += rows_by_job(scheduler.next_batch(0.0))

    assert shares == dict.fromkeys(jobs, 2)


def test_short_requests_are_answered_one_after_another() -> None:
    """Not all of them with the last batch; one that does not fit as a whole goes on where it was."""
    scheduler = Scheduler(1000)
    jobs = [job(5) for _ in range(4)]
    for one in jobs:
        scheduler.submit(one, 0.0)

    shares = [rows_by_job(scheduler.next_batch(0.0)) for _ in range(3)]

    assert shares == [{jobs[0]: 5, jobs[1]: 3}, {jobs[1]: 2, jobs[2]: 5, jobs[3]: 1}, {jobs[3]: 4}]


def test_short_requests_together_get_no_more_than_their_shares() -> None:
    scheduler = Scheduler(1000)
    long, first, second = job(100), job(4), job(4)
    for one in (long, first, second):
        scheduler.submit(one, 0.0)

    shares = [rows_by_job(scheduler.next_batch(0.0)) for _ in range(2)]

    assert shares == [{first: 4, second: 2, long: 2}, {second: 2, long: 6}]


def test_short_requests_leave_batches_to_long_ones() -> None:
    scheduler = Scheduler(100_000)
    long = job(1000, model="long")
    scheduler.submit(long, 0.0)

    served: Counter[Job] = Counter()
    for index in range(8 * 3):
        scheduler.submit(job(8, model=f"short {index}"), 0.0)
        served += rows_by_job(scheduler.next_batch(0.0))

    assert served[long] >= 9 * 8


def test_short_requests_are_served_in_the_order_in_which_they_came() -> None:
    """Those that come during one batch are equals, of which the earlier deadline goes first; later ones are not."""
    scheduler = Scheduler(100_000)
    scheduler.submit(job(8, model="first"), 0.0)
    scheduler.next_batch(0.0)
    late, early = (job(1, model=f"by {time}", request=Request(expires_at=time)) for time in (9.0, 8.0))
    scheduler.submit(late, 0.0)
    scheduler.submit(early, 0.0)
    assert rows_by_job(scheduler.next_batch(0.0)) == {early: 1}
    scheduler.submit(job(1, model="after", request=Request(expires_at=1.0)), 0.0)

    assert rows_by_job(scheduler.next_batch(0.0)) == {late: 1}


def test_jobs_of_one_request_take_one_turn() -> None:
    scheduler = Scheduler(1000)
    request = Request()
    many = [job(8, request=request) for _ in range(7)]
    single = job(8)
    for one in (*many, single):
        scheduler.submit(one, 0.0)

    batch = scheduler.next_batch(0.0)

    assert rows_by_job(batch) == {many[0]: 4, single: 4}


def test_priority_goes_first_and_the_earlier_deadline_between_equals() -> None:
    scheduler = Scheduler(1000)
    late, early, urgent = (
        job(8, model="a", request=Request(expires_at=20.0)),
        job(8, model="b", request=Request(expires_at=10.0)),
        job(8, model="c", request=Request(priority=1)),
    )
    for one in (late, early, urgent):
        scheduler.submit(one, 0.0)

    order = [next(iter(rows_by_job(scheduler.next_batch(0.0)))) for _ in range(3)]

    assert order == [urgent, early, late]


def test_higher_priority_fills_the_batch_and_lower_takes_what_it_leaves() -> None:
    scheduler = Scheduler(1000)
    usual, urgent = job(100), job(13, request=Request(priority=1))
    scheduler.submit(usual, 0.0)
    scheduler.submit(urgent, 0.0)

    shares = [rows_by_job(scheduler.next_batch(0.0)) for _ in range(3)]

    assert shares == [{urgent: 8}, {urgent: 5, usual: 3}, {usual: 8}]


@pytest.mark.parametrize("kind", [{}, {"model": "other"}], ids=["same model", "other model"])
def test_a_stream_of_higher_priority_slows_a_lower_one_but_does_not_stop_it(kind: dict[str, object]) -> None:
    scheduler = Scheduler(100_000)
    low = job(1000, request=Request(priority=-10), **kind)  # type: ignore[arg-type]
    scheduler.submit(low, 0.0)

    served: Counter[Job] = Counter()
    for _ in range(8 * 12):
        scheduler.submit(job(20, request=Request(priority=10)), 0.0)
        batch = scheduler.next_batch(0.0)
        assert batch is not None
        served += rows_by_job(batch)
        run(scheduler, batch)

    assert served[low] >= 10, "it has rows in about every eighth batch"
    assert sum(served.values()) - served[low] >= 7 * 8 * 12


def test_what_small_requests_leave_of_their_share_goes_to_the_others() -> None:
    scheduler = Scheduler(1000)
    jobs = [job(rows) for rows in (1, 100, 2, 100)]
    for one in jobs:
        scheduler.submit(one, 0.0)

    shares = rows_by_job(scheduler.next_batch(0.0))

    assert [shares[one] for one in jobs] == [1, 3, 2, 2]


def test_cancelled_rows_are_gone_at_the_next_packing() -> None:
    scheduler = Scheduler(1000)
    gone, kept = job(100), job(4)
    scheduler.submit(gone, 0.0)
    scheduler.submit(kept, 0.0)
    on_device = scheduler.next_batch(0.0)
    assert on_device is not None

    scheduler.cancel(gone)

    finished = run(scheduler, on_device) + drain(scheduler)
    assert finished == [kept]
    assert scheduler.waiting_row_count == 0


def test_expired_jobs_end_with_their_error() -> None:
    scheduler = Scheduler(1000)
    short, long = job(4, request=Request(expires_at=5.0)), job(4, request=Request(expires_at=50.0))
    scheduler.submit(short, 0.0)
    scheduler.submit(long, 0.0)

    assert scheduler.expire(4.9) == []
    assert scheduler.expire(5.0) == [short]
    assert isinstance(short.error, DeadlineExceeded)
    assert drain(scheduler) == [long]


def test_a_failing_batch_ends_exactly_the_jobs_in_it() -> None:
    scheduler = Scheduler(1000)
    bad, good = job(4, model="bad"), job(4, model="good")
    scheduler.submit(bad, 0.0)
    scheduler.submit(good, 0.0)
    batch = scheduler.next_batch(0.0)
    assert batch is not None and batch.model == "bad"

    failed = scheduler.fail(batch, EvaluationFailed("MODEL_RAISED", "boom"))

    assert failed == [bad] and isinstance(bad.error, EvaluationFailed)
    assert drain(scheduler) == [good]


def test_rows_of_several_requests_that_failed_together_are_tried_alone() -> None:
    scheduler = Scheduler(1000)
    bad, good, other = job(3), job(3), job(2)
    for one in (bad, good, other):
        scheduler.submit(one, 0.0)
    scheduler.retry_alone(scheduler.next_batch(0.0))  # type: ignore[arg-type]
    newcomer = job(1)
    scheduler.submit(newcomer, 0.0)

    batches = [scheduler.next_batch(0.0) for _ in range(4)]

    assert sorted(sorted(rows_by_job(batch).values()) for batch in batches) == [[1], [2], [3], [3]]
    assert {next(iter(rows_by_job(batch))) for batch in batches} == {bad, good, other, newcomer}


def test_rows_that_did_not_fit_into_memory_come_back_in_halves() -> None:
    """The limit is the model's: jobs that waited and jobs that come later keep to it."""
    scheduler = Scheduler(1000)
    limit = RowLimit(8)
    first, second = (Job("m", job(rows).plan, Request(), limit) for rows in (12, 4))
    scheduler.submit(first, 0.0)
    scheduler.retry_in_halves(scheduler.next_batch(0.0))  # type: ignore[arg-type]
    scheduler.submit(second, 0.0)

    sizes = []
    while (batch := scheduler.next_batch(0.0)) is not None:
        sizes.append(batch.rows.row_count)
        run(scheduler, batch)

    assert limit.rows == 4
    assert sizes == [4, 4, 4, 4]
    assert_own_rows_exactly_once(first)
    assert_own_rows_exactly_once(second)


def test_cancelled_rows_are_not_tried_again() -> None:
    scheduler = Scheduler(1000)
    gone, kept = job(3), job(3)
    scheduler.submit(gone, 0.0)
    scheduler.submit(kept, 0.0)
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    scheduler.cancel(gone)

    scheduler.retry_alone(batch)

    assert scheduler.waiting_row_count == 3
    assert drain(scheduler) == [kept]


def test_waits_and_device_time_are_counted() -> None:
    scheduler = Scheduler(1000)
    one = job(10)
    scheduler.submit(one, 3.0)
    first = scheduler.next_batch(7.5)
    assert first is not None
    scheduler.complete(first, evaluate(first), 2.0)
    second = scheduler.next_batch(9.0)
    assert second is not None
    scheduler.complete(second, evaluate(second), 0.5)

    assert (one.submitted_at, one.started_at, one.request.compute_seconds) == (3.0, 7.5, 2.5)


def test_forward_outputs_come_back_in_the_order_of_the_rows() -> None:
    scheduler = Scheduler(1000)
    one = job(11, batch=4, function=FORWARD)
    scheduler.submit(one, 0.0)
    batches = []
    while (batch := scheduler.next_batch(0.0)) is not None:
        batches.append(batch)
    for batch in reversed(batches):
        run(scheduler, batch)

    outputs = one.evaluation.segments[0].outputs

    assert outputs is not None
    np.testing.assert_allclose(outputs, np.outer(one.plan.segments[0].alphas, [1, 1]), rtol=1e-6)
