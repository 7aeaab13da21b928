"""Important Direction Gradient Integration (Yang, Wang, Bilgic: IDGI: A Framework to Eliminate Explanation Noise from
Integrated Gradients, CVPR 2023, algorithm 1) along the path of another method.

The path goes its own way, with each of its nodes as a row by itself, which is shared with the path's own method in the
same request. The change of the score from one node to the next is given to the elements in proportion to the squared
gradient at the first of the two. Before the first node, where the path starts outside its nodes, it is the gradient of
the first node; after the last, that of the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import InvalidRequest
from explainserve.explanation import Attribution, Question, Subject
from explainserve.methods.blur_integrated_gradients import BlurIntegratedGradients
from explainserve.methods.contract import FLOAT32_BYTES, WORKING_ARRAYS, Cost, Method, Needs, ReadingGuide
from explainserve.methods.guided_integrated_gradients import GuidedIntegratedGradients
from explainserve.methods.integrated_gradients import IntegratedGradients
from explainserve.plan import Evaluation, Plan, Segment, SegmentEvaluation

PATHS = (IntegratedGradients, BlurIntegratedGradients, GuidedIntegratedGradients)
DEFAULT_STEP_COUNT = 50

Vectors = Mapping[str, NDArray[np.float64]]

_WHOLE = np.ones(1)


@dataclass(frozen=True, eq=False)
class Shares:
    """The changes of the score up to a node, given to the elements.

    Attributes:
        sums: by input, float64; empty before the first gradient.
        direction: the squared gradient of the last node that has one, over its sum; empty before.
        score: at the last node; None before the first.
    """

    score: float | None
    sums: Vectors = field(default_factory=dict)
    direction: Vectors = field(default_factory=dict)

    def at(self, node: SegmentEvaluation) -> Shares:
        """With the change from the last node to this one."""
        own = _direction(node)
        score = float(node.scores[0])
        return Shares(score, self.up_to(score, self.direction or own), own or self.direction)

    def up_to(self, score: float, direction: Vectors) -> Vectors:
        """The sums with a further change of the score."""
        change = 0.0 if self.score is None else score - self.score
        return {name: self.sums.get(name, 0) + change * share for name, share in direction.items()}


@dataclass(frozen=True, eq=False)
class NodesPlan(Plan):
    """A round of the path with a row for each node.

    Attributes:
        of_path: the round as the path's method plans it.
        shares: of the nodes before.
    """

    of_path: Plan
    shares: Shares


@dataclass(frozen=True)
class Idgi(Method):
    """Changes of the score along a path, shared in proportion to the squared gradient.

    They sum to F(x) - F(x') by construction, but for steps whose gradient is zero, which are nobody's.

    Attributes:
        path: Integrated Gradients by a fixed rule, the left one with 50 steps by default, or Blur or Guided
            Integrated Gradients.

    Raises:
        InvalidRequest: BASE_METHOD_UNSUITABLE.
    """

    path: Method | None = None

    def __post_init__(self) -> None:
        if self.path is None:
            object.__setattr__(self, "path", IntegratedGradients(DEFAULT_STEP_COUNT, "left"))
        adaptive = isinstance(self.path, IntegratedGradients) and self.path.step_count is None
        if adaptive or not isinstance(self.path, PATHS):
            kind = type(self.path).__name__
            raise InvalidRequest(
                "BASE_METHOD_UNSUITABLE",
                f"{'adaptive ' if adaptive else ''}{kind} has no path of fixed nodes in order; there are "
                f"{', '.join(path.__name__ for path in PATHS)} with a step_count",
                method=kind,
            )

    @property
    def reading_guide(self) -> ReadingGuide:
        """How the path is read, but for its sum."""
        return replace(
            self._path.reading_guide,
            complete_by_construction=True,
            paper="Yang, Wang, Bilgic: IDGI: A Framework to Eliminate Explanation Noise from Integrated Gradients, "
            "CVPR 2023, arXiv:2303.14242",
        )

    @property
    def needs(self) -> Needs:
        """Those of the path."""
        return self._path.needs

    def resolved(self, subject: Subject) -> Self:
        """With the path resolved."""
        return replace(self, path=self._path.resolved(subject))

    def cost(self, subject: Subject) -> Cost:
        """That of the path."""
        return self._path.cost(subject)

    def path_bytes(self, subject: Subject) -> int:
        """That of the path, and all gradients where the path's method is content with their sum."""
        sums = isinstance(self.path, IntegratedGradients)
        arrays = WORKING_ARRAYS + sums * self.cost(subject).max_gradient_rows
        return self._path.path_bytes(subject) + arrays * FLOAT32_BYTES * subject.element_count

    def plan(self, question: Question) -> Plan:
        """The first round of the path."""
        start = question.start_output_value if self.reading_guide.needs_baseline else None
        return _nodes_of(self._path.plan(question), Shares(start))

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution | Plan:
        """The next round of the path, or the map at its end."""
        assert isinstance(plan, NodesPlan), "Not a plan of this method. This is a bug."
        shares = plan.shares
        for node in evaluation.segments:
            shares = shares.at(node)
        outcome = self._path.attribution(question, plan.of_path, _as_planned(plan.of_path, evaluation))
        return _nodes_of(outcome, shares) if isinstance(outcome, Plan) else _answer(question, shares, outcome)

    def so_far(self, question: Question, upcoming: Plan) -> Attribution:
        """The map if the rest of the path was one step."""
        assert isinstance(upcoming, NodesPlan), "Not a plan of this method. This is a bug."
        return _answer(question, upcoming.shares, self._path.so_far(question, upcoming.of_path))

    @property
    def _path(self) -> Method:
        assert self.path is not None, "Set after construction."
        return self.path


def _answer(question: Question, shares: Shares, of_path: Attribution) -> Attribution:
    """The path's own answer with another map."""
    sums = shares.up_to(question.instance_output_value, shares.direction)
    with np.errstate(over="ignore"):
        tensors = {name: total.astype(np.float32) for name, total in sums.items()}
    return replace(of_path, tensors=tensors).checked()


def _direction(node: SegmentEvaluation) -> dict[str, NDArray[np.float64]]:
    """Zero where the gradient is."""
    squares = {name: np.square(gradient, dtype=np.float64) for name, gradient in node.gradient_sums.items()}
    total = sum(float(square.sum()) for square in squares.values())
    return {name: square / (total or 1.0) for name, square in squares.items()}


def _nodes_of(plan: Plan, shares: Shares) -> NodesPlan:
    return NodesPlan(tuple(node for segment in plan.segments for node in _nodes(segment)), plan, shares)


def _nodes(segment: Segment) -> Iterator[Segment]:
    for alpha in segment.alphas:
        yield replace(segment, alphas=np.array([alpha]), weights=_WHOLE)


def _as_planned(plan: Plan, evaluation: Evaluation) -> Evaluation:
    """What would have come back for the path's own plan."""
    nodes = iter(evaluation.segments)
    return Evaluation(tuple(_sum(segment, [next(nodes) for _ in segment.alphas]) for segment in plan.segments))


def _sum(segment: Segment, nodes: Sequence[SegmentEvaluation]) -> SegmentEvaluation:
    sums = {
        name: sum((w * node.gradient_sums[name] for w, node in zip(segment.weights, nodes, strict=True)), np.zeros(()))
        for name in nodes[0].gradient_sums
    }
    return SegmentEvaluation(np.concatenate([node.scores for node in nodes]), sums)
