"""PatternAttribution (Kindermans, Schuett, Alber, Mueller, Erhan, Kim, Daehne: Learning How to Explain Neural Networks,
ICLR 2018, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from explainserve.explanation import Attribution, Question, Subject
from explainserve.methods.contract import Cost, Method, Needs, ReadingGuide
from explainserve.methods.rows import gradients, point
from explainserve.plan import Evaluation, GradientRule, Plan

RULE = GradientRule("pattern_attribution")


@dataclass(frozen=True)
class PatternAttribution(Method):
    """The score, propagated back by patterns times weights: what the signal contributes."""

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="backward rule",
        units="relevance",
        complete=False,
        needs_baseline=False,
        deterministic=True,
        paper="Kindermans et al.: Learning How to Explain Neural Networks, ICLR 2018, arXiv:1705.05598",
        tier="T3",
        fails_randomization=True,  # Sixt, Granz, Landgraf: When Explanations Lie, ICML 2020
    )

    @property
    def needs(self) -> Needs:
        """Its rule, which takes the patterns that lie beside the model."""
        return Needs(RULE.name)

    def cost(self, subject: Subject) -> Cost:
        """One backward pass."""
        return Cost.fixed(1)

    def plan(self, question: Question) -> Plan:
        """The instance."""
        return Plan((point(question, question.instance.moving, question.gradient_by(RULE)),))

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution:
        """What came back."""
        return Attribution(gradients(evaluation.segments[0], question), step_count=1).checked()
