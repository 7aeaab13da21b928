"""Rows of a micro-batch divided among threads, each of which evaluates some of them by itself.

Threads that share every operator wait for each other after each, and some operators have one thread only, such as
onnxruntime's Transpose and ScatterElements. Rows have nothing to wait for. Whether that is faster is measured at load.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import pairwise

from explainserve.backends.row_feeds import joined, spans
from explainserve.plan import Rows, Segment, SegmentEvaluation, by_segment

Evaluate = Callable[[Rows], Sequence[SegmentEvaluation]]
"""Evaluates a micro-batch on the calling thread; see `contract.LoadedModel.evaluate`."""


@dataclass(frozen=True, eq=False)
class Part:
    """Consecutive rows of a micro-batch.

    Attributes:
        rows: a micro-batch of their own.
        positions: of their segments among those of the whole.
    """

    rows: Rows
    positions: tuple[int, ...]


class Team:
    """Threads that evaluate micro-batches together, the calling one among them.

    Args:
        size: number of threads, at least 2.
        least_rows: of a micro-batch that is divided, at least `size`.
    """

    def __init__(self, size: int, least_rows: int) -> None:
        self.size, self.least_rows = size, least_rows
        self._others = ThreadPoolExecutor(size - 1, "rows")

    def evaluations(self, rows: Rows, evaluate: Evaluate) -> list[SegmentEvaluation]:
        """What comes back for all rows, of which there are at least as many as threads.

        Raises whatever `evaluate` raises on a thread, as soon as no other is at work on these rows.
        """
        own, *others = parts = divided(rows, self.size)
        running = [self._others.submit(evaluate, part.rows) for part in others]
        try:
            found = [evaluate(own.rows)]
        finally:
            wait(running)
        return _reunited(parts, [*found, *(part.result() for part in running)])


def divided(rows: Rows, count: int) -> list[Part]:
    """Consecutive rows of a micro-batch as `count` parts, whose sizes differ by one at most."""
    bounds = [rows.row_count * index // count for index in range(count + 1)]
    return [_part(rows, first, last) for first, last in pairwise(bounds)]


def _part(rows: Rows, first: int, last: int) -> Part:
    cut = dict(_between(rows, first, last))
    return Part(Rows(rows.function, tuple(cut.values())), tuple(cut))


def _between(rows: Rows, first: int, last: int) -> Iterator[tuple[int, Segment]]:
    """The segments of the rows in [first, last), each with its position and these rows only."""
    for position, (segment, span) in enumerate(spans(rows)):
        own = slice(max(first, span.start) - span.start, min(last, span.stop) - span.start)
        if own.start < own.stop:
            yield position, replace(segment, alphas=segment.alphas[own], weights=segment.weights[own])


def _reunited(parts: Sequence[Part], found: Sequence[Sequence[SegmentEvaluation]]) -> list[SegmentEvaluation]:
    """Evaluations of the whole, from those of its parts."""
    pieces: dict[int, list[tuple[SegmentEvaluation, ...]]] = defaultdict(list)
    for part, evaluations in zip(parts, found, strict=True):
        for position, of_segment in zip(part.positions, by_segment(part.rows.segments, evaluations), strict=True):
            pieces[position].append(of_segment)
    return [joined(same) for _, of_parts in sorted(pieces.items()) for same in zip(*of_parts, strict=True)]
