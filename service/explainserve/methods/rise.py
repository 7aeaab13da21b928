"""RISE (Petsiuk, Das, Saenko: RISE: randomized input sampling for explanation of black-box models, 2018, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import InvalidRequest
from explainserve.explanation import Attribution, Question, StopReason, Subject
from explainserve.methods.contract import FLOAT32_BYTES, WORKING_ARRAYS, Cost, Method, Needs, ReadingGuide
from explainserve.methods.planes import laid_over
from explainserve.methods.rows import point
from explainserve.methods.sampling import (
    check_has_effect,
    check_option,
    check_sample_count,
    check_seed,
    estimated,
    next_round,
    round_size,
)
from explainserve.plan import Evaluation, Plan, Tensors

DEFAULT_GRID_SIZE = 7

Masks = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Sample:
    """A masked instance.

    Attributes:
        masks: how much is kept of each element, by input, with extent 1 along all axes but H and W where it has these.
    """

    masks: Masks
    moving: Tensors


@dataclass(frozen=True, eq=False)
class Moments:
    """Of the samples so far: their number, their mean and the sum of squared distances from it, by input."""

    count: int
    means: Mapping[str, NDArray[np.float64]]
    squares: Mapping[str, NDArray[np.float64]]

    def with_samples(self, samples: Mapping[str, NDArray[np.float64]]) -> Moments:
        """With a round of further ones, shape (samples, ...) (Chan, Golub, LeVeque 1979)."""
        own = len(next(iter(samples.values())))
        total = self.count + own
        means, squares = {}, {}
        for name, values in samples.items():
            mean = values.mean(axis=0)
            apart = mean - self.means[name]
            means[name] = self.means[name] + apart * own / total
            within = np.square(values - mean).sum(axis=0)
            squares[name] = self.squares[name] + within + np.square(apart) * self.count * own / total
        return Moments(total, means, squares)


@dataclass(frozen=True, eq=False)
class MasksPlan(Plan):
    """A round of masked instances, with what is known of the earlier ones."""

    samples: tuple[Sample, ...]
    earlier: Moments


@dataclass(frozen=True)
class Rise(Method):
    """The mean over masks of the masked instance's score times the mask, divided by the masks' expected value.

    A mask is a coarse grid of cells that are kept or not, brought to the input's size bilinearly (corners not aligned,
    edges repeated) and shifted by a random part of a cell. What it hides shows the baseline. Elements of inputs without
    H and W axes are kept or not each by itself.

    Attributes:
        sample_count: of masks, at least 2.
        grid_size: cells along H and W, at most their extents. None becomes 7, or less for small inputs, but for
            inputs without these axes.
        keep_probability: of a cell, and the masks' expected value, in (0, 1).
        seed: at least 0; mask k is drawn by the seed sequence (seed, k, position of the input).

    Raises:
        InvalidRequest: SAMPLE_COUNT_OUT_OF_RANGE, SEED_OUT_OF_RANGE, OPTION_OUT_OF_RANGE, OPTION_WITHOUT_EFFECT.
    """

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="perturbation",
        units="score of the samples",
        complete=False,
        needs_baseline=True,
        deterministic=False,
        tier="T0",
        paper="Petsiuk, Das, Saenko: RISE: randomized input sampling for explanation of black-box models, BMVC 2018, "
        "arXiv:1806.07421",
    )

    sample_count: int = 4000
    grid_size: int | None = None
    keep_probability: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_sample_count(self.sample_count, 2)
        check_seed(self.seed)
        if not 0 < self.keep_probability < 1:
            raise InvalidRequest(
                "OPTION_OUT_OF_RANGE",
                f"keep_probability is {self.keep_probability}; expected more than 0 and less than 1",
                option="keep_probability",
                value=self.keep_probability,
                min=0,
                max=1,
            )

    @property
    def needs(self) -> Needs:
        """Values alone."""
        return Needs(rule="")

    def resolved(self, subject: Subject) -> Self:
        """With the size of the grid, which fits all inputs that have H and W axes."""
        extents = [extent for name in subject.shapes for extent in _plane(subject, name)]
        if not extents:
            check_has_effect(self, "grid_size", "where nothing that moves has H and W axes")
            return self
        most = min(extents)
        if self.grid_size is None:
            return replace(self, grid_size=min(DEFAULT_GRID_SIZE, most))
        check_option("grid_size", self.grid_size, low=1, high=most, above=False)
        return self

    def cost(self, subject: Subject) -> Cost:
        """One row per mask."""
        return Cost.fixed(forward_rows=self.sample_count)

    def path_bytes(self, subject: Subject) -> int:
        """The rows of a round, their masks weighted in float64, and the moments."""
        arrays = 4 * round_size(subject.element_count) + 2 * WORKING_ARRAYS
        return arrays * FLOAT32_BYTES * subject.element_count

    def plan(self, question: Question) -> Plan:
        """The first masks."""
        zeros = {name: np.zeros(_mask_shape(question.subject, name)) for name in question.instance.moving}
        return self._round(question, Moments(0, zeros, zeros))

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution | Plan:
        """The next masks, or the map."""
        assert isinstance(plan, MasksPlan), "Not a plan of this method. This is a bug."
        scores = np.array([part.scores[0] for part in evaluation.segments]) / self.keep_probability
        weighted = {
            name: np.stack([score * one.masks[name] for score, one in zip(scores, plan.samples, strict=True)])
            for name in question.instance.moving
        }
        done = plan.earlier.with_samples(weighted)
        return self._round(question, done) if done.count < self.sample_count else _answer(question, done)

    def so_far(self, question: Question, upcoming: Plan) -> Attribution:
        """The map of the masks that are done."""
        assert isinstance(upcoming, MasksPlan), "Not a plan of this method. This is a bug."
        return replace(_answer(question, upcoming.earlier), stop_reason=StopReason.TIME_BUDGET)

    def _round(self, question: Question, earlier: Moments) -> Plan:
        indices = next_round(question, earlier.count, self.sample_count)
        samples = tuple(self._sample(question, index) for index in indices)
        rows = tuple(point(question, one.moving, question.score) for one in samples)
        return MasksPlan(rows, samples, earlier)

    def _sample(self, question: Question, index: int) -> Sample:
        key = ("rise", self.seed, self.grid_size, self.keep_probability, index, question.baseline)
        return question.instance.derived(key, partial(self._masked, question, index))

    def _masked(self, question: Question, index: int) -> Sample:
        masks, moving = {}, {}
        for position, (name, values) in enumerate(question.instance.moving.items()):
            sequence = np.random.SeedSequence((self.seed, index, position))
            generator = np.random.Generator(np.random.PCG64(sequence))
            masks[name] = self._mask(generator, question.subject, name)
            hidden = question.start[name].astype(np.float32)
            mixed = hidden + masks[name] * (values.astype(np.float32) - hidden)
            moving[name] = mixed.astype(values.dtype)
        return Sample(masks, moving)

    def _mask(self, generator: np.random.Generator, subject: Subject, name: str) -> NDArray[np.float32]:
        plane = _plane(subject, name)
        if not plane:
            return (generator.random(subject.shapes[name]) < self.keep_probability).astype(np.float32)
        size = self.grid_size or DEFAULT_GRID_SIZE
        kept = (generator.random((size, size)) < self.keep_probability).astype(np.float64)
        down, across = (_interpolation(size, extent, generator) for extent in plane)
        return laid_over(down @ kept @ across.T, subject, name).astype(np.float32)


def _interpolation(size: int, extent: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Weights of cells for each position, shape (extent, size): a window of the size + 1 times larger grid, as far from
    its start as the generator says, at most a cell."""
    cell = -(-extent // size)
    enlarged = (size + 1) * cell
    positions = np.arange(extent) + generator.integers(cell)
    centers = np.clip((positions + 0.5) * size / enlarged - 0.5, 0, size - 1)
    weights: NDArray[np.float64] = np.maximum(0, 1 - np.abs(centers[:, None] - np.arange(size)))
    return weights


def _plane(subject: Subject, name: str) -> tuple[int, ...]:
    """Extents of H and W, or () where an input has none."""
    return tuple(subject.shapes[name][axis] for axis in subject.maps[name].spatial_axes or ())


def _mask_shape(subject: Subject, name: str) -> tuple[int, ...]:
    axes = subject.maps[name].spatial_axes
    shape = subject.shapes[name]
    return shape if axes is None else tuple(n if axis in axes else 1 for axis, n in enumerate(shape))


def _answer(question: Question, done: Moments) -> Attribution:
    shapes = question.subject.shapes
    means = {name: np.broadcast_to(values, shapes[name]) for name, values in done.means.items()}
    errors = {
        name: np.broadcast_to(np.sqrt(values / max(1, done.count - 1) / done.count), shapes[name])
        for name, values in done.squares.items()
    }
    return estimated(means, errors, done.count)
