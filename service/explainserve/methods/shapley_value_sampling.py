"""Shapley value sampling (Castro, Gomez, Tejada 2009; Strumbelj, Kononenko 2010)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations
from math import factorial
from typing import ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from explainserve.explanation import Attribution, Subject
from explainserve.methods.contract import Cost, ReadingGuide
from explainserve.methods.perturbation import Scores
from explainserve.methods.sampling import FEWEST_SAMPLES, check_sample_count, check_seed
from explainserve.methods.segmented import (
    MAX_SAMPLE_COUNT,
    Coalitions,
    Present,
    Segmented,
    Sets,
    check_segment_count,
    estimated_from,
    refuse_found,
)

T = TypeVar("T", bound=np.generic)

MIN_FEATURES = 2


DIGEST_WORDS = 2
"""Of 64 bits each, for which two sets of those that a request may have are never equal by chance."""
STEP_BYTES = 160
"""Of one step of an order, with what its digest and its gain take while they are computed."""


@dataclass(frozen=True, eq=False)
class Walks:
    """Orders in which segments become present, and the distinct sets on the way, without the empty and the full one.

    A set is the beginning of an order, and not held beside it: sets of many segments take the square of their number.

    Attributes:
        orders: segments in their order, shape (orders, segments).
        steps: number of the set after each step, in the order in which they come up, shape (orders, segments - 1).
        first: of each set, the flat position in `steps` where it comes up, shape (sets,).
    """

    orders: NDArray[np.int64]
    steps: NDArray[np.int64]
    first: NDArray[np.int64]

    @classmethod
    def along(cls, orders: NDArray[np.int64]) -> Walks:
        """Walks by their orders. Equal sets are found by the sum modulo 2 of a random number for each of their segments
        (Zobrist: A new hashing method with application for game playing, 1970)."""
        generator = np.random.Generator(np.random.PCG64(0))
        numbers = generator.integers(0, 2**64, (orders.shape[1], DIGEST_WORDS), np.uint64)
        digests = np.bitwise_xor.accumulate(numbers[orders[:, :-1]], axis=1).reshape(-1, DIGEST_WORDS)
        _, first, inverse = np.unique(digests, axis=0, return_index=True, return_inverse=True)
        turn = np.argsort(first)
        numbered = np.empty_like(turn)
        numbered[turn] = np.arange(len(turn))
        return cls(orders, numbered[inverse.reshape(len(orders), -1)], first[turn])

    @property
    def count(self) -> int:
        """Distinct sets."""
        return len(self.first)

    def present(self, first: int, last: int) -> Present:
        """The beginnings of orders."""
        order, step = np.divmod(self.first[first:last], self.steps.shape[1])
        present = np.zeros((len(order), self.orders.shape[1]), np.bool_)
        np.put_along_axis(present, self.orders[order], np.arange(self.orders.shape[1]) <= step[:, None], axis=1)
        return present


@dataclass(frozen=True)
class ShapleyValueSampling(Segmented):
    """The mean over orders of what each segment adds to those before it; its elements share its value in equal parts.

    All orders where there are no more of them than `sample_count`, each once: the values are exact then.

    Attributes:
        sample_count: of orders, from 1 to MAX_SAMPLE_COUNT.
        seed: at least 0; order k is drawn by the seed sequence (seed, k).

    Raises:
        InvalidRequest: SAMPLE_COUNT_OUT_OF_RANGE, SEED_OUT_OF_RANGE, SEGMENTATION_UNSUITABLE,
            SEGMENT_COUNT_OUT_OF_RANGE.
    """

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="perturbation",
        units="output",
        complete=True,
        needs_baseline=True,
        deterministic=False,
        tier="T0",
        paper="Castro, Gomez, Tejada: Polynomial calculation of the Shapley value based on sampling, Computers and "
        "Operations Research 2009",
    )

    sample_count: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sample_count(self.sample_count, 1, MAX_SAMPLE_COUNT)
        check_seed(self.seed)

    def resolved(self, subject: Subject) -> Self:
        """With the segments."""
        refuse_found(self)
        own = super().resolved(subject)
        check_segment_count(self, own.feature_count(subject), MIN_FEATURES)
        return own

    def cost(self, subject: Subject) -> Cost:
        """A row per step of an order; orders that begin or end alike have steps in common."""
        count = self.feature_count(subject) or 0
        steps = count - 1
        most = min(self._order_count(count) * steps, 2**count - 2)
        return Cost(min_forward_rows=steps, max_forward_rows=most)

    def path_bytes(self, subject: Subject) -> int:
        """The rows of a round, and the steps of all orders."""
        count = self.feature_count(subject) or 0
        return super().path_bytes(subject) + self._order_count(count) * count * STEP_BYTES

    def coalitions(self, feature_count: int) -> Sets:
        """Those on the way of all orders."""
        return Walks.along(np.array(list(self._orders(feature_count)), np.int64))

    def fewest(self, feature_count: int) -> int:
        """Those of as many orders as tell a standard error."""
        return FEWEST_SAMPLES * (feature_count - 1)

    def answered(self, coalitions: Coalitions, scores: Scores) -> Attribution:
        """Of orders that time cut short, the steps that are done; zero for segments that none of them reached."""
        question, features, walks = coalitions.question, coalitions.features, coalitions.sets
        assert isinstance(walks, Walks), "Not the sets of this method. This is a bug."
        known = np.full(coalitions.count, np.nan)
        known[: len(scores)] = scores
        done = np.pad(walks.steps < len(scores), ((0, 0), (1, 1)), constant_values=True)
        ends = question.start_output_value, question.instance_output_value
        path = np.pad(known[walks.steps], ((0, 0), (1, 1)), constant_values=((0, 0), ends))
        gains = _by_segment(walks.orders, np.diff(path, axis=1))
        reached = _by_segment(walks.orders, done[:, 1:] & done[:, :-1])
        count = np.maximum(1, reached.sum(axis=0))
        mean = np.where(reached, gains, 0).sum(axis=0) / count
        squares = np.where(reached, np.square(gains - mean), 0).sum(axis=0)
        return estimated_from(features.shared_out, mean, self._errors(squares, reached), len(scores))

    def _errors(self, squares: Scores, reached: NDArray[np.bool_]) -> Scores | None:
        """Of the mean gains, by the sums of squared distances from them; None where a segment has one gain or none."""
        if self._covers_all(len(squares)):
            return np.zeros_like(squares)
        count = reached.sum(axis=0)
        return None if (count < 2).any() else np.asarray(np.sqrt(squares / (count - 1) / count))

    def _orders(self, feature_count: int) -> Iterable[tuple[int, ...] | NDArray[np.int64]]:
        if self._covers_all(feature_count):
            return permutations(range(feature_count))
        sequences = (np.random.SeedSequence((self.seed, k)) for k in range(self.sample_count))
        return (np.random.Generator(np.random.PCG64(one)).permutation(feature_count) for one in sequences)

    def _order_count(self, feature_count: int) -> int:
        return factorial(feature_count) if self._covers_all(feature_count) else self.sample_count

    def _covers_all(self, feature_count: int) -> bool:
        return feature_count <= 12 and factorial(feature_count) <= self.sample_count


def _by_segment(orders: NDArray[np.int64], values: NDArray[T]) -> NDArray[T]:
    """Columns by position in the order to columns by segment."""
    placed = np.empty_like(values)
    np.put_along_axis(placed, orders, values, axis=1)
    return placed
