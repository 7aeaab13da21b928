"""Feature ablation (as in Captum: Kokhlikyan et al. 2020), which is leave-one-out by groups of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from explainserve.explanation import Attribution, Subject
from explainserve.methods.contract import Cost, ReadingGuide
from explainserve.methods.perturbation import Scores
from explainserve.methods.segmented import Coalitions, Present, Segmented, Sets, refuse_found


@dataclass(frozen=True)
class AllButOne:
    """As many sets as segments, each without one."""

    count: int

    def present(self, first: int, last: int) -> Present:
        """All but those on a diagonal."""
        return np.asarray(np.arange(first, last)[:, None] != np.arange(self.count))


@dataclass(frozen=True)
class FeatureAblation(Segmented):
    """F(x) minus F of the instance without one segment; each element gets the value of its segment.

    Raises:
        InvalidRequest: SEGMENTATION_UNSUITABLE.
    """

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="perturbation",
        units="output",
        complete=False,
        needs_baseline=True,
        deterministic=True,
        tier="T0",
        paper="Kokhlikyan et al.: Captum: a unified and generic model interpretability library for PyTorch, 2020, "
        "arXiv:2009.07896",
    )

    def resolved(self, subject: Subject) -> Self:
        """With the segments."""
        refuse_found(self)
        return super().resolved(subject)

    def cost(self, subject: Subject) -> Cost:
        """One row per segment."""
        return Cost.fixed(forward_rows=self.feature_count(subject) or 0)

    def coalitions(self, feature_count: int) -> Sets:
        """All but one segment."""
        return AllButOne(feature_count)

    def answered(self, coalitions: Coalitions, scores: Scores) -> Attribution:
        """Zero for segments that there was no time for."""
        values = np.zeros(coalitions.features.count)
        values[: len(scores)] = coalitions.question.instance_output_value - scores
        return Attribution(coalitions.features.spread(values), step_count=len(scores))
