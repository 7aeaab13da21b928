"""The scheduler: which rows go to the device next.

The device thread *pulls* the next batch, so batches form while the device is busy and no timer waits.

Requests take turns. Of those with the highest priority the one that waits longest leads, and between equals the one
with the earlier deadline. Every second turn goes to a short request, all of whose rows fit into one batch, as long as
there is any. So a short request waits for one batch of long ones at most, however many they are; and of the other turns
most go to long ones. Every eighth goes to whoever waits longest, whatever its priority: a low one is slow, not stuck.

The leader decides which rows can join: those of the same model, function, number of selectors and shapes. Requests of
one priority that have such rows get equal shares of the batch; what some leave goes to the others in their order, and
what all leave to the next lower priority. The shares of short requests are put together and go to one after another,
and one that gets a part keeps its place: a part is no answer, and while some are answered the device does the rest.

Cancelled and expired jobs lose their rows before the next batch is packed. Rows of a batch that failed may wait
again: in smaller batches where memory ran out, or each request's in batches of its own, so that only who is to blame
fails.

The queue is bounded where requests come in (`admission.py`): one is admitted only if all rows that it may ever need fit
beside those that admitted requests still may. So whoever is admitted is never refused on the way.

A plain value: times come in as arguments, and whoever shares it between threads holds a lock.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, groupby, islice, takewhile

from explainserve.errors import DeadlineExceeded
from explainserve.plan import Rows, SegmentEvaluation, by_segment
from explainserve.scheduling.admission import Admission
from explainserve.scheduling.job import Job, Request, Slice, WaitingRows
from explainserve.scheduling.line import Line, SortedRequests, Turn, deadline

TURNS = (*(Turn.SHORT, Turn.LONG) * 3, Turn.SHORT, Turn.LONGEST_WAITING)
"""Who leads, over and over."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch and where its rows come from.

    Attributes:
        model: the model to evaluate.
        key: what its rows have in common.
        slices: the jobs' rows, one entry per segment of `rows`.
    """

    model: Hashable
    key: Hashable
    rows: Rows
    slices: tuple[Slice, ...]

    @property
    def requests(self) -> dict[Request, list[Slice]]:
        """Whose rows it holds."""
        found: dict[Request, list[Slice]] = {}
        for piece in self.slices:
            found.setdefault(piece.job.request, []).append(piece)
        return found


class Scheduler:
    """Waiting jobs of one device.

    Args:
        max_waiting_rows: rows that admitted requests together may still bring; so no more ever wait.
    """

    def __init__(self, max_waiting_rows: int) -> None:
        self._line = Line()
        self._lines: dict[Hashable, Line] = {}
        self._deadlines = SortedRequests(deadline)
        self._arrivals = 0
        self._turn_count = 0
        self._turns = cycle(TURNS)
        self._waiting_rows = 0
        self._admission = Admission(max_waiting_rows)

    @property
    def waiting_row_count(self) -> int:
        """Rows that were not packed yet."""
        return self._waiting_rows

    @property
    def reserved_rows(self) -> int:
        """Rows that admitted requests may still bring, those that wait included."""
        return self._admission.reserved_rows

    @property
    def reserved_seconds(self) -> float:
        """Time of these rows on the device, as far as is known."""
        return self._admission.reserved_seconds

    def admit(self, request: Request, row_count: int) -> None:
        """Reserves all rows that a request may need.

        Raises:
            QueueFull: other requests may still need too many (QUEUE_FULL).
        """
        self._admission.admit(request, row_count)

    def release(self, request: Request) -> None:
        """Gives back what a request did not need, when it ends."""
        self._admission.release(request)

    def submit(self, job: Job, now: float) -> None:
        """Takes a job of an admitted request."""
        job.submitted_at = now
        request = job.request
        if not request.jobs:
            self._enter(request)
        request.jobs.add(job)
        with self._changing(request):
            if not request.waiting:
                request.waits_since = self._turn_count
            for key, piece in job.slices:
                request.waiting.setdefault(key, WaitingRows()).append(piece)

    def cancel(self, job: Job) -> None:
        """Drops the rows of a job that still wait; what is on the device is ignored when it comes back."""
        if job in job.request.jobs:
            self._remove(job)

    def expire(self, now: float) -> list[Job]:
        """Drops jobs whose time has run out and returns them, each with its error."""
        late = list(takewhile(lambda request: request.expires_at <= now, self._deadlines))
        expired = [job for request in late for job in request.jobs]
        for job in expired:
            self._end(job, DeadlineExceeded("DEADLINE_EXCEEDED", "time ran out before all rows were evaluated"))
        return expired

    def next_batch(self, now: float) -> Batch | None:
        """Packs the next batch, or None where no row waits."""
        if not len(self._line):
            return None
        turn = next(self._turns)
        leader = next(self._line.order(turn))
        key, waiting = next(iter(leader.waiting.items()))
        first = waiting.first.job
        shares = list(_shares(self._lines[key], turn, key, first.limit.rows))
        slices = tuple(piece for request, share in shares for piece in self._take(request, key, share, now))
        segments = tuple(piece.segment for piece in slices)
        return Batch(first.model, key, Rows(segments[0].function, segments), slices)

    def wants(self, batch: Batch) -> bool:
        """Whether any job still waits for a batch."""
        return bool(_open_jobs(batch))

    def complete(self, batch: Batch, parts: Sequence[SegmentEvaluation], seconds: float) -> list[Job]:
        """Hands results to the jobs.

        Args:
            parts: one per segment of the batch and selector of it.
            seconds: time of the batch on the device.

        Returns:
            The jobs that are done now.
        """
        self._admission.evaluated(batch.rows.row_count, seconds)
        for piece, own in zip(batch.slices, by_segment(batch.rows.segments, parts), strict=True):
            piece.job.put(piece, own)
        jobs = _open_jobs(batch)
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
        failed = _open_jobs(batch)
        for job in failed:
            self._end(job, error)
        return failed

    def drop(self, model: Hashable, error: Exception) -> list[Job]:
        """Ends every job of a model.

        Returns:
            Those jobs, each with the error.
        """
        ended = [job for request in self._deadlines for job in request.jobs if job.model is model]
        for job in ended:
            self._end(job, error)
        return ended

    def retry_in_halves(self, batch: Batch) -> None:
        """Lets the rows of a batch that was too large for memory wait again, in batches of half its size at most."""
        limit = batch.slices[0].job.limit
        limit.rows = max(1, min(limit.rows, batch.rows.row_count // 2))
        for request, slices in batch.requests.items():
            self._put_back(request, batch.key, slices)

    def retry_alone(self, batch: Batch) -> None:
        """Lets the rows of a batch of several requests wait again, each request's with a key that no other has."""
        for request, slices in batch.requests.items():
            self._put_back(request, (batch.key, request), slices)

    def _put_back(self, request: Request, key: Hashable, slices: Sequence[Slice]) -> None:
        wanted = [piece for piece in slices if piece.job in request.jobs]
        if not wanted:
            return
        self._admission.put_back(request, sum(piece.row_count for piece in wanted))
        with self._changing(request):
            waiting = request.waiting.setdefault(key, WaitingRows())
            for piece in reversed(wanted):
                waiting.prepend(piece)

    def _take(self, request: Request, key: Hashable, row_count: int, now: float) -> list[Slice]:
        """Lets a request have its turn: these rows go to the device."""
        self._turn_count += 1
        with self._changing(request):
            taken = list(request.waiting[key].take(row_count))
            if not request.short:
                request.waits_since = self._turn_count
        self._admission.packed(request, row_count)
        for piece in taken:
            if piece.job.started_at is None:
                piece.job.started_at = now
        return taken

    def _enter(self, request: Request) -> None:
        self._arrivals += 1
        request.arrival = self._arrivals
        self._deadlines.add(request)

    def _end(self, job: Job, error: Exception) -> None:
        job.error = error
        self._remove(job)

    def _remove(self, job: Job) -> None:
        request = job.request
        with self._changing(request):
            for waiting in request.waiting.values():
                waiting.drop(job)
        request.jobs.remove(job)
        if not request.jobs:
            self._deadlines.remove(request)

    @contextmanager
    def _changing(self, request: Request) -> Iterator[None]:
        """Out of all lines while its rows or its turn change, and back in those where it has rows afterwards."""
        self._leave(request)
        yield
        request.waiting = {key: waiting for key, waiting in request.waiting.items() if waiting.row_count}
        self._join(request)

    def _leave(self, request: Request) -> None:
        if request.waiting:
            self._line.remove(request)
        for key, waiting in request.waiting.items():
            self._waiting_rows -= waiting.row_count
            self._lines[key].remove(request)
            if not len(self._lines[key]):
                del self._lines[key]

    def _join(self, request: Request) -> None:
        if request.waiting:
            request.short = _fits_into_one_batch(request)
            self._line.add(request)
        for key, waiting in request.waiting.items():
            self._waiting_rows += waiting.row_count
            self._lines.setdefault(key, Line()).add(request)


def _shares(line: Line, turn: Turn, key: Hashable, budget: int) -> Iterator[tuple[Request, int]]:
    """How many rows of a key each request brings to a batch of at most `budget` rows; none of those without any."""

    def rank(request: Request) -> int:
        return 0 if turn is Turn.LONGEST_WAITING else request.priority

    for _, members in groupby(islice(line.order(turn), budget), rank):
        equals = list(members)
        wanted = [request.waiting[key].row_count for request in equals]
        shares = _short_ones_undivided(equals, wanted, _equal_shares(budget, wanted))
        budget -= sum(shares)
        yield from ((request, share) for request, share in zip(equals, shares, strict=True) if share)


def _equal_shares(budget: int, wanted: Sequence[int]) -> list[int]:
    """Equal shares first, then what is left in the same order."""
    share = -(-budget // len(wanted))
    shares = [0] * len(wanted)
    for limit in (share, budget):
        for index, own in enumerate(wanted):
            more = min(own, limit, shares[index] + budget) - shares[index]
            shares[index] += more
            budget -= more
    return shares


def _short_ones_undivided(requests: Sequence[Request], wanted: Sequence[int], shares: Sequence[int]) -> list[int]:
    """The same shares, but what short requests have together goes to one after another: half of one is no answer."""
    together = sum(share for request, share in zip(requests, shares, strict=True) if request.short)
    dealt = []
    for request, rows, share in zip(requests, wanted, shares, strict=True):
        own = min(rows, together) if request.short else share
        together -= own if request.short else 0
        dealt.append(own)
    return dealt


def _open_jobs(batch: Batch) -> list[Job]:
    """Jobs of the batch that have not ended meanwhile, each once."""
    jobs = dict.fromkeys(piece.job for piece in batch.slices)
    return [job for job in jobs if job in job.request.jobs]


def _fits_into_one_batch(request: Request) -> bool:
    """Whether all rows that wait do: those of several keys go in several."""
    first, *others = request.waiting.values()
    return not others and first.row_count <= first.first.job.limit.rows
