"""Expected Gradients (Erion, Janizek, Sturmfels, Lundberg, Lee: Improving performance of deep learning models with
axiomatic attribution priors and expected gradients, 2021, equation 3), which GradientSHAP is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import repeat
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import InvalidRequest
from explainserve.explanation import Attribution, Instance, Question, StopReason, Subject
from explainserve.methods.contract import FLOAT32_BYTES, Cost, Method, ReadingGuide
from explainserve.methods.sampling import (
    FEWEST_SAMPLES,
    MAX_NOISE,
    Maps,
    check_option,
    check_sample_count,
    check_seed,
    estimated,
    next_round,
    noisy,
    round_size,
)
from explainserve.plan import Evaluation, Plan, Segment

_ALPHAS = 2**32 - 1
"""Position of alpha in the seed sequence, where no input stands."""


@dataclass(frozen=True, eq=False)
class SamplesPlan(Plan):
    """A round of samples.

    Attributes:
        instances: where the paths of the samples end, held so that other targets find the same ones.
        earlier: maps of the samples before.
    """

    instances: tuple[Instance, ...]
    earlier: tuple[Maps, ...]


@dataclass(frozen=True)
class ExpectedGradients(Method):
    """The mean over baselines x' and alpha of (x - x') times the gradient at x' + alpha (x - x').

    Stratified: every baseline gets its share of the samples, and each of these its own part of [0, 1] for alpha. The
    standard errors count what is drawn within the parts.

    Attributes:
        sample_count: over all baselines, at least one for each.
        noise_std: standard deviation of noise that is added to x in each sample, at least 0.
        seed: at least 0.

    Raises:
        InvalidRequest: SAMPLE_COUNT_OUT_OF_RANGE, SEED_OUT_OF_RANGE, OPTION_OUT_OF_RANGE.
    """

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="path",
        units="output",
        complete=True,
        needs_baseline=True,
        pools_baselines=True,
        deterministic=False,
        paper="Erion et al.: Improving performance of deep learning models with axiomatic attribution priors and "
        "expected gradients, Nature Machine Intelligence 2021, arXiv:1906.10670",
    )

    sample_count: int = 200
    noise_std: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_sample_count(self.sample_count, 1)
        check_seed(self.seed)
        check_option("noise_std", self.noise_std, high=MAX_NOISE, above=False)

    def cost(self, subject: Subject) -> Cost:
        """One gradient per sample."""
        return Cost.fixed(self.sample_count)

    def path_bytes(self, subject: Subject) -> int:
        """The maps of all samples, twice while they are summed."""
        return 2 * (self.sample_count + round_size(subject.element_count)) * FLOAT32_BYTES * subject.element_count

    def plan(self, question: Question) -> Plan:
        """The first samples."""
        if self.sample_count < len(question.baselines):
            raise InvalidRequest(
                "SAMPLE_COUNT_OUT_OF_RANGE",
                f"{self.sample_count} samples for {len(question.baselines)} baselines; each needs one",
                sample_count=self.sample_count,
                min=len(question.baselines),
            )
        return self._round(question, ())

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution | Plan:
        """The next samples, or the map."""
        assert isinstance(plan, SamplesPlan), "Not a plan of this method. This is a bug."
        own = tuple(
            {name: _step(segment, name) * part.gradient_sums[name].astype(np.float32) for name in segment.end}
            for segment, part in zip(plan.segments, evaluation.segments, strict=True)
        )
        done = (*plan.earlier, *own)
        return self._round(question, done) if len(done) < self.sample_count else self._answer(question, done)

    def so_far(self, question: Question, upcoming: Plan) -> Attribution:
        """The map of the samples that are done, of the baselines that they reached."""
        assert isinstance(upcoming, SamplesPlan), "Not a plan of this method. This is a bug."
        return replace(self._answer(question, upcoming.earlier), stop_reason=StopReason.TIME_BUDGET)

    def _round(self, question: Question, earlier: tuple[Maps, ...]) -> Plan:
        fewest = FEWEST_SAMPLES * len(question.baselines)
        indices = next_round(question, len(earlier), self.sample_count, fewest)
        instances = tuple(self._end(question.instance, index) for index in indices)
        segments = tuple(map(self._sample, repeat(question), indices, instances))
        return SamplesPlan(segments, instances, earlier)

    def _end(self, instance: Instance, index: int) -> Instance:
        if self.noise_std == 0:
            return instance
        return noisy(instance, self.seed, index, dict.fromkeys(instance.moving, self.noise_std))

    def _sample(self, question: Question, index: int, instance: Instance) -> Segment:
        """Sample k is of baseline k modulo their number: a cut in time leaves all of them about equally many, in parts
        of the path that lie all along it."""
        count = len(question.baselines)
        visit, baseline = divmod(index, count)
        strata = self._strata(baseline, count)
        alpha = (strata[visit] + self._uniform(index)) / len(strata)
        return Segment(
            start=question.baselines[baseline].moving,
            end=instance.moving,
            fixed=question.instance.fixed,
            function=question.gradient,
            alphas=np.array([alpha]),
            weights=np.ones(1),
            selectors=(question.target.selector,),
        )

    def _strata(self, baseline: int, count: int) -> NDArray[np.int64]:
        """Parts of the path from one of so many baselines, in the order of their samples."""
        return spread_order(len(range(baseline, self.sample_count, count)))

    def _uniform(self, index: int) -> float:
        sequence = np.random.SeedSequence((self.seed, index, _ALPHAS))
        return float(np.random.Generator(np.random.PCG64(sequence)).random())

    def _answer(self, question: Question, done: tuple[Maps, ...]) -> Attribution:
        """The mean of the means of the baselines, and its error."""
        count = min(len(question.baselines), len(done))
        of_baseline = [self._along_the_path(done[k::count], k, len(question.baselines)) for k in range(count)]
        means, errors = {}, {}
        for name in done[0]:
            parts = [np.stack([sample[name] for sample in own]).astype(np.float64) for own in of_baseline]
            means[name] = sum((part.mean(axis=0) for part in parts), np.zeros(1)) / count
            errors[name] = np.sqrt(sum((_squared_error(part) for part in parts), np.zeros(1))) / count
        answer = estimated(means, errors, len(done))
        single = any(len(own) < 2 for own in of_baseline)
        return replace(answer, map_error=None, standard_errors={}) if single else answer

    def _along_the_path(self, samples: tuple[Maps, ...], baseline: int, count: int) -> list[Maps]:
        """The samples of a baseline in the order of alpha."""
        return [samples[visit] for visit in np.argsort(self._strata(baseline, count)[: len(samples)])]


@lru_cache(maxsize=64)
def spread_order(count: int) -> NDArray[np.int64]:
    """The numbers below `count` in an order of which every beginning lies evenly among them (van der Corput)."""
    width = max(1, (count - 1).bit_length())
    reversed_bits = [int(f"{number:0{width}b}"[::-1], 2) for number in range(count)]
    order = np.argsort(np.argsort(reversed_bits))
    order.setflags(write=False)
    return order


def _step(segment: Segment, name: str) -> NDArray[np.float32]:
    return segment.end[name].astype(np.float32) - segment.start[name].astype(np.float32)


def _squared_error(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of their mean; zero where one sample tells nothing. By second differences of neighbours (Wolter 1984, estimator
    v5), which a trend along the path leaves alone, as it does the mean of one sample per part."""
    if len(samples) < 2:
        return np.zeros(samples.shape[1:])
    order = min(2, len(samples) - 1)
    share = 6 if order == 2 else 2  # the sum of squares of (1, -2, 1), or of (1, -1)
    return np.asarray(np.square(np.diff(samples, order, axis=0)).mean(axis=0) / share / len(samples))
