"""Methods that look at the scores of changed instances, and take no gradient: their rows and rounds.

What is changed shows the baseline. The rows of an instance are the same for every target.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from explainserve.explanation import Attribution, Instance, Question, StopReason, Subject
from explainserve.methods.contract import FLOAT32_BYTES, WORKING_ARRAYS, Method, Needs
from explainserve.methods.rows import point
from explainserve.methods.sampling import MIN_ROUND, next_round, round_size
from explainserve.plan import Evaluation, Plan

Scores = NDArray[np.float64]


class Perturbations(Protocol):
    """The changed instances of one question."""

    @property
    def count(self) -> int:
        """How many there are, at least 1."""
        ...

    @property
    def fewest(self) -> int:
        """How many a first round needs for a map that tells its error; a map that tells none is no map of a few."""
        return MIN_ROUND

    def instance(self, index: int) -> Instance:
        """One of them: the same object for every target."""
        ...

    def attribution(self, scores: Scores) -> Attribution:
        """The map by the scores of the first ones, shape (n,): of all, or of those that there was time for."""
        ...


@dataclass(frozen=True, eq=False)
class PerturbationsPlan(Plan):
    """A round of changed instances.

    Attributes:
        instances: of this round, held so that other targets find the same ones.
        scores: of all earlier ones.
    """

    perturbations: Perturbations
    instances: tuple[Instance, ...]
    scores: Scores


@dataclass(frozen=True)
class Perturbation(Method):
    """What the methods of this family have in common; a method says which perturbations there are."""

    @property
    def needs(self) -> Needs:
        """Values alone."""
        return Needs(rule="")

    @abstractmethod
    def perturbations(self, question: Question) -> Perturbations:
        """The changed instances of a question, and what their scores mean."""

    def path_bytes(self, subject: Subject) -> int:
        """The rows of one round, and working arrays."""
        return (round_size(subject.element_count) + WORKING_ARRAYS) * FLOAT32_BYTES * subject.element_count

    def plan(self, question: Question) -> Plan:
        """The first rows."""
        return _round(question, self.perturbations(question), np.empty(0))

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution | Plan:
        """The next rows, or the map."""
        assert isinstance(plan, PerturbationsPlan), "Not a plan of this method. This is a bug."
        scores = np.concatenate([plan.scores, *(part.scores for part in evaluation.segments)])
        if len(scores) < plan.perturbations.count:
            return _round(question, plan.perturbations, scores)
        return plan.perturbations.attribution(scores)

    def so_far(self, question: Question, upcoming: Plan) -> Attribution:
        """The map of the rows that are done."""
        assert isinstance(upcoming, PerturbationsPlan), "Not a plan of this method. This is a bug."
        return replace(upcoming.perturbations.attribution(upcoming.scores), stop_reason=StopReason.TIME_BUDGET)


def _round(question: Question, perturbations: Perturbations, scores: Scores) -> PerturbationsPlan:
    indices = next_round(question, len(scores), perturbations.count, perturbations.fewest)
    instances = tuple(perturbations.instance(index) for index in indices)
    rows = tuple(point(question, instance.moving, question.score) for instance in instances)
    return PerturbationsPlan(rows, perturbations, instances, scores)
