"""Methods that ask what an instance scores with some of its segments absent: their options, and their rows."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import InvalidRequest
from explainserve.explanation import Attribution, Instance, Question, Subject
from explainserve.methods.contract import Needs
from explainserve.methods.features import (
    COUNTED,
    GRID,
    MIN_SEGMENT_COUNT,
    Features,
    check_recipe,
    given,
    is_found_in_the_instance,
    made,
    place_count,
)
from explainserve.methods.perturbation import Perturbation, Perturbations, Scores
from explainserve.methods.regression import Values
from explainserve.methods.sampling import MIN_ROUND, estimated
from explainserve.plan import Tensors

Present = NDArray[np.bool_]
"""Which segments sets hold, shape (sets, segments)."""

MAX_SAMPLE_COUNT = 65536
"""Of samples that take no row of their own where they are equal: no limit of rows bounds the time to draw them."""


class Sets(Protocol):
    """Distinct sets of segments, none of them full: made when they are asked for, since all of them may be large."""

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    def present(self, first: int, last: int) -> Present:
        """Those from `first` to before `last`."""
        ...


@dataclass(frozen=True, eq=False)
class PackedSets:
    """Sets that are held, eight segments a byte.

    Attributes:
        rows: shape (sets, bytes).
    """

    rows: NDArray[np.uint8]
    feature_count: int

    @classmethod
    def of(cls, present: Present) -> PackedSets:
        """Some sets."""
        return cls(np.packbits(present, axis=1), present.shape[1])

    @property
    def count(self) -> int:
        """Rows."""
        return len(self.rows)

    def present(self, first: int, last: int) -> Present:
        """Unpacked."""
        return np.unpackbits(self.rows[first:last], axis=1, count=self.feature_count).astype(np.bool_)


@dataclass(frozen=True, eq=False)
class Coalitions(Perturbations):
    """The instance with different sets of its segments present."""

    method: Segmented
    question: Question
    features: Features
    sets: Sets

    @property
    def count(self) -> int:
        """One row for each set."""
        return self.sets.count

    @property
    def fewest(self) -> int:
        """As the method says."""
        return self.method.fewest(self.features.count)

    def instance(self, index: int) -> Instance:
        """The same object for all methods with the same segments."""
        (present,) = self.sets.present(index, index + 1)

        def make() -> Instance:
            return self.features.mixed(present, self.question.instance, self.question.start)

        key = ("coalition", self.features, np.packbits(present).tobytes(), self.question.baseline)
        return self.question.instance.derived(key, make)

    def attribution(self, scores: Scores) -> Attribution:
        """What the method makes of the scores, with the segments."""
        return replace(self.method.answered(self, scores), segments=self.features.labels).checked()


@dataclass(frozen=True)
class Segmented(Perturbation):
    """Options of all methods of this family.

    Attributes:
        segments: labels by input name, which a client sends in place of a recipe; see `features.given`.
        segmentation: the recipe; None where no input has H and W axes, or segments are given.
        segment_count: of recipes that take one.

    Raises:
        InvalidRequest: SEGMENTS_CONFLICT.
    """

    default_segmentation: ClassVar[str] = GRID
    default_segment_count: ClassVar[int] = 16

    segments: Mapping[str, NDArray[np.generic]] = field(default_factory=dict, compare=False)
    segmentation: str | None = None
    segment_count: int | None = None

    def __post_init__(self) -> None:
        if self.segments and (self.segmentation or self.segment_count is not None):
            self._conflict("given segments take no recipe")

    @property
    def needs(self) -> Needs:
        """Values alone, and what its recipe needs."""
        recipe = self.segmentation or self.default_segmentation
        return Needs(rule="", segmentation=not self.segments and is_found_in_the_instance(recipe))

    def resolved(self, subject: Subject) -> Self:
        """With the recipe, its number of segments, and the segments checked."""
        if self.segments:
            given(self.segments, subject)
            return self
        places = place_count(subject)
        recipe = self.segmentation or (self.default_segmentation if places else None)
        count = self.segment_count
        if recipe in COUNTED and count is None:
            count = max(MIN_SEGMENT_COUNT, min(self.default_segment_count, places))
        if recipe not in COUNTED and count is not None:
            self._conflict(f"segmentation {recipe} takes no number of segments")
        check_recipe(recipe, count, subject)
        return replace(self, segmentation=recipe, segment_count=count)

    def feature_count(self, subject: Subject) -> int | None:
        """Number of segments of a resolved method; None where it is known only when the instance is."""
        if is_found_in_the_instance(self.segmentation):
            return None
        return self._made(subject, None).count

    def perturbations(self, question: Question) -> Perturbations:
        """The sets of segments."""
        features = self.features(question)
        return Coalitions(self, question, features, self.coalitions(features.count))

    def features(self, question: Question) -> Features:
        """The segments of an instance: the same for all targets, and all methods with these options."""
        digest = hashlib.blake2b(digest_size=16)
        for name, labels in self.segments.items():
            digest.update(f"{name}{labels.dtype.str}{labels.shape}".encode())
            digest.update(np.ascontiguousarray(labels).data)
        key = ("segments", self.segmentation, self.segment_count, digest.digest())
        return question.instance.derived(key, lambda: self._made(question.subject, question.instance))

    @abstractmethod
    def coalitions(self, feature_count: int) -> Sets:
        """The sets of segments.

        Raises:
            InvalidRequest: so many segments do not do for the method (SEGMENT_COUNT_OUT_OF_RANGE).
        """

    def fewest(self, feature_count: int) -> int:
        """Sets of a first round where time may end after it: those that tell standard errors, where there are any."""
        return MIN_ROUND

    @abstractmethod
    def answered(self, coalitions: Coalitions, scores: Scores) -> Attribution:
        """The map by the scores of the first sets."""

    def _made(self, subject: Subject, instance: Instance | None) -> Features:
        if self.segments:
            return given(self.segments, subject)
        return made(self.segmentation, self.segment_count, subject, instance)

    def _conflict(self, why: str) -> None:
        raise InvalidRequest(
            "SEGMENTS_CONFLICT",
            f"{why}: segmentation {self.segmentation}, segment_count {self.segment_count}, segments of "
            f"{', '.join(self.segments) or 'no input'}",
            segmentation=self.segmentation or "",
            inputs=", ".join(self.segments),
        )


def check_segment_count(method: Segmented, count: int | None, minimum: int, maximum: int | None = None) -> None:
    """Raises InvalidRequest (SEGMENT_COUNT_OUT_OF_RANGE) outside the range; None is not known yet."""
    if count is None or (minimum <= count and (maximum is None or count <= maximum)):
        return
    kind = type(method).__name__
    raise InvalidRequest(
        "SEGMENT_COUNT_OUT_OF_RANGE",
        f"the number of segments is {count}; {kind} needs at least {minimum}"
        + ("" if maximum is None else f" and at most {maximum}")
        + ": send segments, or choose another recipe",
        method=kind,
        count=count,
        min=minimum,
        max=maximum or "",
    )


def refuse_found(method: Segmented) -> None:
    """Raises InvalidRequest (SEGMENTATION_UNSUITABLE) for a recipe whose number of segments, and so the cost, is known
    only when the instance is."""
    if is_found_in_the_instance(method.segmentation):
        kind = type(method).__name__
        raise InvalidRequest(
            "SEGMENTATION_UNSUITABLE",
            f"{kind} takes a row or more per segment, and {method.segmentation} finds its own number: send segments, "
            "such as those that LIME returns, or take a grid",
            method=kind,
            segmentation=method.segmentation,
        )


def estimated_from(
    place: Callable[[Values], Tensors], values: Values, errors: Values | None, step_count: int
) -> Attribution:
    """The map of segments' values, with their standard errors; None where the samples tell none.

    Args:
        place: values of segments to a map.
    """
    means, spreads = (
        {name: part.astype(np.float64) for name, part in place(own).items()}
        for own in (values, np.zeros_like(values) if errors is None else errors)
    )
    answer = estimated(means, spreads, step_count)
    return replace(answer, map_error=None, standard_errors={}) if errors is None else answer
