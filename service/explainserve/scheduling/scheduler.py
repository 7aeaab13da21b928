"""The scheduler: which rows go to the device next.

The device thread *pulls* the next batch, so batches form while the device is busy and no timer waits. Requests take
turns: the one that waited longest leads and decides which rows can join (same model, function and shapes); every
request with such rows gets an equal share of the batch, and what is left is filled in the same order. Priority goes
before turns, the earlier deadline before the later one between equals. A newcomer queues behind those that wait, and
before anyone who was served since. Cancelled and expired jobs fall out when a batch is packed.

The queue is bounded where requests come in: one is admitted only if all rows that it may ever need fit beside those
that admitted requests still may. So whoever is admitted is never refused on the way, and no more rows than the limit
ever wait.

A plain value: times come in as arguments, and whoever shares it between threads holds a lock.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from explainserve.errors import DeadlineExceeded, LimitExceeded
from explainserve.plan import Rows, SegmentEvaluation
from explainserve.scheduling.job import Job, Request, Slice


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch and where its rows come from.

    Attributes:
        model: the model to evaluate.
        slices: the jobs' rows, one entry per segment of `rows`.
    """

    model: Hashable
    rows: Rows
    slices: tuple[Slice, ...]


class Scheduler:
    """Waiting jobs of one device.

    Args:
        max_waiting_rows: rows that may wait; a request that could exceed it is not admitted.
    """

    def __init__(self, max_waiting_rows: int) -> None:
        self._max_waiting_rows = max_waiting_rows
        self._jobs: list[Job] = []
        self._last_turn = 0
        self._waiting_rows = 0
        self._reserved_rows = 0

    @property
    def waiting_row_count(self) -> int:
        """Rows that were not packed yet."""
        return self._waiting_rows

    def admit(self, request: Request, row_count: int) -> None:
        """Reserves all rows that a request may need, at most `max_waiting_rows`.

        Raises:
            LimitExceeded: other requests may still need too many rows (QUEUE_FULL).
        """
        if self._reserved_rows + row_count > self._max_waiting_rows:
            raise LimitExceeded(
                "QUEUE_FULL",
                f"requests that are being answered may still need {self._reserved_rows} rows, and {row_count} more "
                f"would exceed {self._max_waiting_rows}; try again later",
                reserved_rows=self._reserved_rows,
                rows=row_count,
                limit=self._max_waiting_rows,
            )
        self._reserve(request, row_count)

    def release(self, request: Request) -> None:
        """Gives back what a request did not need, when it ends."""
        self._reserve(request, -request.reserved_rows)

    def submit(self, job: Job, now: float) -> None:
        """Takes a job of an admitted request."""
        rows = job.plan.row_count
        job.submitted_at = now
        if all(job.request is not other.request for other in self._jobs):
            job.request.last_turn = max(job.request.last_turn, self._last_turn)
        self._waiting_rows += rows
        self._jobs.append(job)

    def cancel(self, job: Job) -> None:
        """Drops the rows of a job that still wait; what is on the device is ignored when it comes back."""
        if job in self._jobs:
            self._remove(job)

    def expire(self, now: float) -> list[Job]:
        """Drops jobs whose time has run out and returns them, each with its error."""
        expired = [job for job in self._jobs if job.request.expires_at <= now]
        for job in expired:
            self._end(job, DeadlineExceeded("DEADLINE_EXCEEDED", "time ran out before all rows were evaluated"))
        return expired

    def next_batch(self, now: float) -> Batch | None:
        """Packs the next batch, or None where no row waits."""
        waiting = [job for job in self._jobs if job.waiting_row_count]
        if not waiting:
            return None
        leader = min(waiting, key=_precedence)
        key = next(leader.keys)
        slices = tuple(self._pack(key, leader.max_batch_rows, [job for job in waiting if key in job.keys]))
        for piece in slices:
            self._waiting_rows -= piece.last - piece.first
            self._reserve(piece.job.request, -min(piece.last - piece.first, piece.job.request.reserved_rows))
            if piece.job.started_at is None:
                piece.job.started_at = now
        segments = tuple(piece.segment for piece in slices)
        return Batch(leader.model, Rows(segments[0].function, segments), slices)

    def complete(self, batch: Batch, parts: Sequence[SegmentEvaluation], seconds: float) -> list[Job]:
        """Hands results to the jobs.

        Args:
            parts: one per segment of the batch.
            seconds: time of the batch on the device.

        Returns:
            The jobs that are done now.
        """
        for piece, part in zip(batch.slices, parts, strict=True):
            piece.job.put(piece, part)
        jobs = self._present(batch)
        for request in {job.request for job in jobs}:
            request.compute_seconds += seconds
        done = [job for job in jobs if job.done]
        for job in done:
            self._remove(job)
        return done

    def fail(self, batch: Batch, error: Exception) -> list[Job]:
        """Ends every job with rows in the batch.

        Returns:
            Those jobs, each with the error.
        """
        failed = self._present(batch)
        for job in failed:
            self._end(job, error)
        return failed

    def _reserve(self, request: Request, row_count: int) -> None:
        request.reserved_rows += row_count
        self._reserved_rows += row_count

    def _pack(self, key: Hashable, budget: int, jobs: list[Job]) -> Iterator[Slice]:
        """Equal shares for all requests first, then what is left in the same order."""
        requests = _by_request(sorted(jobs, key=_precedence))
        share = -(-budget // len(requests))
        for row_limit in (share, budget):
            for request, members in requests:
                taken = list(_take(key, min(row_limit, budget), members))
                if taken:
                    self._last_turn += 1
                    request.last_turn = self._last_turn
                budget -= sum(piece.last - piece.first for piece in taken)
                yield from taken

    def _present(self, batch: Batch) -> list[Job]:
        """Jobs of the batch that were not cancelled meanwhile, each once."""
        jobs = dict.fromkeys(piece.job for piece in batch.slices)
        return [job for job in jobs if job in self._jobs]

    def _end(self, job: Job, error: Exception) -> None:
        job.error = error
        self._remove(job)

    def _remove(self, job: Job) -> None:
        self._waiting_rows -= job.waiting_row_count
        job.drop()
        self._jobs.remove(job)


def _precedence(job: Job) -> tuple[float, ...]:
    request = job.request
    return -request.priority, request.last_turn, request.expires_at, job.submitted_at


def _by_request(jobs: list[Job]) -> list[tuple[Request, list[Job]]]:
    groups: dict[Request, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.request, []).append(job)
    return list(groups.items())


def _take(key: Hashable, row_count: int, jobs: list[Job]) -> Iterator[Slice]:
    for job in jobs:
        for piece in job.take(key, row_count):
            row_count -= piece.last - piece.first
            yield piece
