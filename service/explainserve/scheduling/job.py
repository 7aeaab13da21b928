"""A job: the rows of one plan that wait for one model, and what came back for them so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from explainserve.plan import Evaluation, Plan, Segment, SegmentEvaluation


@dataclass
class RowLimit:
    """How many rows of a model fit into one batch; shared by all of its jobs, so that they learn of it together."""

    rows: int


@dataclass(eq=False)
class Request:
    """What jobs of one client request have in common. Turns are taken between requests, not between jobs.

    Attributes:
        priority: higher goes first.
        expires_at: time after which its rows are dropped; infinity where there is none.
        seconds_per_row: that its rows take on the device, as far as is known.
        compute_seconds: time of the batches that held rows of any of its jobs, each batch once.

    The scheduler keeps the rest:
        reserved_rows: rows that it may still bring to the device, those that wait included.
        arrival: its place among all requests that came.
        waits_since: number of the turn since which it waits.
        short: whether all rows that wait fit into one batch.
        jobs: those that have not ended.
        waiting: rows that were not packed yet, by batch key, the key that waits longest first.
    """

    priority: int = 0
    expires_at: float = float("inf")
    seconds_per_row: float = 0.0
    compute_seconds: float = 0.0
    reserved_rows: int = 0
    arrival: int = 0
    waits_since: int = 0
    short: bool = True
    jobs: set[Job] = field(default_factory=set)
    waiting: dict[Hashable, WaitingRows] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Slice:
    """Consecutive rows of one segment of a job: [first, last)."""

    job: Job
    segment_index: int
    first: int
    last: int

    @property
    def row_count(self) -> int:
        """Number of rows."""
        return self.last - self.first

    @property
    def segment(self) -> Segment:
        """The segment with these rows only."""
        whole = self.job.plan.segments[self.segment_index]
        if self.row_count == whole.row_count:
            return whole
        rows = slice(self.first, self.last)
        return replace(whole, alphas=whole.alphas[rows], weights=whole.weights[rows])

    def split(self, row_count: int) -> tuple[Slice, Slice]:
        """The first rows, and the rest."""
        middle = self.first + row_count
        return replace(self, last=middle), replace(self, first=middle)


class WaitingRows:
    """Rows of one request that share a batch key, in the order in which they came."""

    def __init__(self) -> None:
        self._slices: deque[Slice] = deque()
        self.row_count = 0

    @property
    def first(self) -> Slice:
        """What goes next."""
        return self._slices[0]

    def append(self, piece: Slice) -> None:
        """Adds rows at the end."""
        self._slices.append(piece)
        self.row_count += piece.row_count

    def prepend(self, piece: Slice) -> None:
        """Adds rows that go next."""
        self._slices.appendleft(piece)
        self.row_count += piece.row_count

    def take(self, row_count: int) -> Iterator[Slice]:
        """Removes the first `row_count` rows."""
        self.row_count -= row_count
        while row_count > 0:
            piece = self._slices.popleft()
            if piece.row_count > row_count:
                piece, rest = piece.split(row_count)
                self._slices.appendleft(rest)
            row_count -= piece.row_count
            yield piece

    def drop(self, job: Job) -> None:
        """Forgets the rows of a job."""
        self._slices = deque(piece for piece in self._slices if piece.job is not job)
        self.row_count = sum(piece.row_count for piece in self._slices)


@dataclass(eq=False)
class Job:
    """The rows of one plan.

    Attributes:
        model: identifies the model; rows of different models never share a batch.
        limit: of this model's batches.
        submitted_at, started_at: times of submission and of the first packing, set by the scheduler.
        error: why it ended without an evaluation.
    """

    model: Hashable
    plan: Plan
    request: Request
    limit: RowLimit
    submitted_at: float = 0.0
    started_at: float | None = None
    error: Exception | None = None
    _sums: list[list[_SelectorSum]] = field(init=False)
    _open_rows: int = field(init=False)

    def __post_init__(self) -> None:
        self._sums = [[_SelectorSum(s) for _ in range(s.evaluation_count)] for s in self.plan.segments]
        self._open_rows = self.plan.row_count

    @property
    def slices(self) -> Iterator[tuple[Hashable, Slice]]:
        """All of its rows, segment by segment, each with its batch key."""
        for index, segment in enumerate(self.plan.segments):
            yield (self.model, *batch_key(segment)), Slice(self, index, 0, segment.row_count)

    @property
    def done(self) -> bool:
        """Whether every row came back."""
        return self._open_rows == 0

    @property
    def evaluation(self) -> Evaluation:
        """What came back."""
        return Evaluation(tuple(own.evaluation() for sums in self._sums for own in sums))

    def put(self, piece: Slice, parts: Sequence[SegmentEvaluation]) -> None:
        """Adds what came back for some rows, one part per selector."""
        for own, part in zip(self._sums[piece.segment_index], parts, strict=True):
            own.add(piece.first, piece.last, part)
        self._open_rows -= piece.row_count


def batch_key(segment: Segment) -> tuple[Hashable, ...]:
    """Rows of one model share a batch exactly when these are equal: function, number of selectors, and names, types and
    shapes of all inputs. So every row of a batch has as many backward passes as any other."""
    inputs = {**segment.end, **segment.fixed}
    shapes = tuple((name, array.dtype.str, array.shape) for name, array in sorted(inputs.items()))
    return segment.function, len(segment.selectors), shapes


class _SelectorSum:
    """What comes back of one segment at one selector while its rows come back in pieces, in any order."""

    def __init__(self, segment: Segment) -> None:
        self._row_count = segment.row_count
        self._scores = np.empty(segment.row_count if segment.selectors else 0, np.float64)
        self._sums: dict[str, NDArray[np.floating]] = {}
        self._outputs: dict[int, NDArray[np.generic]] = {}
        self._values: dict[str, dict[int, NDArray[np.generic]]] = {}

    def add(self, first: int, last: int, part: SegmentEvaluation) -> None:
        if part.outputs is not None:
            self._outputs[first] = part.outputs
        for name, values in part.values.items():
            self._values.setdefault(name, {})[first] = values
        if len(self._scores):
            self._scores[first:last] = part.scores
        for name, gradient_sum in part.gradient_sums.items():
            self._add_sum(name, gradient_sum, whole=last - first == self._row_count)

    def _add_sum(self, name: str, gradient_sum: NDArray[np.floating], *, whole: bool) -> None:
        if whole:  # the usual case keeps the backend's array: no copy, no conversion
            self._sums[name] = gradient_sum
        elif name in self._sums:
            self._sums[name] += gradient_sum
        else:
            self._sums[name] = gradient_sum.astype(np.float64)

    def evaluation(self) -> SegmentEvaluation:
        outputs = _in_order(self._outputs) if self._outputs else None
        values = {name: _in_order(pieces) for name, pieces in self._values.items()}
        return SegmentEvaluation(self._scores, self._sums, outputs, values)


def _in_order(pieces: dict[int, NDArray[np.generic]]) -> NDArray[np.generic]:
    """Pieces by their first row as one array."""
    return np.concatenate([pieces[first] for first in sorted(pieces)])
