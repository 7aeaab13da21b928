"""PatternAttribution (Kindermans, Schuett, Alber, Mueller, Erhan, Kim, Daehne: Learning How to Explain Neural Networks,
ICLR 2018, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from explainserve.methods.contract import ReadingGuide
from explainserve.methods.instance_gradient import InstanceGradient
from explainserve.plan import GradientRule


@dataclass(frozen=True)
class PatternAttribution(InstanceGradient):
    """The score, propagated back by patterns times weights: what the signal contributes."""

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="backward rule",
        units="relevance",
        complete=False,
        needs_baseline=False,
        deterministic=True,
        paper="Kindermans et al.: Learning How to Explain Neural Networks, ICLR 2018, arXiv:1705.05598",
        tier="T3",
        score_before_activation=True,
        fails_randomization=True,  # Sixt, Granz, Landgraf: When Explanations Lie, ICML 2020
    )
    gradient_rule: ClassVar[GradientRule] = GradientRule("pattern_attribution")
