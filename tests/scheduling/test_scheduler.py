"""The scheduler, driven by hand with fake time."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from explainserve.errors import DeadlineExceeded, EvaluationFailed, LimitExceeded
from explainserve.plan import Differentiation, Plan, Segment, SegmentEvaluation, Selector
from explainserve.scheduling import Batch, Job, Request, Scheduler
from explainserve.signature import ScoreHead

GRADIENT = Differentiation("y", ScoreHead.IDENTITY, ("x",))
FORWARD = Differentiation("y", ScoreHead.IDENTITY)
SELECTOR = Selector(np.array([0]), np.ones(1, np.float32))


def segment(
    rows: int, value: float = 1.0, shape: tuple[int, ...] = (2,), function: Differentiation = GRADIENT
) -> Segment:
    point = {"x": np.full(shape, value, np.float32)}
    weights = np.ones(rows) if function.wrt else np.zeros(rows)
    selector = SELECTOR if function.wrt else None
    return Segment(point, point, {}, function, np.arange(1, rows + 1) / rows, weights, selector)


def job(*rows: int, model: str = "m", request: Request | None = None, batch: int = 8, **kwargs: object) -> Job:
    segments = tuple(segment(count, **kwargs) for count in rows)  # type: ignore[arg-type]
    return Job(model, Plan(segments), request or Request(), batch)


def evaluate(batch: Batch) -> list[SegmentEvaluation]:
    """A model F(x) = sum of x whose gradient sum tells which rows took part."""
    parts = []
    for piece in batch.rows.segments:
        if piece.selector is None:
            parts.append(SegmentEvaluation(np.empty(0), {}, np.outer(piece.alphas, piece.end["x"]).astype(np.float32)))
        else:
            total = np.float32((piece.alphas * piece.weights).sum()) * piece.end["x"]
            parts.append(SegmentEvaluation(piece.alphas * float(piece.end["x"].sum()), {"x": total}))
    return parts


def run(scheduler: Scheduler, batch: Batch) -> list[Job]:
    return scheduler.complete(batch, evaluate(batch), 1.0)


def rows_by_job(batch: Batch) -> Counter[Job]:
    counts: Counter[Job] = Counter()
    for piece in batch.slices:
        counts[piece.job] += piece.last - piece.first
    return counts


def drain(scheduler: Scheduler) -> list[Job]:
    finished: list[Job] = []
    while (batch := scheduler.next_batch(0.0)) is not None:
        finished += run(scheduler, batch)
    return finished


def test_rows_of_different_requests_share_a_batch() -> None:
    scheduler = Scheduler(1000)
    jobs = [job(3), job(2), job(1)]
    for one in jobs:
        scheduler.submit(one, 0.0)

    batch = scheduler.next_batch(0.0)

    assert batch is not None
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
    [{"model": "other"}, {"shape": (3,)}, {"function": FORWARD}],
    ids=["model", "shape", "function"],
)
def test_rows_that_differ_in_kind_never_share_a_batch(other: dict[str, object]) -> None:
    scheduler = Scheduler(1000)
    scheduler.submit(job(2), 0.0)
    scheduler.submit(job(2, **other), 0.0)  # type: ignore[arg-type]

    first, second = scheduler.next_batch(0.0), scheduler.next_batch(0.0)

    assert first is not None and second is not None
    assert len(rows_by_job(first)) == len(rows_by_job(second)) == 1


@pytest.mark.parametrize("kind", [{}, {"model": "other"}], ids=["same model", "other model"])
def test_a_one_row_request_behind_a_long_one_is_answered_within_two_batches(kind: dict[str, str]) -> None:
    scheduler = Scheduler(100_000)
    scheduler.submit(job(10_000), 0.0)
    first = scheduler.next_batch(0.0)
    assert first is not None
    short = job(1, **kind)  # type: ignore[arg-type]
    scheduler.submit(short, 0.0)
    run(scheduler, first)

    finished = [done for _ in range(2) for done in run(scheduler, scheduler.next_batch(0.0))]  # type: ignore[arg-type]

    assert finished == [short]


def test_a_stream_of_newcomers_does_not_starve_a_long_request() -> None:
    scheduler = Scheduler(100_000)
    long = job(64, model="long")
    scheduler.submit(long, 0.0)

    for _ in range(40):
        scheduler.submit(job(8, model="short"), 0.0)
        batch = scheduler.next_batch(0.0)
        assert batch is not None
        run(scheduler, batch)

    assert long.done


def test_jobs_of_one_request_take_one_turn() -> None:
    scheduler = Scheduler(1000)
    request = Request()
    many = [job(8, request=request) for _ in range(7)]
    single = job(8)
    for one in (*many, single):
        scheduler.submit(one, 0.0)

    batch = scheduler.next_batch(0.0)

    assert batch is not None
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

    order = [next(iter(rows_by_job(scheduler.next_batch(0.0)))) for _ in range(3)]  # type: ignore[arg-type]

    assert order == [urgent, early, late]


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


def test_a_full_queue_refuses_at_once_and_admits_again_later() -> None:
    scheduler = Scheduler(max_waiting_rows=10)
    first = Request()
    scheduler.admit(first, 9)
    scheduler.submit(job(8, request=first), 0.0)

    with pytest.raises(LimitExceeded) as refused:
        scheduler.admit(Request(), 2)

    assert refused.value.reason == "QUEUE_FULL"
    assert refused.value.metadata == {"reserved_rows": "9", "rows": "2", "limit": "10"}
    drain(scheduler)
    scheduler.admit(Request(), 9)  # all but what the first may still bring
    with pytest.raises(LimitExceeded):
        scheduler.admit(Request(), 1)
    scheduler.release(first)
    scheduler.admit(Request(), 1)


@given(data=st.data())
def test_places_are_given_back_whatever_becomes_of_a_request(data: st.DataObject) -> None:
    """No more rows wait than the limit while requests come, bring rows, lose them and go; in the end it is empty."""
    scheduler = Scheduler(max_waiting_rows=30)
    open_rows: dict[Request, int] = {}
    for _ in range(data.draw(st.integers(1, 30))):
        rows = data.draw(st.integers(1, 12))
        with suppress(LimitExceeded):
            scheduler.admit(request := Request(), rows)
            open_rows[request] = rows
        for own in data.draw(st.lists(st.sampled_from([*open_rows, None]), max_size=3)):
            if own is not None and open_rows.get(own):
                part = data.draw(st.integers(1, open_rows[own]))
                scheduler.submit(one := job(part, request=own), 0.0)
                open_rows[own] -= part
                if data.draw(st.booleans()):
                    scheduler.cancel(one)
        assert scheduler.waiting_row_count <= 30
        if data.draw(st.booleans()) and (batch := scheduler.next_batch(0.0)) is not None:
            run(scheduler, batch)
        if open_rows and data.draw(st.booleans()):
            scheduler.release(gone := next(iter(open_rows)))
            del open_rows[gone]
            for one in [j for j in scheduler._jobs if j.request is gone]:
                scheduler.cancel(one)
    for request in open_rows:
        scheduler.release(request)
    scheduler.admit(Request(), 30)


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


def expected_sum(part: Segment) -> np.ndarray:
    return (part.alphas * part.weights).sum() * part.end["x"].astype(np.float64)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_row_is_lost_doubled_or_mixed_up(data: st.DataObject) -> None:
    """Random submits, cancels, failures and interleaved completions leave every surviving job with exactly its own
    rows."""
    scheduler = Scheduler(10_000)
    alive: list[Job] = []
    failed: set[Job] = set()
    flying: list[Batch] = []
    counter = iter(range(1, 10_000))
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["submit", "submit", "pack", "pack", "complete", "cancel", "fail"]))
        if action == "submit":
            rows = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
            parts = tuple(segment(count, value=float(next(counter))) for count in rows)
            model = data.draw(st.sampled_from(["a", "b"]))
            alive.append(Job(model, Plan(parts), Request(data.draw(st.integers(-1, 1))), 5))
            scheduler.submit(alive[-1], 0.0)
        elif action == "pack" and (batch := scheduler.next_batch(0.0)) is not None:
            flying.append(batch)
        elif action == "complete" and flying:
            run(scheduler, flying.pop(data.draw(st.integers(0, len(flying) - 1))))
        elif action == "cancel" and alive:
            gone = alive.pop(data.draw(st.integers(0, len(alive) - 1)))
            scheduler.cancel(gone)
        elif action == "fail" and flying:
            failed |= set(scheduler.fail(flying.pop(), EvaluationFailed("MODEL_RAISED", "boom")))
    for batch in flying:
        run(scheduler, batch)
    drain(scheduler)

    assert scheduler.waiting_row_count == 0
    assert scheduler.next_batch(0.0) is None
    for one in alive:
        if one in failed:
            assert one.error is not None
            continue
        assert one.done
        for part, answer in zip(one.plan.segments, one.evaluation.segments, strict=True):
            np.testing.assert_allclose(answer.gradient_sums["x"], expected_sum(part), rtol=1e-5)
            np.testing.assert_allclose(answer.scores, part.alphas * part.end["x"].astype(np.float64).sum(), rtol=1e-12)


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
