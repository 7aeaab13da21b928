"""The questions of a query, once the scores at the end points are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from explainserve.end_points import EndPoints
from explainserve.explanation import Baseline, Question, Target
from explainserve.methods import Method
from explainserve.plan import Differentiation
from explainserve.query import Baselines, Place, Query


@dataclass(frozen=True, eq=False)
class Scores:
    """Score tensors at the end points."""

    end_points: EndPoints
    tensors: list[NDArray[np.generic]]

    def at(self, function: Differentiation, instance_index: int, baseline_index: int | None) -> NDArray[np.generic]:
        """The score tensor of an instance, or of one of its baselines."""
        return self.tensors[self.end_points.positions[function, instance_index, baseline_index]]


def all_questions(query: Query, baselines: Baselines, scores: Scores) -> list[tuple[Place, Question]]:
    """Every question with its place, in the order of the answer. Methods that explain the same scores are asked the
    same ones, so that they share what they evaluate."""
    kinds = {method.reading_guide.score_before_activation: method for method in query.methods}
    asked = {
        (before, i): list(_questions_of(query, one, i, baselines[i], scores))
        for before, one in kinds.items()
        for i in range(len(query.instances))
    }
    return [
        (Place(m, i, t, b), question)
        for m, method in enumerate(query.methods)
        for i in range(len(query.instances))
        for t, b, question in asked[method.reading_guide.score_before_activation, i]
        if (b is not None) == method.reading_guide.one_map_per_baseline
    ]


def _questions_of(
    query: Query, method: Method, i: int, baselines: Sequence[Baseline], scores: Scores
) -> Iterator[tuple[int, int | None, Question]]:
    """Questions of methods that explain the same scores as this one about one instance, with positions of target and
    baseline: for each target one without a baseline, for methods that need none or take all, and one with each."""
    instance, subject, every = query.instances[i], query.subject, tuple(baselines)
    anytime = query.budget_ends_at is not None
    for t, (function, target) in enumerate(_resolved(query, method, i, scores)):
        at_instance = target.selector.value(scores.at(function, i, None))
        ends = [target.selector.value(scores.at(function, i, b)) for b in range(len(baselines))]
        mean = float(np.mean(ends)) if ends else None
        yield t, None, Question(subject, instance, target, None, at_instance, mean, every, anytime)
        for b, baseline in enumerate(baselines):
            yield t, b, Question(subject, instance, target, baseline, at_instance, ends[b], anytime=anytime)


def _resolved(
    query: Query, method: Method, instance_index: int, scores: Scores
) -> Iterator[tuple[Differentiation, Target]]:
    for spec in query.scored_targets_of(method, instance_index):
        function = query.function(spec)
        for target in spec.resolve(query.model.signature, scores.at(function, instance_index, None)):
            yield function, target
