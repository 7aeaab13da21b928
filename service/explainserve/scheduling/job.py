"""A job: the rows of one plan that wait for one model, and what came back for them so far."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from explainserve.plan import Evaluation, Plan, Segment, SegmentEvaluation


@dataclass(eq=False)
class Request:
    """What jobs of one client request have in common. Turns are taken between requests, not between jobs.

    Attributes:
        priority: higher goes first.
        expires_at: time after which its rows are dropped; infinity where there is none.
        last_turn: number of the last turn it took; smaller waits longer.
        compute_seconds: time of the batches that held rows of any of its jobs, each batch once.
        reserved_rows: rows that it may still bring to the device, those that wait included; set by the scheduler.
    """

    priority: int = 0
    expires_at: float = float("inf")
    last_turn: int = 0
    compute_seconds: float = 0.0
    reserved_rows: int = 0


@dataclass(frozen=True, eq=False)
class Slice:
    """Consecutive rows of one segment of a job: [first, last)."""

    job: Job
    segment_index: int
    first: int
    last: int

    @property
    def segment(self) -> Segment:
        """The segment with these rows only."""
        whole = self.job.plan.segments[self.segment_index]
        if self.last - self.first == whole.row_count:
            return whole
        rows = slice(self.first, self.last)
        return replace(whole, alphas=whole.alphas[rows], weights=whole.weights[rows])


@dataclass(eq=False)
class Job:
    """The rows of one plan.

    Attributes:
        model: identifies the model; rows of different models never share a batch.
        max_batch_rows: rows of this model that fit into one batch.
        submitted_at, started_at: times of submission and of the first packing, set by the scheduler.
        error: why it ended without an evaluation.
    """

    model: Hashable
    plan: Plan
    request: Request
    max_batch_rows: int
    submitted_at: float = 0.0
    started_at: float | None = None
    error: Exception | None = None
    _waiting: dict[Hashable, list[list[int]]] = field(init=False)
    _sums: list[_SegmentSum] = field(init=False)
    _open_rows: int = field(init=False)

    def __post_init__(self) -> None:
        self._waiting = {}
        for index, segment in enumerate(self.plan.segments):
            self._waiting.setdefault((self.model, *batch_key(segment)), []).append([index, 0])
        self._sums = [_SegmentSum(segment) for segment in self.plan.segments]
        self._open_rows = self.plan.row_count

    @property
    def waiting_row_count(self) -> int:
        """Rows that were not packed yet."""
        return sum(
            self.plan.segments[index].row_count - first for queue in self._waiting.values() for index, first in queue
        )

    @property
    def keys(self) -> Iterator[Hashable]:
        """Batch keys of the rows that wait, the oldest first."""
        return iter(self._waiting)

    @property
    def done(self) -> bool:
        """Whether every row came back."""
        return self._open_rows == 0

    @property
    def evaluation(self) -> Evaluation:
        """What came back."""
        return Evaluation(tuple(segment_sum.evaluation() for segment_sum in self._sums))

    def take(self, key: Hashable, row_count: int) -> Iterator[Slice]:
        """Removes up to `row_count` waiting rows of a key, in the order of the plan."""
        queue = self._waiting.get(key, [])
        while queue and row_count > 0:
            index, first = queue[0]
            last = min(first + row_count, self.plan.segments[index].row_count)
            row_count -= last - first
            queue[0][1] = last
            if last == self.plan.segments[index].row_count:
                queue.pop(0)
            yield Slice(self, index, first, last)
        if not queue:
            self._waiting.pop(key, None)

    def put(self, piece: Slice, part: SegmentEvaluation) -> None:
        """Adds what came back for some rows."""
        self._sums[piece.segment_index].add(piece.first, piece.last, part)
        self._open_rows -= piece.last - piece.first

    def drop(self) -> None:
        """Forgets the rows that wait."""
        self._waiting.clear()


def batch_key(segment: Segment) -> tuple[Hashable, ...]:
    """Rows of one model share a batch exactly when these are equal: function, and names, types and shapes of all
    inputs."""
    inputs = {**segment.end, **segment.fixed}
    return segment.function, tuple((name, array.dtype.str, array.shape) for name, array in sorted(inputs.items()))


class _SegmentSum:
    """Scores, sums and outputs of one segment while its rows come back in pieces, in any order."""

    def __init__(self, segment: Segment) -> None:
        self._row_count = segment.row_count
        self._scores = np.empty(0 if segment.selector is None else segment.row_count, np.float64)
        self._sums: dict[str, NDArray[np.floating]] = {}
        self._outputs: dict[int, NDArray[np.generic]] = {}

    def add(self, first: int, last: int, part: SegmentEvaluation) -> None:
        if part.outputs is not None:
            self._outputs[first] = part.outputs
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
        outputs = [self._outputs[first] for first in sorted(self._outputs)]
        return SegmentEvaluation(self._scores, self._sums, np.concatenate(outputs) if outputs else None)
