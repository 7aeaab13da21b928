"""No row is lost, doubled or mixed up, whatever becomes of requests and batches: the scheduler beside a plain model of
the truth."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from explainserve.errors import DeadlineExceeded, EvaluationFailed, QueueFull
from explainserve.plan import Plan
from explainserve.scheduling import Batch, Job, Request, RowLimit, Scheduler
from scheduling.fake_device import FORWARD, GRADIENT, assert_own_rows_exactly_once, evaluate, segment

MAX_WAITING_ROWS = 60
BATCH_ROWS = {"a": 5, "b": 3}

Kind = dict[str, Any]
KINDS: list[Kind] = [{"function": FORWARD}, {"function": GRADIENT}, {"function": GRADIENT, "scales": (1.0, 3.0, -2.0)}]

Row = tuple[Job, int, int]
"""Job, segment, position in the segment."""


class Scheduling(RuleBasedStateMachine):
    """Requests come, bring jobs and go; batches are packed, and come back in any order or fail.

    Attributes:
        waiting: rows that were submitted and not packed, of jobs that go on.
        places: rows that each admitted request may still bring.
        ended: jobs that were cancelled, failed or expired.
        alone: rows that share batches only with those of their own request that failed with them.
    """

    requests: Bundle[Request] = Bundle("requests")
    jobs: Bundle[Job] = Bundle("jobs")
    flying: Bundle[Batch] = Bundle("flying")

    @initialize()
    def start(self) -> None:
        self.scheduler = Scheduler(MAX_WAITING_ROWS)
        self.now = 0.0
        self.count = 0
        self.waiting: set[Row] = set()
        self.places: dict[Request, int] = {}
        self.all_jobs: list[Job] = []
        self.done: set[Job] = set()
        self.ended: set[Job] = set()
        self.in_flight: list[Batch] = []
        self.limits = {model: RowLimit(rows) for model, rows in BATCH_ROWS.items()}
        self.alone: set[Row] = set()

    @rule(target=requests, rows=st.integers(1, 25), priority=st.integers(-1, 1), seconds=st.sampled_from([2, 9, 1e9]))
    def admit(self, rows: int, priority: int, seconds: float) -> object:
        request = Request(priority, self.now + seconds)
        fits = sum(self.places.values()) + rows <= MAX_WAITING_ROWS
        try:
            self.scheduler.admit(request, rows)
        except QueueFull:
            assert not fits
            return multiple()
        assert fits
        self.places[request] = rows
        return request

    @rule(
        target=jobs,
        request=requests,
        model=st.sampled_from(list(BATCH_ROWS)),
        parts=st.lists(st.tuples(st.integers(1, 8), st.sampled_from(KINDS)), min_size=1, max_size=3),
    )
    def submit(self, request: Request, model: str, parts: list[tuple[int, Kind]]) -> object:
        rows = sum(count for count, _ in parts)
        if self.places.get(request, 0) < rows + len(self._waiting_rows_of(request)):
            return multiple()  # it was not admitted for so many, or has gone
        segments = tuple(segment(count, self._own_value(), **kind) for count, kind in parts)
        job = Job(model, Plan(segments), request, self.limits[model])
        self.all_jobs.append(job)
        self.waiting |= {(job, index, row) for index, (count, _) in enumerate(parts) for row in range(count)}
        self.scheduler.submit(job, self.now)
        return job

    @rule(job=jobs)
    def cancel(self, job: Job) -> None:
        self.scheduler.cancel(job)
        if job not in self.done:
            self._end([job])

    @rule(request=consumes(requests))
    def leave(self, request: Request) -> None:
        """A request ends: its jobs are cancelled and its places given back, as the engine does."""
        for job in self.all_jobs:
            if job.request is request:
                self.cancel(job)
        self.scheduler.release(request)
        del self.places[request]

    @rule(seconds=st.sampled_from([1, 5]))
    def expire(self, seconds: int) -> None:
        self.now += seconds
        late = {job for job in self._open_jobs() if job.request.expires_at <= self.now}
        expired = self.scheduler.expire(self.now)
        assert set(expired) == late and len(expired) == len(late)
        assert all(isinstance(job.error, DeadlineExceeded) for job in expired)
        self._end(expired)

    @rule(target=flying)
    def pack(self) -> object:
        batch = self.scheduler.next_batch(self.now)
        if batch is None:
            assert not self.waiting
            return multiple()
        self._check_packed(batch)
        self.in_flight.append(batch)
        return batch

    @rule(batch=consumes(flying))
    def complete(self, batch: Batch) -> None:
        self.in_flight.remove(batch)
        done = self.scheduler.complete(batch, evaluate(batch), 1.0)
        for job in done:
            assert job not in self.done | self.ended
            assert_own_rows_exactly_once(job)
        self.done |= set(done)

    @rule(batch=consumes(flying))
    def fail(self, batch: Batch) -> None:
        self.in_flight.remove(batch)
        error = EvaluationFailed("MODEL_RAISED", "boom")
        expected = {piece.job for piece in batch.slices} - self.ended
        failed = self.scheduler.fail(batch, error)
        assert set(failed) == expected and len(failed) == len(expected)
        assert all(job.error is error for job in failed)
        self._end(failed)

    @rule(batch=consumes(flying))
    def run_out_of_memory(self, batch: Batch) -> None:
        self.in_flight.remove(batch)
        limit, rows = self.limits[str(batch.model)], batch.rows.row_count
        self.scheduler.retry_in_halves(batch)
        assert 1 <= limit.rows <= max(1, rows // 2)
        self._wait_again(batch)

    @rule(batch=consumes(flying))
    def fail_and_retry(self, batch: Batch) -> None:
        self.in_flight.remove(batch)
        self.scheduler.retry_alone(batch)
        self.alone |= self._wait_again(batch)

    @invariant()
    def counts_are_right(self) -> None:
        assert self.scheduler.waiting_row_count == len(self.waiting) <= sum(self.places.values())

    @invariant()
    def every_row_of_a_job_that_goes_on_waits_flies_or_came_back(self) -> None:
        flying = {piece.job for batch in self.in_flight for piece in batch.slices}
        waiting = {job for job, _, _ in self.waiting}
        assert self._open_jobs() == (flying | waiting) - self.ended

    def teardown(self) -> None:
        """What still flies comes back, all that waits is evaluated, and everyone goes: nothing is left."""
        while self.in_flight:
            self.complete(self.in_flight[-1])
        while (batch := self.scheduler.next_batch(self.now)) is not None:
            self._check_packed(batch)
            self.in_flight.append(batch)
            self.complete(batch)
        assert not self.waiting and not self._open_jobs()
        for request in list(self.places):
            self.leave(request)
        self.scheduler.admit(Request(), MAX_WAITING_ROWS)

    def _check_packed(self, batch: Batch) -> None:
        rows = _rows(batch)
        assert 0 < len(rows) <= self.limits[str(batch.model)].rows
        assert len(set(rows)) == len(rows) and set(rows) <= self.waiting
        assert {job.model for job, _, _ in rows} == {batch.model}
        assert {piece.function for piece in batch.rows.segments} == {batch.rows.function}
        assert len({len(piece.selectors) for piece in batch.rows.segments}) == 1
        if not self.alone.isdisjoint(rows):
            assert len({job.request for job, _, _ in rows}) == 1 and set(rows) <= self.alone
        self.waiting -= set(rows)
        for job, _, _ in rows:
            self.places[job.request] -= 1

    def _wait_again(self, batch: Batch) -> set[Row]:
        rows = {row for row in _rows(batch) if row[0] not in self.ended}
        self.waiting |= rows
        for job, _, _ in rows:
            self.places[job.request] += 1
        return rows

    def _end(self, jobs: list[Job]) -> None:
        self.ended |= set(jobs)
        self.waiting = {row for row in self.waiting if row[0] not in self.ended}

    def _open_jobs(self) -> set[Job]:
        return set(self.all_jobs) - self.done - self.ended

    def _waiting_rows_of(self, request: Request) -> list[Row]:
        return [row for row in self.waiting if row[0].request is request]

    def _own_value(self) -> float:
        """Rows of different segments differ."""
        self.count += 1
        return float(self.count)


def _rows(batch: Batch) -> list[Row]:
    return [(p.job, p.segment_index, row) for p in batch.slices for row in range(p.first, p.last)]


TestScheduling = Scheduling.TestCase
TestScheduling.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
