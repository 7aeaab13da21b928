"""Adaptive quadrature of gradients along a path: points where the gradient is rough, in a few batched rounds.

The integrand alpha -> g(alpha) jumps wherever a ReLU or a max pool switches. Seen from afar, many small jumps in
unrelated directions look like Brownian motion of some local intensity v(alpha). For such a process the best estimate of
the integral from values at nodes is the trapezoid rule between neighbours, with constant extrapolation to both ends of
the path, and its expected squared error is v h^3 / 12 for a gap of width h, and v h^3 / 3 for an end piece. Both the
placement of points (the largest error per row is refined first) and the reported error (the sum over all intervals)
follow from this one formula.

Bisecting changes the estimate by a vector whose expected squared length is the error that disappears, so every
refinement measures v anew. As far as the nodes show that the integrand is smooth, its curvature corrects the integral,
and its error with it (`smoothness.py`). The rule is open: no gradient is taken at x' or x, where constant images tie in
every max pool.

    0----o--------o--------o-- ... --o----1    pilot: 8 nodes, so 7 gaps and 2 end pieces
    0-o--o--------o----o---o-- ... --o----1    a gap is bisected, an end piece gets a node at a third from its end

Up to MAX_SEPARATE_INTERVALS an added node parts its interval in two, and each node's gradient comes back alone. Beyond,
whole intervals are doubled: the sum over their inner nodes is kept, its weight halves, and one more sum comes back. The
scores of the nodes and the end points give each interval's own completeness residual; it finds transitions that are too
narrow for any gradient.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from explainserve.explanation import Question, completeness_scale
from explainserve.methods.smoothness import Smoothness, smoothness
from explainserve.plan import Evaluation, Plan, Segment, SegmentEvaluation, Tensors

PILOT_COUNT = 8
MIN_STEP_COUNT = 16
"""The pilot and one refinement: without it nothing is known about the error."""
MAX_SEPARATE_INTERVALS = 32
"""Bounds memory and traffic: gradients of at most about this many single nodes, and as many sums, are kept and
returned."""
MIN_SPACING = 2.0**-20
"""Narrower gaps are below the resolution of float32 inputs."""
RESIDUAL_SHARE = 0.1
"""Weight of an interval's squared completeness residual beside its squared map error, each relative to its tolerance.
Small, because the residual sees only one direction of the error; what matters is that it is not zero."""
SAMPLED_ELEMENTS = 1 << 14
"""Elements, evenly spaced, that tell how smooth an integrand is: they are many enough, and all would take long."""
NEGLIGIBLE = 1e-6
"""Squared error, in units of the squared tolerance, that is taken for rounding: a thousandth of the tolerance."""

Vector = NDArray[np.floating]


@dataclass(frozen=True)
class Tolerances:
    """What counts as converged: both relative, in (0, 1]."""

    map_error: float
    completeness: float


@dataclass(frozen=True, eq=False)
class Displacement:
    """x - x' of all moving inputs as one float64 vector of the elements that differ.

    Elements that are equal get no attribution whatever their gradient is, so their gradients are dropped on arrival.
    """

    values: NDArray[np.float64]
    changed: NDArray[np.bool_]
    names: tuple[str, ...]

    @classmethod
    def of(cls, question: Question) -> Displacement:
        """The displacement of a question's path."""
        names = tuple(question.instance.moving)
        values = _flat(question.instance.moving, names).astype(np.float64)
        values -= _flat(question.start, names)
        changed = values != 0
        return cls(values[changed], changed, names)

    def gradient(self, evaluation: SegmentEvaluation) -> Vector:
        """The gradient sum of a segment at the elements that change."""
        gradient = _flat(evaluation.gradient_sums, self.names)
        return gradient if len(self.values) == len(gradient) else gradient[self.changed]

    def samples(self, gradients: Sequence[Vector]) -> NDArray[np.float64]:
        """Some elements of the attributions of gradients, always the same ones, shape (gradients, elements)."""
        every = -(-len(self.values) // SAMPLED_ELEMENTS) or 1
        return np.asarray(self.values[::every] * np.stack([gradient[::every] for gradient in gradients]))

    def squared_norm(self, gradient: Vector) -> float:
        """Squared length of the attribution of a gradient; float64, where squares of tiny gradients do not vanish."""
        attribution = self.values * gradient
        return float(attribution @ attribution)

    def tensors(self, gradient: Vector, like: Tensors) -> dict[str, NDArray[np.float32]]:
        """The attribution of a gradient, as float32 tensors in the shapes of the inputs."""
        flat = np.zeros(self.changed.size, np.float32)
        with np.errstate(over="ignore"):
            flat[self.changed] = self.values * gradient
        ends = np.cumsum([like[name].size for name in self.names])
        pieces = np.split(flat, ends[:-1])
        return {name: piece.reshape(like[name].shape) for name, piece in zip(self.names, pieces, strict=True)}


@dataclass(frozen=True, eq=False)
class Node:
    """A point of the path; at alpha 0 and 1 only the score is evaluated, and the gradient is that of the nearest node.

    Attributes:
        slope: derivative of the score along the path, the sum of the gradient's attribution.
    """

    alpha: float
    score: float
    gradient: Vector
    slope: float


@dataclass(frozen=True, eq=False)
class Interval:
    """A piece of the path between two nodes, cut into equal gaps.

    Attributes:
        gap_count: 1, or a power of 2 where inner nodes are known by their sums only.
        squared_error: expected squared error of this interval's part of the map.
        inner_gradient, inner_slope: sums over the inner nodes.
        inner_alphas, inner_scores: of the inner nodes, ascending.
    """

    left: Node
    right: Node
    squared_error: float
    gap_count: int = 1
    inner_gradient: Vector | None = None
    inner_slope: float = 0.0
    inner_alphas: tuple[float, ...] = ()
    inner_scores: tuple[float, ...] = ()

    @property
    def width(self) -> float:
        """Length in alpha."""
        return self.right.alpha - self.left.alpha

    @property
    def spacing(self) -> float:
        """Length of one gap."""
        return self.width / self.gap_count

    @property
    def is_end(self) -> bool:
        """Whether it reaches to x' or x."""
        return self.left.alpha == 0 or self.right.alpha == 1

    @property
    def residual(self) -> float:
        """What the trapezoid rule of the slope misses of the score's change: exact, all scores are known."""
        integral = self.spacing * (0.5 * (self.left.slope + self.right.slope) + self.inner_slope)
        return integral - (self.right.score - self.left.score)

    @property
    def terms(self) -> list[tuple[float, Vector]]:
        """The trapezoid rule of the gradient as a weighted sum."""
        ends = [(0.5 * self.spacing, self.left.gradient), (0.5 * self.spacing, self.right.gradient)]
        return ends if self.inner_gradient is None else [*ends, (self.spacing, self.inner_gradient)]


@dataclass(frozen=True)
class Refinement:
    """Rows that are added to one interval, ascending.

    Attributes:
        gap_count: 0 where every row becomes a node; otherwise the interval's new number of gaps.
    """

    interval: int
    alphas: tuple[float, ...]
    gap_count: int = 0

    def segments(self, question: Question) -> tuple[Segment, ...]:
        """One segment where the sum is enough, else one per row."""
        groups = [self.alphas] if self.gap_count else [(alpha,) for alpha in self.alphas]
        return tuple(_segment(question, group) for group in groups)


@dataclass(frozen=True, eq=False)
class Path:
    """What is known of a path after some rounds.

    Attributes:
        intervals: ascending, without gaps between them.
        trapezoids: the trapezoid rule of the gradient at the elements that change, float64.
        history: (rows, |convergence delta|) of the earlier rounds.
    """

    question: Question
    displacement: Displacement
    intervals: tuple[Interval, ...]
    trapezoids: NDArray[np.float64]
    step_count: int
    history: tuple[tuple[int, float], ...] = ()

    @property
    def finite(self) -> bool:
        """Whether all gradients and scores so far are finite."""
        return all(math.isfinite(interval.residual) for interval in self.intervals)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The points whose gradients are known one by one, ascending."""
        return tuple(interval.right for interval in self.intervals[:-1])

    @cached_property
    def smoothness(self) -> Smoothness:
        """How the curvature of the integrand corrects the trapezoid rule; not at all after the pilot alone."""
        if self.step_count < MIN_STEP_COUNT:
            return Smoothness(np.zeros(len(self.nodes)))
        first, *gaps, last = self.intervals
        return smoothness(
            np.array([node.alpha for node in self.nodes]),
            np.array([gap.spacing for gap in gaps]),
            (first.width, last.width),
            self.displacement.samples([node.gradient for node in self.nodes]),
        )

    @cached_property
    def gradient(self) -> NDArray[np.float64]:
        """Integral of the gradient at the elements that change."""
        gradient = self.trapezoids.copy()
        for coefficient, node in zip(self.smoothness.coefficients, self.nodes, strict=True):
            if coefficient:
                gradient += coefficient * node.gradient
        return gradient

    @cached_property
    def norm(self) -> float:
        """L2 norm of the map."""
        return float(np.sqrt(self.displacement.squared_norm(self.gradient)))

    @cached_property
    def map_error(self) -> float:
        """Estimated relative L2 error of the map; infinite where the map is zero and its error is not."""
        first, *gaps, last = (interval.squared_error for interval in self.intervals)
        squared_error = self.smoothness.gap_share * sum(gaps) + self.smoothness.end_share * (first + last)
        return _ratio(float(np.sqrt(squared_error)), self.norm)

    @cached_property
    def convergence_delta(self) -> float:
        """Sum of the map minus the change of the score."""
        correction = self.smoothness.coefficients @ [node.slope for node in self.nodes]
        return sum(interval.residual for interval in self.intervals) + float(correction)

    @cached_property
    def completeness_scale(self) -> float:
        """What the convergence delta is compared with."""
        abs_sum = float(np.abs(self.displacement.values * self.gradient).sum())
        return completeness_scale(self.question.output_change, abs_sum)

    def converged(self, tolerances: Tolerances) -> bool:
        """Whether both tolerances hold, after at least one refinement."""
        complete = abs(self.convergence_delta) <= tolerances.completeness * self.completeness_scale
        return self.step_count >= MIN_STEP_COUNT and complete and self.map_error <= tolerances.map_error

    def stalled(self, tolerances: Tolerances) -> bool:
        """Whether the map has settled and yet its sum misses the change of the score, so that more rows do not help.

        Either what is missing sits in gaps below the resolution of the inputs (a jump of the score), or it is spread
        over many intervals and has not fallen by a tenth while the number of rows doubled (a quantized score).
        """
        if self.map_error > tolerances.map_error:
            return False
        residuals = np.array([interval.residual for interval in self.intervals])
        narrow = np.array([interval.spacing < MIN_SPACING for interval in self.intervals])
        unresolvable = abs(residuals[narrow].sum()) > tolerances.completeness * self.completeness_scale
        spread = np.abs(residuals).sum() ** 2 > 8 * (residuals @ residuals)
        return bool(unresolvable or (self.step_count >= 64 and spread and self.delta_stands_still))

    @property
    def delta_stands_still(self) -> bool:
        """Whether the convergence delta has not fallen by a tenth since there were half as many rows."""
        earlier = [delta for rows, delta in self.history if 2 * rows <= self.step_count]
        return bool(earlier) and abs(self.convergence_delta) >= 0.9 * earlier[-1]

    def score_path(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Alphas, ascending from 0 to 1, and scores of all points."""
        alphas, scores = [0.0], [self.question.start_output_value]
        for interval in self.intervals:
            alphas += [*interval.inner_alphas, interval.right.alpha]
            scores += [*interval.inner_scores, interval.right.score]
        return np.array(alphas), np.array(scores)

    def refined(self, refinements: Sequence[Refinement], evaluation: Evaluation) -> Path:
        """This path with the rows of one more round."""
        intervals, trapezoids = list(self.intervals), self.trapezoids.copy()
        arrivals = iter(evaluation.segments)
        # From the last interval to the first, positions of the others stay.
        arrived = [(refinement, self._arrival(refinement, arrivals)) for refinement in refinements]
        for refinement, segments in reversed(arrived):
            parent = intervals[refinement.interval]
            children = _refine(parent, refinement, segments, self.displacement)
            gain = _gain(parent, children)
            trapezoids += gain
            intervals[refinement.interval : refinement.interval + 1] = _with_errors(
                parent, children, gain, self.displacement
            )
        return replace(
            self,
            intervals=tuple(intervals),
            trapezoids=trapezoids,
            step_count=self.step_count + sum(len(refinement.alphas) for refinement in refinements),
            history=(*self.history, (self.step_count, abs(self.convergence_delta))),
        )

    @staticmethod
    def _arrival(refinement: Refinement, arrivals: Iterator[SegmentEvaluation]) -> list[SegmentEvaluation]:
        return [next(arrivals) for _ in range(1 if refinement.gap_count else len(refinement.alphas))]


@dataclass(frozen=True, eq=False)
class AdaptivePlan(Plan):
    """One round of rows, and the path that it refines; the first round has none.

    Attributes:
        refinements: whose segments the plan's segments are, in order.
    """

    path: Path | None = None
    refinements: tuple[Refinement, ...] = ()

    def evaluated(self, question: Question, evaluation: Evaluation) -> Path:
        """The path after this round."""
        if self.path is None:
            return _pilot_path(question, evaluation)
        return self.path.refined(self.refinements, evaluation)


def pilot(question: Question) -> AdaptivePlan:
    """The first round: the midpoints of 8 equal pieces of the path, a segment each."""
    alphas = (np.arange(PILOT_COUNT) + 0.5) / PILOT_COUNT
    return AdaptivePlan(tuple(_segment(question, (alpha,)) for alpha in alphas))


def next_round(path: Path, tolerances: Tolerances, max_step_count: int) -> AdaptivePlan:
    """Rows where they help most; the plan is empty where none are left or no gap can be refined.

    After each round there are 8, 16, 24, 32, 48, 64, 96, 128... rows: few rounds, and little beyond what was needed.
    """
    growth = max(PILOT_COUNT, 2 ** (path.step_count.bit_length() - 2))
    row_count = min(growth, max_step_count - path.step_count)
    refinements = _Allocation(path, tolerances).refinements(row_count)
    segments = [segment for refinement in refinements for segment in refinement.segments(path.question)]
    return AdaptivePlan(tuple(segments), path, refinements)


@dataclass(frozen=True, order=True)
class _Piece:
    """A gap, or an interval of several, in the order in which rows go there.

    The benefit, in units of what is tolerated, is rounded to 3 significant digits and to 0 below NEGLIGIBLE, so that
    rounding of the model's numbers seldom moves a point; ties go to the wider and then to the lower piece.
    """

    negative_benefit: float
    negative_width: float
    left: float
    right: float
    interval: int
    gap_count: int
    squared_error: float
    squared_residual: float

    @classmethod
    def of(
        cls,
        bounds: tuple[float, float],
        interval: int,
        squared_error: float,
        squared_residual: float,
        gap_count: int = 1,
    ) -> _Piece:
        benefit = (squared_error + squared_residual) / gap_count
        benefit = float(f"{benefit:.2e}") if benefit > NEGLIGIBLE else 0.0
        left, right = bounds
        return cls(-benefit, left - right, left, right, interval, gap_count, squared_error, squared_residual)

    def doubled(self) -> _Piece:
        """What is expected of this piece when each of its gaps is bisected."""
        return _Piece.of(
            (self.left, self.right),
            self.interval,
            self.squared_error / 4,
            self.squared_residual / 4,
            2 * self.gap_count,
        )

    def parted(self) -> tuple[float, tuple[_Piece, _Piece]]:
        """A new node and the two pieces around it: errors fall with the cube of the width, and a jump's residual with
        it.

        An end piece is covered by its inner node alone, as far as four times that of a gap.
        """
        end = self.left == 0 or self.right == 1
        share = 1 / 3 if self.left == 0 else 2 / 3 if self.right == 1 else 1 / 2
        node = self.left + share * (self.right - self.left)
        pieces = []
        for bounds in ((self.left, node), (node, self.right)):
            part = (bounds[1] - bounds[0]) / (self.right - self.left)
            becomes_gap = end and bounds[0] != 0 and bounds[1] != 1
            error = self.squared_error * part**3 / (4 if becomes_gap else 1)
            pieces.append(_Piece.of(bounds, self.interval, error, self.squared_residual * part**2))
        return node, (pieces[0], pieces[1])


class _Allocation:
    """Spreads the rows of one round over the intervals, greedily by benefit per row."""

    def __init__(self, path: Path, tolerances: Tolerances) -> None:
        self._path = path
        self._nodes: dict[int, list[float]] = {}
        self._gap_counts: dict[int, int] = {}
        self._interval_count = len(path.intervals)
        self._heap = list(_pieces(path, tolerances))
        heapq.heapify(self._heap)

    def refinements(self, row_count: int) -> tuple[Refinement, ...]:
        """At most `row_count` rows, by ascending interval."""
        while row_count and self._heap:
            row_count -= self._refine(heapq.heappop(self._heap), row_count)
        parted = [Refinement(interval, tuple(sorted(nodes))) for interval, nodes in self._nodes.items()]
        doubled = [self._doubling(interval, gap_count) for interval, gap_count in self._gap_counts.items()]
        return tuple(sorted(parted + doubled, key=lambda refinement: refinement.interval))

    def _refine(self, piece: _Piece, row_count: int) -> int:
        """Rows that the piece takes; 0 drops it from this round."""
        if piece.gap_count > row_count or (piece.right - piece.left) / piece.gap_count < MIN_SPACING:
            return 0
        if self._may_part(piece):
            node, pieces = piece.parted()
            self._nodes.setdefault(piece.interval, []).append(node)
            self._interval_count += 1
            for part in pieces:
                heapq.heappush(self._heap, part)
            return 1
        if piece.interval in self._nodes:
            return 0
        self._gap_counts[piece.interval] = 2 * piece.gap_count
        heapq.heappush(self._heap, piece.doubled())
        return piece.gap_count

    def _may_part(self, piece: _Piece) -> bool:
        """End pieces have no inner nodes, and a jump is found only by parting again and again."""
        if piece.gap_count > 1 or piece.interval in self._gap_counts:
            return False
        room = self._interval_count < MAX_SEPARATE_INTERVALS
        return room or self._path.intervals[piece.interval].is_end or piece.squared_residual > piece.squared_error

    def _doubling(self, interval: int, gap_count: int) -> Refinement:
        whole = self._path.intervals[interval]
        fraction = gap_count // whole.gap_count
        steps = [step for step in range(1, gap_count) if step % fraction]
        alphas = tuple(whole.left.alpha + whole.width * step / gap_count for step in steps)
        return Refinement(interval, alphas, gap_count)


def _pieces(path: Path, tolerances: Tolerances) -> Iterator[_Piece]:
    """All intervals, with their errors relative to what is tolerated."""
    error_unit = (tolerances.map_error * path.norm) ** 2
    residual_unit = (tolerances.completeness * path.completeness_scale) ** 2
    for position, interval in enumerate(path.intervals):
        error = _ratio(interval.squared_error, error_unit)
        residual = RESIDUAL_SHARE * _ratio(interval.residual**2, residual_unit)
        bounds = (interval.left.alpha, interval.right.alpha)
        yield _Piece.of(bounds, position, error, residual, interval.gap_count)


def _pilot_path(question: Question, evaluation: Evaluation) -> Path:
    displacement = Displacement.of(question)
    alphas = [(k + 0.5) / PILOT_COUNT for k in range(PILOT_COUNT)]
    inner = [_node(alpha, segment, displacement) for alpha, segment in zip(alphas, evaluation.segments, strict=True)]
    first = replace(inner[0], alpha=0.0, score=question.start_output_value)
    last = replace(inner[-1], alpha=1.0, score=question.instance_output_value)
    errors = _pilot_errors(inner, displacement)
    pairs = pairwise([first, *inner, last])
    intervals = tuple(Interval(left, right, error) for (left, right), error in zip(pairs, errors, strict=True))
    gradient = np.asarray(np.mean([node.gradient for node in inner], axis=0, dtype=np.float64))
    return Path(question, displacement, intervals, gradient, PILOT_COUNT)


def _pilot_errors(nodes: Sequence[Node], displacement: Displacement) -> list[float]:
    """Expected squared errors of the first intervals, from second differences, which a steady drift leaves at zero."""
    spacing = 1 / PILOT_COUNT
    triples = zip(nodes, nodes[1:], nodes[2:], strict=False)
    bends = [displacement.squared_norm(a.gradient - 2 * b.gradient + c.gradient) for a, b, c in triples]
    intensity = np.array([bends[0], *bends, bends[-1]]) / (2 * spacing)
    gaps = (intensity[1:] + intensity[:-1]) / 2 * spacing**3 / 12
    ends = intensity[[0, -1]] * (spacing / 2) ** 3 / 3
    return [float(ends[0]), *map(float, gaps), float(ends[1])]


def _refine(
    parent: Interval, refinement: Refinement, segments: Sequence[SegmentEvaluation], displacement: Displacement
) -> list[Interval]:
    """The intervals that replace `parent`, their errors still to be estimated."""
    if refinement.gap_count:
        return [_doubled(parent, refinement, segments[0], displacement)]
    pairs = zip(refinement.alphas, segments, strict=True)
    nodes = [_node(alpha, segment, displacement) for alpha, segment in pairs]
    left, right = parent.left, parent.right
    if left.alpha == 0:
        left = replace(left, gradient=nodes[0].gradient, slope=nodes[0].slope)
    if right.alpha == 1:
        right = replace(right, gradient=nodes[-1].gradient, slope=nodes[-1].slope)
    return [Interval(a, b, 0.0) for a, b in pairwise([left, *nodes, right])]


def _doubled(
    parent: Interval, refinement: Refinement, segment: SegmentEvaluation, displacement: Displacement
) -> Interval:
    gradient = displacement.gradient(segment)
    inner = gradient if parent.inner_gradient is None else parent.inner_gradient + gradient
    scores = dict(zip(parent.inner_alphas, parent.inner_scores, strict=True))
    scores.update(zip(refinement.alphas, map(float, segment.scores), strict=True))
    alphas = tuple(sorted(scores))
    return replace(
        parent,
        gap_count=refinement.gap_count,
        inner_gradient=inner,
        inner_slope=float(inner @ displacement.values),
        inner_alphas=alphas,
        inner_scores=tuple(scores[alpha] for alpha in alphas),
    )


def _gain(parent: Interval, children: Sequence[Interval]) -> NDArray[np.float64]:
    """How far the integral moves when `children` replace `parent`; each gradient is read once."""
    coefficients: dict[int, float] = {}
    gradients: dict[int, Vector] = {}
    for sign, interval in [(-1, parent), *((1, child) for child in children)]:
        for coefficient, gradient in interval.terms:
            gradients[id(gradient)] = gradient
            coefficients[id(gradient)] = coefficients.get(id(gradient), 0.0) + sign * coefficient
    total = np.zeros(parent.left.gradient.shape)
    product = np.empty_like(total)
    for key, gradient in gradients.items():
        total += np.multiply(gradient, coefficients[key], out=product)
    return total


def _with_errors(
    parent: Interval, children: Sequence[Interval], gain: Vector, displacement: Displacement
) -> list[Interval]:
    """The children with their expected squared errors.

    Brownian motion: the integral moves by a squared length of v (H^3 - sum h^3) / 12 in expectation when a gap of width
    H becomes gaps of widths h, and v sum h^3 / 12 is left. What is left is shared in proportion to each gap's own
    difference of gradients.
    """
    if len(children) == 1:
        (child,) = children
        left = displacement.squared_norm(gain) / ((child.gap_count / parent.gap_count) ** 2 - 1)
        return [replace(child, squared_error=left)]
    widths = np.array([child.width for child in children])
    differences = [displacement.squared_norm(child.right.gradient - child.left.gradient) for child in children]
    if parent.is_end:
        errors = _end_errors(children[0].left.alpha == 0, widths, np.array(differences))
    else:
        cubes = float((widths**3).sum())
        shares = widths**2 * differences
        left = displacement.squared_norm(gain) * cubes / (parent.width**3 - cubes)
        errors = shares * (left / shares.sum()) if shares.any() else shares  # a gain without differences is rounding
    return [replace(child, squared_error=float(error)) for child, error in zip(children, errors, strict=True)]


def _end_errors(at_start: bool, widths: NDArray[np.float64], differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Errors from first differences: an end piece has no node beyond it, so a drift is not seen to cancel."""
    errors = widths**2 * differences / 12
    end, neighbour = (0, 1) if at_start else (-1, -2)
    errors[end] = differences[neighbour] / widths[neighbour] * widths[end] ** 3 / 3
    return errors


def _node(alpha: float, segment: SegmentEvaluation, displacement: Displacement) -> Node:
    gradient = displacement.gradient(segment)
    return Node(alpha, float(segment.scores[0]), gradient, float(gradient @ displacement.values))


def _segment(question: Question, alphas: Sequence[float]) -> Segment:
    return Segment(
        start=question.start,
        end=question.instance.moving,
        fixed=question.instance.fixed,
        function=question.gradient,
        alphas=np.array(alphas, np.float64),
        weights=np.ones(len(alphas)),
        selectors=(question.target.selector,),
    )


def _flat(tensors: Mapping[str, NDArray[np.generic]], names: Sequence[str]) -> NDArray[np.floating]:
    """All inputs one after another, at least float32: half precision would overflow in sums."""
    pieces = [tensors[name].reshape(-1) for name in names]
    flat = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return flat.astype(np.result_type(flat.dtype, np.float32), copy=False)


def _ratio(numerator: float, denominator: float) -> float:
    """0 / 0 is 0: nothing is missing of nothing."""
    if numerator == 0:
        return 0.0
    return numerator / denominator if denominator > 0 else float("inf")
