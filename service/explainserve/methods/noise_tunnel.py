"""Maps of another method at noisy copies of the instance: what SmoothGrad and its kin have in common.

Each sample is a question of its own, about the instance with noise. The samples of one round are planned and judged
together; a base method that takes several rounds, or that needs the score at its instance, makes more of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from explainserve.errors import DeadlineExceeded, InvalidRequest
from explainserve.explanation import Attribution, Question, StopReason, Subject
from explainserve.methods.contract import FLOAT32_BYTES, Cost, Method, Needs, ReadingGuide
from explainserve.methods.gradient import Gradient
from explainserve.methods.rows import point
from explainserve.methods.sampling import (
    FEWEST_SAMPLES,
    MAX_NOISE,
    Maps,
    check_option,
    check_sample_count,
    check_seed,
    mean_attribution,
    next_round,
    noisy,
    round_size,
)
from explainserve.plan import Evaluation, Plan, SegmentEvaluation

DEFAULT_NOISE_LEVEL = 0.15


@dataclass(frozen=True, eq=False)
class SamplesPlan(Plan):
    """A round of samples.

    Attributes:
        questions: of the samples of this round.
        pending: the plans of those that have no map yet, by their position; None where their scores come first.
        maps: of those that have one, by their position.
        earlier: maps of all earlier samples.
        begun: whether the pending plans follow earlier rounds of their own.
    """

    questions: tuple[Question, ...]
    pending: dict[int, Plan] | None
    maps: dict[int, Attribution]
    earlier: tuple[Attribution, ...]
    begun: bool = False


@dataclass(frozen=True)
class NoiseTunnel(Method):
    """Options of all methods of this family; what they make of the samples is theirs.

    Attributes:
        base: the method of each sample; the gradient by default.
        sample_count: at least 2.
        noise_level: standard deviation of the noise as a share of the range of each input, positive.
        noise_std: the same in the unit of the input, in its place.
        seed: at least 0.

    Raises:
        InvalidRequest: SAMPLE_COUNT_OUT_OF_RANGE, SEED_OUT_OF_RANGE, OPTION_OUT_OF_RANGE, NOISE_CONFLICT,
            BASE_METHOD_UNSUITABLE.
    """

    base: Method | None = None
    fewest: ClassVar[int] = FEWEST_SAMPLES
    """Samples that tell the error of what is made of them."""

    sample_count: int = 50
    noise_level: float | None = None
    noise_std: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.base is None:
            object.__setattr__(self, "base", Gradient())
        if self.noise_level is None and self.noise_std is None:
            object.__setattr__(self, "noise_level", DEFAULT_NOISE_LEVEL)
        check_sample_count(self.sample_count, 2)
        check_seed(self.seed)
        self._check_noise()
        self._check_base()

    @property
    def needs(self) -> Needs:
        """Those of the base."""
        return self._base.needs

    def resolved(self, subject: Subject) -> Self:
        """With the base resolved."""
        return replace(self, base=self._base.resolved(subject))

    def cost(self, subject: Subject) -> Cost:
        """That of the base for each sample, and a row for its score where the base needs it."""
        of_one, n = self._base.cost(subject), self.sample_count
        return Cost(
            n * of_one.min_gradient_rows,
            n * of_one.max_gradient_rows,
            n * of_one.common_gradient_rows,
            n * (of_one.min_forward_rows + self._needs_scores),
            n * (of_one.max_forward_rows + self._needs_scores),
        )

    def path_bytes(self, subject: Subject) -> int:
        """The maps of all samples, thrice while their moments are computed, and the paths of one round."""
        samples = 3 * self.sample_count * FLOAT32_BYTES * subject.element_count
        return samples + round_size(subject.element_count) * self._base.path_bytes(subject)

    def plan(self, question: Question) -> Plan:
        """The first samples."""
        return self._round(question, ())

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution | Plan:
        """What becomes of the samples of a round; then the next ones, and at last the map."""
        assert isinstance(plan, SamplesPlan), "Not a plan of this method. This is a bug."
        if plan.pending is None:
            return self._with_scores(plan, evaluation)
        upcoming, maps = self._judged(plan, evaluation)
        if upcoming:
            return replace(_plan_of(plan.questions, upcoming, maps, plan.earlier), begun=True)
        done = (*plan.earlier, *(maps[position] for position in range(len(plan.questions))))
        return self._round(question, done) if len(done) < self.sample_count else self._answer(done)

    def so_far(self, question: Question, upcoming: Plan) -> Attribution:
        """The map of the samples that are done; of those that have begun, where these are too few.

        Raises:
            DeadlineExceeded: no two samples have a map yet (TIME_BUDGET_TOO_SHORT).
        """
        assert isinstance(upcoming, SamplesPlan), "Not a plan of this method. This is a bug."
        done = [*upcoming.earlier, *upcoming.maps.values()]
        if len(done) < 2 and upcoming.begun:
            pending = (upcoming.pending or {}).items()
            done += [self._base.so_far(upcoming.questions[position], plan) for position, plan in pending]
        if len(done) < 2:
            text = "not even two samples fit into time_budget; allow more time"
            raise DeadlineExceeded("TIME_BUDGET_TOO_SHORT", text)
        return replace(self._answer(done), stop_reason=StopReason.TIME_BUDGET)

    def combined(self, samples: Sequence[Maps], step_count: int) -> Attribution:
        """What the method makes of the maps of its samples: their mean, unless it says otherwise."""
        return mean_attribution(samples, step_count)

    @property
    def _base(self) -> Method:
        assert self.base is not None, "Set after construction."
        return self.base

    @property
    def _needs_scores(self) -> bool:
        return self._base.reading_guide.family == "path"

    def _guide(self, units: str, paper: str) -> ReadingGuide:
        """How the base is read, but for what noise makes of it."""
        guide = self._base.reading_guide
        return replace(guide, units=units, complete=False, deterministic=False, paper=paper)

    def _round(self, question: Question, earlier: tuple[Attribution, ...]) -> Plan:
        indices = next_round(question, len(earlier), self.sample_count, self.fewest)
        questions = tuple(self._sample(question, index) for index in indices)
        if self._needs_scores:
            rows = tuple(point(one, one.instance.moving, one.score) for one in questions)
            return SamplesPlan(rows, questions, None, {}, earlier)
        return self._planned(questions, earlier)

    def _planned(self, questions: tuple[Question, ...], earlier: tuple[Attribution, ...]) -> Plan:
        plans = {position: self._base.plan(one) for position, one in enumerate(questions)}
        return _plan_of(questions, plans, {}, earlier)

    def _with_scores(self, plan: SamplesPlan, evaluation: Evaluation) -> Plan:
        scores = [float(part.scores[0]) for part in evaluation.segments]
        questions = tuple(
            replace(one, instance_output_value=score) for one, score in zip(plan.questions, scores, strict=True)
        )
        return self._planned(questions, plan.earlier)

    def _judged(self, plan: SamplesPlan, evaluation: Evaluation) -> tuple[dict[int, Plan], dict[int, Attribution]]:
        assert plan.pending is not None, "Scores are handled before. This is a bug."
        upcoming, maps = {}, dict(plan.maps)
        dealt = _dealt(list(plan.pending.values()), evaluation.segments)
        for (position, own), part in zip(plan.pending.items(), dealt, strict=True):
            outcome = self._base.attribution(plan.questions[position], own, part)
            if isinstance(outcome, Plan):
                upcoming[position] = outcome
            else:
                maps[position] = outcome
        return upcoming, maps

    def _sample(self, question: Question, index: int) -> Question:
        instance = question.instance
        scales = {name: self._scale(x) for name, x in instance.moving.items()}
        return replace(question, instance=noisy(instance, self.seed, index, scales))

    def _scale(self, x: np.ndarray) -> float:
        return self.noise_std if self.noise_std is not None else float(self.noise_level or 0) * float(np.ptp(x))

    def _answer(self, done: Sequence[Attribution]) -> Attribution:
        return self.combined([one.tensors for one in done], sum(one.step_count for one in done))

    def _check_noise(self) -> None:
        given = {name: getattr(self, name) for name in ("noise_level", "noise_std") if getattr(self, name) is not None}
        if len(given) > 1:
            raise InvalidRequest(
                "NOISE_CONFLICT",
                "noise_level and noise_std exclude each other",
                noise_level=self.noise_level,
                noise_std=self.noise_std,
            )
        for name, value in given.items():
            check_option(name, value, high=MAX_NOISE)

    def _check_base(self) -> None:
        if self._base.reading_guide.family not in ("gradient", "path", "backward rule") or isinstance(
            self._base, NoiseTunnel
        ):
            kind = type(self._base).__name__
            raise InvalidRequest("BASE_METHOD_UNSUITABLE", f"{kind} cannot be averaged over noise", method=kind)


def _plan_of(
    questions: tuple[Question, ...],
    plans: dict[int, Plan],
    maps: dict[int, Attribution],
    earlier: tuple[Attribution, ...],
) -> SamplesPlan:
    segments = tuple(segment for plan in plans.values() for segment in plan.segments)
    return SamplesPlan(segments, questions, plans, maps, earlier)


def _dealt(plans: Sequence[Plan], evaluations: Sequence[SegmentEvaluation]) -> Iterator[Evaluation]:
    first = 0
    for plan in plans:
        last = first + sum(segment.evaluation_count for segment in plan.segments)
        yield Evaluation(tuple(evaluations[first:last]))
        first = last
