"""Plans that share forward passes: rows at the same points are evaluated once, for the selectors of all plans.

Plans of several targets and methods about one instance move along the same paths. Segments with the same ends and rows
become one segment with the selectors of all of them, each selector once. A row that stands in several segments which
differ otherwise, such as a node of a quadrature of which another method wants the gradient alone, is evaluated by
itself and added where it belongs. What comes back is dealt out again, so that a plan gets what it would have got alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from explainserve.plan import Evaluation, Plan, Segment, SegmentEvaluation, Selector, Tensors

_ONE = np.ones(1)
_ONE.setflags(write=False)


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of a segment that are evaluated together.

    Attributes:
        position: of their evaluation.
        rows: their positions in the segment, shape (rows,), int64.
        weight: of their gradient in the segment's sum; None where the evaluation has weighted it already.
    """

    position: int
    rows: NDArray[np.int64]
    weight: float | None


@dataclass(frozen=True, eq=False)
class SharedPlan:
    """Several plans as one.

    Attributes:
        plan: their rows, each once.
        pieces: for each plan, and each of its own evaluations, what it is put together from.
    """

    plan: Plan
    pieces: tuple[tuple[tuple[Piece, ...], ...], ...]

    def dealt(self, evaluation: Evaluation) -> tuple[Evaluation, ...]:
        """The evaluation of each plan."""
        found = evaluation.segments
        return tuple(Evaluation(tuple(_put_together(pieces, found) for pieces in own)) for own in self.pieces)


def shared(plans: Sequence[Plan]) -> SharedPlan:
    """Makes one plan of several. The arrays at the ends of segments are the same if they are the same objects."""
    distinct = {_row_key(segment): segment for plan in plans for segment in plan.segments}
    common = _common_points(list(distinct.values()))
    merged = _Merged()
    for plan in plans:
        for segment in plan.segments:
            for part, _ in _parts(segment, common):
                merged.add(part)
    places = merged.places()
    pieces = tuple(
        tuple(own for segment in plan.segments for own in _pieces(segment, common, places)) for plan in plans
    )
    return SharedPlan(Plan(merged.segments()), pieces)


class _Merged:
    """Segments, each distinct one once, with the selectors of all that are the same."""

    def __init__(self) -> None:
        self._rows: dict[Hashable, Segment] = {}
        self._selectors: dict[Hashable, dict[Hashable, Selector]] = {}

    def add(self, segment: Segment) -> None:
        key = _row_key(segment)
        self._rows.setdefault(key, segment)
        own = self._selectors.setdefault(key, {})
        own.update({_selector_key(selector): selector for selector in segment.selectors})

    def segments(self) -> tuple[Segment, ...]:
        return tuple(
            _with_selectors(segment, tuple(self._selectors[key].values())) for key, segment in self._rows.items()
        )

    def places(self) -> dict[Hashable, int]:
        """Position of each evaluation, by what it is of."""
        every = (place for rows, selectors in self._selectors.items() for place in _places(rows, selectors))
        return {place: position for position, place in enumerate(every)}


def _common_points(segments: Sequence[Segment]) -> frozenset[Hashable]:
    """Points that stand in several segments."""
    if len(segments) < 2:
        return frozenset()
    counts = Counter(point for segment in segments for point in _points(segment))
    return frozenset(point for point, count in counts.items() if count > 1)


def _parts(segment: Segment, common: frozenset[Hashable]) -> Iterator[tuple[Segment, NDArray[np.int64]]]:
    """The segment without its common points, and each of these by itself with weight 1; with positions of rows."""
    alone = np.array([point in common for point in _points(segment)]) if common else np.zeros(segment.row_count, bool)
    rest = np.flatnonzero(~alone)
    if len(rest) == segment.row_count:
        yield segment, rest
        return
    if len(rest):
        yield replace(segment, alphas=segment.alphas[rest], weights=segment.weights[rest]), rest
    for row in np.flatnonzero(alone):
        yield _single(segment, float(segment.alphas[row])), np.array([row])


def _single(segment: Segment, alpha: float) -> Segment:
    """One row with weight 1; at an end of the path by this end alone, as a method that has no path asks for it."""
    if alpha in (0.0, 1.0):
        end = segment.end if alpha else segment.start
        return replace(segment, start=end, end=end, alphas=_ONE, weights=_ONE)
    return replace(segment, alphas=np.array([alpha]), weights=_ONE)


def _pieces(
    segment: Segment, common: frozenset[Hashable], places: Mapping[Hashable, int]
) -> Iterator[tuple[Piece, ...]]:
    """For each evaluation of a segment what it is put together from."""
    selectors = list(map(_selector_key, segment.selectors))
    parts = [(_places(_row_key(part), selectors), part, rows) for part, rows in _parts(segment, common)]
    for number in range(segment.evaluation_count):
        yield tuple(
            Piece(places[own[number]], rows, _weight(segment, rows) if part.weights is _ONE else None)
            for own, part, rows in parts
        )


def _weight(segment: Segment, rows: NDArray[np.int64]) -> float:
    return float(segment.weights[rows[0]])


def _put_together(pieces: tuple[Piece, ...], found: Sequence[SegmentEvaluation]) -> SegmentEvaluation:
    if len(pieces) == 1 and pieces[0].weight in (None, 1.0):
        return found[pieces[0].position]
    parts = [(piece, found[piece.position]) for piece in pieces]
    order = np.argsort(np.concatenate([piece.rows for piece in pieces]), kind="stable")
    scores = np.concatenate([part.scores for _, part in parts])
    outputs = [part.outputs for _, part in parts if part.outputs is not None]
    return SegmentEvaluation(
        scores[order] if len(scores) else scores,
        _gradient_sums(parts),
        np.concatenate(outputs)[order] if outputs else None,
        {name: np.concatenate([part.values[name] for _, part in parts])[order] for name in parts[0][1].values},
    )


def _gradient_sums(parts: Sequence[tuple[Piece, SegmentEvaluation]]) -> dict[str, NDArray[np.floating]]:
    """In float64; rows of weight 0 are left out, for 0 x NaN is NaN."""
    sums: dict[str, NDArray[np.floating]] = {}
    for piece, part in parts:
        for name, gradient in part.gradient_sums.items():
            sums.setdefault(name, np.zeros(gradient.shape))
            if piece.weight != 0:
                sums[name] = sums[name] + gradient * np.float64(1 if piece.weight is None else piece.weight)
    return sums


def _with_selectors(segment: Segment, selectors: tuple[Selector, ...]) -> Segment:
    return segment if segment.selectors == selectors else replace(segment, selectors=selectors)


def _places(rows: Hashable, selectors: Iterable[Hashable]) -> list[Hashable]:
    """What each evaluation of rows with these keys is of."""
    return [(rows, selector) for selector in selectors] or [rows]


def _points(segment: Segment) -> list[Hashable]:
    """What each row of a segment is evaluated at, and for."""
    start, end, fixed = map(_identity, (segment.start, segment.end, segment.fixed))
    what = (fixed, segment.function, bool(segment.selectors))
    whole = {0.0: start, 1.0: end}
    alphas = segment.alphas.tolist()
    return [(*what, start if start == end else whole.get(alpha, (start, end, alpha))) for alpha in alphas]


def _row_key(segment: Segment) -> Hashable:
    """Equal for segments whose rows are the same points, evaluated for the same kind of answer."""
    return (
        *map(_identity, (segment.start, segment.end, segment.fixed)),
        segment.function,
        segment.alphas.tobytes(),
        segment.weights.tobytes(),
        bool(segment.selectors),
    )


def _identity(tensors: Tensors) -> Hashable:
    return tuple((name, id(array)) for name, array in tensors.items())


def _selector_key(selector: Selector) -> Hashable:
    return selector.indices.tobytes(), selector.weights.tobytes()
