"""LIME for images and tables (Ribeiro, Singh, Guestrin: "Why should I trust you?", 2016), with the authors' code's
kernel and regression."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from explainserve.explanation import Attribution, Subject
from explainserve.methods.contract import Cost, ReadingGuide
from explainserve.methods.perturbation import Scores
from explainserve.methods.regression import MAX_FEATURES, Values, regression_bytes, ridge
from explainserve.methods.sampling import check_option, check_sample_count, check_seed
from explainserve.methods.segmented import (
    MAX_SAMPLE_COUNT,
    Coalitions,
    PackedSets,
    Segmented,
    Sets,
    check_segment_count,
    estimated_from,
)

MIN_FEATURES = 2


@dataclass(frozen=True)
class Lime(Segmented):
    """Coefficients of a ridge regression of the score on which segments are present; each element gets its segment's.

    Each sample has each segment with probability 1/2, but for the first, which is the instance. A sample weighs
    sqrt(exp(-d^2 / kernel_width^2)), d its cosine distance to the instance. Equal samples are evaluated once.

    Attributes:
        sample_count: with the instance, from 2 to MAX_SAMPLE_COUNT.
        kernel_width: positive.
        ridge: penalty, at least 0.
        seed: at least 0.

    Raises:
        InvalidRequest: SAMPLE_COUNT_OUT_OF_RANGE, SEED_OUT_OF_RANGE, OPTION_OUT_OF_RANGE, SEGMENT_COUNT_OUT_OF_RANGE.
    """

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="perturbation",
        units="output",
        complete=False,
        needs_baseline=True,
        deterministic=False,
        tier="T0",
        paper="Ribeiro, Singh, Guestrin: Why should I trust you? Explaining the predictions of any classifier, KDD "
        "2016, arXiv:1602.04938",
    )
    default_segmentation: ClassVar[str] = "quickshift"
    default_segment_count: ClassVar[int] = 50

    sample_count: int = 1000
    kernel_width: float = 0.25
    ridge: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sample_count(self.sample_count, 2, MAX_SAMPLE_COUNT)
        check_option("kernel_width", self.kernel_width)
        check_option("ridge", self.ridge, above=False)
        check_seed(self.seed)

    def resolved(self, subject: Subject) -> Self:
        """With the segments."""
        own = super().resolved(subject)
        check_segment_count(self, own.feature_count(subject), MIN_FEATURES, MAX_FEATURES)
        return own

    def cost(self, subject: Subject) -> Cost:
        """One row per sample, fewer where some are equal."""
        count = self.feature_count(subject)
        sets = 2 ** (MAX_FEATURES if count is None else count) - 1
        return Cost(min_forward_rows=1, max_forward_rows=min(self.sample_count - 1, sets))

    def path_bytes(self, subject: Subject) -> int:
        """The rows of a round, and the regression."""
        count = self.feature_count(subject) or MAX_FEATURES
        return super().path_bytes(subject) + regression_bytes(self.sample_count, count)

    def coalitions(self, feature_count: int) -> Sets:
        """The distinct samples that are not the instance."""
        check_segment_count(self, feature_count, MIN_FEATURES, MAX_FEATURES)
        return PackedSets.of(self._samples(feature_count)[0])

    def fewest(self, feature_count: int) -> int:
        """With the instance one more than coefficients and intercept."""
        return feature_count + 1

    def answered(self, coalitions: Coalitions, scores: Scores) -> Attribution:
        """The regression on the samples that are done, and the instance."""
        sets, counts, full_count = self._samples(coalitions.features.count)
        present = np.concatenate([np.ones((1, sets.shape[1]), np.bool_), sets[: len(scores)]])
        values = np.concatenate([[coalitions.question.instance_output_value], scores])
        repeats = np.concatenate([[full_count], counts[: len(scores)]])
        distance = 1 - np.sqrt(present.mean(axis=1))
        weights = repeats * np.sqrt(np.exp(-np.square(distance / self.kernel_width)))
        found = ridge(present, values, weights, self.ridge)
        errors = _standard_errors(found.influences, repeats)
        answer = estimated_from(coalitions.features.spread, found.values, errors, len(scores))
        return replace(answer, fit=found.fit)

    def _samples(self, feature_count: int) -> tuple[NDArray[np.bool_], NDArray[np.int64], int]:
        """Distinct sets of segments in the order in which they are drawn, how often each is, and how often the full
        one, with the instance; at least one set."""
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed)))
        drawn = generator.integers(0, 2, (self.sample_count - 1, feature_count)).astype(np.bool_)
        full = np.asarray(drawn.all(axis=1))
        if full.all():
            drawn[-1], full[-1] = False, False
        partial = drawn[~full]
        _, first, counts = np.unique(np.packbits(partial, axis=1), axis=0, return_index=True, return_counts=True)
        order = np.argsort(first)
        return partial[first[order]], counts[order], 1 + int(full.sum())


def _standard_errors(influences: Values, repeats: Values) -> Values | None:
    """Of the coefficients, over seeds: HC1 (White 1980; MacKinnon, White 1985), which does not take the regression for
    a true model of the score. None with no more samples than coefficients.

    Args:
        influences: of all repeats of each distinct sample, shape (samples, segments).
        repeats: shape (samples,).
    """
    count, parameter_count = repeats.sum(), 1 + influences.shape[1]
    if count <= parameter_count:
        return None
    squares = (np.square(influences) / repeats[:, None]).sum(axis=0)
    return np.asarray(np.sqrt(squares * count / (count - parameter_count)))
