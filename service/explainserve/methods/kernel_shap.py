"""KernelSHAP (Lundberg, Lee: A unified approach to interpreting model predictions, 2017, theorem 2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations, islice
from math import comb, floor
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from explainserve.explanation import Attribution, Subject
from explainserve.methods.contract import Cost, ReadingGuide
from explainserve.methods.perturbation import Scores
from explainserve.methods.regression import MAX_FEATURES, Values, held_to_sum, regression_bytes
from explainserve.methods.sampling import check_sample_count, check_seed
from explainserve.methods.segmented import (
    Coalitions,
    PackedSets,
    Segmented,
    Sets,
    check_segment_count,
    estimated_from,
)

MIN_FEATURES = 2
EXTRA_SAMPLES = 2048
"""Beside two per segment, as in the authors' code."""


@dataclass(frozen=True)
class KernelShap(Segmented):
    """Shapley values of segments by weighted least squares, their sum held to F(x) - F(x').

    Sets come in pairs with their complements. Sizes of sets get samples in proportion to their weight; a size with as
    many samples as sets has each of them once, and of the others distinct ones are drawn. Exact where all are covered.

    Attributes:
        sample_count: of sets beside the empty and the full one, at least 2; an odd one counts as one less. None for
            2 M + 2048 for M segments, and at most all.
        seed: at least 0.

    Raises:
        InvalidRequest: SAMPLE_COUNT_OUT_OF_RANGE, SEED_OUT_OF_RANGE, SEGMENT_COUNT_OUT_OF_RANGE.
    """

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="perturbation",
        units="output",
        complete=True,
        needs_baseline=True,
        deterministic=False,
        tier="T0",
        paper="Lundberg, Lee: A unified approach to interpreting model predictions, NeurIPS 2017, arXiv:1705.07874",
    )

    sample_count: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample_count is not None:
            check_sample_count(self.sample_count, 2)
        check_seed(self.seed)

    def resolved(self, subject: Subject) -> Self:
        """With the segments and the number of samples; M is the number that is asked for where they are found later."""
        own = super().resolved(subject)
        count = own.feature_count(subject)
        check_segment_count(self, count, MIN_FEATURES, MAX_FEATURES)
        if own.sample_count is not None:
            return own
        usual = 2 * (count or own.segment_count or MAX_FEATURES) + EXTRA_SAMPLES
        return replace(own, sample_count=usual if count is None else min(usual, 2**count - 2))

    def cost(self, subject: Subject) -> Cost:
        """One row per set, fewer where there are not as many."""
        count = self.feature_count(subject)
        if count is not None:
            return Cost.fixed(forward_rows=2 * self._pair_count(count))
        return Cost(min_forward_rows=2, max_forward_rows=self._asked)

    def path_bytes(self, subject: Subject) -> int:
        """The rows of a round, and the regression."""
        count = self.feature_count(subject) or MAX_FEATURES
        return super().path_bytes(subject) + regression_bytes(2 * self._pair_count(count), count)

    def coalitions(self, feature_count: int) -> Sets:
        """Pairs of sets: those of one segment, which alone make a map, and then each size by its weight in every
        beginning (Adams's method of apportionment), so that what time cuts short tells its error."""
        check_segment_count(self, feature_count, MIN_FEATURES, MAX_FEATURES)
        weights = size_weights(feature_count)
        taken = {size: n for size, n in shares(feature_count, self._pair_count(feature_count)).items() if n}
        sets = np.concatenate([self._pairs(feature_count, size, count) for size, count in taken.items()])
        turns = np.concatenate([np.arange(count) * (size > 1) / weights[size] for size, count in taken.items()])
        order = np.argsort(turns, kind="stable")
        return PackedSets.of(sets.reshape(-1, 2, feature_count)[order].reshape(sets.shape))

    def fewest(self, feature_count: int) -> int:
        """All pairs of the smallest size, and about as many others: fewer understate the error several times."""
        return 4 * feature_count

    def answered(self, coalitions: Coalitions, scores: Scores) -> Attribution:
        """Sets of one size share its weight."""
        question, present = coalitions.question, coalitions.sets.present(0, len(scores))
        count, sizes = coalitions.features.count, present.sum(axis=1)
        samples = np.bincount(sizes, minlength=count + 1)[sizes]
        weights = (count - 1) / (sizes * (count - sizes)) / samples
        empty = question.start_output_value
        found = held_to_sum(present, scores - empty, weights, question.output_change)
        errors = _standard_errors(found.influences, np.minimum(sizes, count - sizes))
        answer = estimated_from(coalitions.features.shared_out, found.values, errors, len(scores))
        return replace(answer, fit=replace(found.fit, intercept=empty))

    @property
    def _asked(self) -> int:
        assert self.sample_count is not None, "Resolved before it is planned."
        return self.sample_count

    def _pair_count(self, feature_count: int) -> int:
        return min(self._asked // 2, int(2 ** (feature_count - 1)) - 1)

    def _pairs(self, feature_count: int, size: int, count: int) -> NDArray[np.bool_]:
        """Distinct sets of a size, each followed by its complement, shape (2 x count, segments)."""
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, size))))
        if pairs_of(feature_count, size) <= 4 * count:
            every = _all_sets(feature_count, size)
            sets = every[generator.permutation(len(every))[:count]]
        else:
            sets = _drawn_sets(generator, feature_count, size, count)
        return np.stack([sets, ~sets], axis=1).reshape(2 * count, feature_count)


def shares(feature_count: int, pair_count: int) -> dict[int, int]:
    """How many pairs each size of the smaller set gets, in proportion to its weight in the regression."""
    weights = size_weights(feature_count)
    taken = dict.fromkeys(weights, 0)
    left, unfilled = pair_count, list(weights)
    while full := [s for s in unfilled if left * weights[s] / _total(weights, unfilled) >= pairs_of(feature_count, s)]:
        for size in full:
            taken[size] = pairs_of(feature_count, size)
            left -= taken[size]
            unfilled.remove(size)
    total = _total(weights, unfilled)
    quotas = {size: left * weights[size] / total for size in unfilled}
    taken |= {size: floor(quota) for size, quota in quotas.items()}
    while sum(taken.values()) < pair_count:
        short = [size for size in unfilled if taken[size] < pairs_of(feature_count, size)]
        taken[max(short, key=lambda size: (taken[size] == 0, quotas[size] - taken[size]))] += 1
    return taken


def size_weights(feature_count: int) -> dict[int, float]:
    """What all pairs of a size of the smaller set weigh in the regression."""
    weights = {s: (feature_count - 1) / (s * (feature_count - s)) for s in range(1, feature_count // 2 + 1)}
    if feature_count % 2 == 0:
        weights[feature_count // 2] /= 2  # its sets are each other's complements
    return weights


def pairs_of(feature_count: int, size: int) -> int:
    """Pairs of a set of a size and its complement."""
    return comb(feature_count, size) // (2 if 2 * size == feature_count else 1)


def _total(weights: dict[int, float], sizes: list[int]) -> float:
    return sum(weights[size] for size in sizes)


def _all_sets(feature_count: int, size: int) -> NDArray[np.bool_]:
    """One of each pair: those with the first segment come first, and end where sets are each other's complements."""
    members = np.array(list(islice(combinations(range(feature_count), size), pairs_of(feature_count, size))))
    return _as_sets(members, feature_count)


def _drawn_sets(generator: np.random.Generator, feature_count: int, size: int, count: int) -> NDArray[np.bool_]:
    found: dict[bytes, NDArray[np.bool_]] = {}
    while len(found) < count:
        members = np.argsort(generator.random((count, feature_count)), axis=1)[:, :size]
        for own in _as_sets(members, feature_count):
            one = ~own if 2 * size == feature_count and not own[0] else own
            found.setdefault(one.tobytes(), one)
    return np.array(list(found.values())[:count])


def _standard_errors(influences: Values, sizes: NDArray[np.int64]) -> Values | None:
    """Of the values, over seeds, by linearization (Binder 1983): pairs are drawn without replacement from those of
    their size, so a size that is covered adds nothing. None where a size has no pair, or pairs are fewer than values.

    Args:
        influences: of the sets of each pair in turn, shape (sets, segments).
        sizes: of the smaller set of each pair, shape (sets,).
    """
    count = influences.shape[1]
    starts = np.arange(0, len(sizes), 2)
    pairs, sizes = np.add.reduceat(influences, starts), sizes[starts]
    strata = [(pairs[sizes == size], pairs_of(count, size)) for size in range(1, count // 2 + 1)]
    if all(len(own) == population for own, population in strata):
        return np.zeros(count)
    if len(pairs) < count or not all(len(own) for own, _ in strata):
        return None
    variance = sum(((1 - len(own) / population) * _scatter(own) for own, population in strata), np.zeros(count))
    return np.asarray(np.sqrt(variance * len(pairs) / (len(pairs) - count + 1)))


def _scatter(influences: Values) -> Values:
    """Variance of the sum of those drawn; a single one counts with its square."""
    count = len(influences)
    if count == 1:
        return np.asarray(np.square(influences[0]))
    return np.asarray(influences.var(axis=0, ddof=1) * count)


def _as_sets(members: NDArray[np.int64], feature_count: int) -> NDArray[np.bool_]:
    sets = np.zeros((len(members), feature_count), np.bool_)
    np.put_along_axis(sets, members, True, axis=1)
    return sets
