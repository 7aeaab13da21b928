"""Functions with known gradients, and an evaluator of plans for them in numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from explainserve.explanation import Attribution, Baseline, Instance, Question, Subject, Target
from explainserve.methods import IntegratedGradients, Method
from explainserve.plan import Evaluation, Plan, Segment, SegmentEvaluation, Selector
from explainserve.signature import MapSpec, Score, ScoreHead

Value = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass
class Function:
    """A scalar function of rows.

    Attributes:
        value: rows of shape (n, elements) to values of shape (n,).
        gradient: the same rows to gradients of shape (n, elements).
        alphas: where gradients were taken so far.
    """

    value: Value
    gradient: Value
    alphas: list[float] = field(default_factory=list)

    def evaluate(self, plan: Plan) -> Evaluation:
        """What a backend returns for the plan: scores, and one float32 gradient sum per segment."""
        return Evaluation(tuple(self._segment(segment) for segment in plan.segments))

    def _segment(self, segment: Segment) -> SegmentEvaluation:
        if not segment.function.wrt:
            return SegmentEvaluation(self.value(_rows(segment)))
        (name,) = segment.start
        start, end = (np.asarray(side[name], np.float64) for side in (segment.start, segment.end))
        alphas = segment.alphas.reshape(-1, *[1] * start.ndim)
        rows = ((1 - alphas) * start + alphas * end).reshape(segment.row_count, -1)
        used = segment.weights != 0
        total = segment.weights[used] @ self.gradient(rows[used])
        self.alphas += segment.alphas.tolist()
        return SegmentEvaluation(self.value(rows), {name: total.reshape(start.shape).astype(np.float32)})


def _rows(segment: Segment) -> NDArray[np.float64]:
    """Forward-only rows, the elements of all inputs one after the other."""
    assert segment.start is segment.end
    row = np.concatenate([np.asarray(values, np.float64).reshape(-1) for values in segment.start.values()])
    return np.broadcast_to(row, (segment.row_count, len(row)))


def values_of(value: Value) -> Function:
    """A function without a gradient."""

    def missing(_: NDArray[np.float64]) -> NDArray[np.float64]:
        raise AssertionError("A method that takes no gradient asked for one.")

    return Function(value, missing)


def question_of(
    function: Function, x: Mapping[str, ArrayLike], start: Mapping[str, ArrayLike], /, **layouts: str
) -> Question:
    """Several float32 inputs, and the layouts of those that have one."""
    ends = [{name: np.asarray(values, np.float32) for name, values in side.items()} for side in (x, start)]
    rows = [np.concatenate([values.astype(np.float64).reshape(-1) for values in end.values()]) for end in ends]
    scores = [float(function.value(row[None])[0]) for row in rows]
    target = Target("y", Score.OUTPUT, ScoreHead.IDENTITY, Selector(np.zeros(1, np.int64), np.ones(1, np.float32)))
    maps = {name: MapSpec(name, layouts.get(name, "")) for name in x}
    subject = Subject(maps, {name: values.shape for name, values in ends[0].items()})
    baseline = Baseline(ends[1])
    return Question(subject, Instance(ends[0], {}), target, baseline, scores[0], scores[1], (baseline,))


def question(function: Function, x: ArrayLike, start: ArrayLike) -> Question:
    """One float32 input `x` and the function's values at both ends."""
    ends = [np.asarray(side, np.float32) for side in (x, start)]
    scores = [float(function.value(end.astype(np.float64).reshape(1, -1))[0]) for end in ends]
    selector = Selector(np.array([0], np.int64), np.array([1], np.float32))
    target = Target("y", Score.OUTPUT, ScoreHead.IDENTITY, selector)
    subject = Subject({"x": MapSpec("x")}, {"x": ends[0].shape})
    baseline = Baseline({"x": ends[1]})
    return Question(subject, Instance({"x": ends[0]}, {}), target, baseline, scores[0], scores[1], (baseline,))


def rounds(
    method: Method, asked: Question, function: Function, *, final_after: int = 1000
) -> tuple[Attribution, list[Plan]]:
    """The answer and the plans that led to it; time runs out after `final_after` rounds."""
    plans: list[Plan] = []
    answer: Attribution | Plan = method.plan(asked)
    while isinstance(answer, Plan):
        plans.append(answer)
        answer = method.attribution(asked, answer, function.evaluate(answer))
        if len(plans) >= final_after and isinstance(answer, Plan):
            answer = method.so_far(asked, answer)
    return answer, plans


def explain(function: Function, x: ArrayLike, baseline: ArrayLike, **options: object) -> Attribution:
    """Integrated Gradients of a function."""
    return rounds(IntegratedGradients(**options), question(function, x, baseline), function)[0]  # type: ignore[arg-type]


def ridge(value: Value, derivative: Value, weights: Sequence[float], bias: float = 0.0) -> Function:
    """value(weights . x + bias)."""
    w = np.asarray(weights, np.float64)
    return Function(lambda x: value(x @ w + bias), lambda x: derivative(x @ w + bias)[:, None] * w)


def linear(weights: Sequence[float], bias: float = 0.0) -> Function:
    """weights . x + bias."""
    return ridge(lambda z: z, np.ones_like, weights, bias)


def sigmoid(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without overflow."""
    return 0.5 * (1 + np.tanh(z / 2))


def steep(k: float, center: float) -> Function:
    """sigmoid(k (x - center)) of one element."""

    def slope(z: NDArray[np.float64]) -> NDArray[np.float64]:
        return sigmoid(z) * sigmoid(-z)

    return ridge(sigmoid, slope, [k], -k * center)


def rectified(seed: int, *, bias: float = 1.0, width: int = 32, size: int = 12, depth: int = 2) -> Function:
    """A random ReLU network with one output; `bias` scales its biases."""
    random = np.random.default_rng(seed)
    sizes = [size] + [width] * depth
    layers = [(random.normal(0, np.sqrt(2 / m), (m, n)), bias * random.normal(0, 0.3, n)) for m, n in pairwise(sizes)]
    last = random.normal(0, np.sqrt(1 / width), width)

    def forward(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], list[NDArray[np.bool_]]]:
        gates = []
        for weight, offset in layers:
            z = x @ weight + offset
            gates.append(z > 0)
            x = np.where(gates[-1], z, 0)
        return x @ last, gates

    def gradient(x: NDArray[np.float64]) -> NDArray[np.float64]:
        back = np.broadcast_to(last, (len(x), width))
        for (weight, _), gate in zip(reversed(layers), reversed(forward(x)[1]), strict=True):
            back = np.where(gate, back, 0) @ weight.T
        return back

    return Function(lambda x: forward(x)[0], gradient)
