"""Guided backpropagation (Springenberg, Dosovitskiy, Brox, Riedmiller: Striving for Simplicity, ICLR workshop 2015,
section 3.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from explainserve.explanation import Attribution, Question, Subject
from explainserve.methods.contract import Cost, Method, Needs, ReadingGuide
from explainserve.methods.rows import gradients, point
from explainserve.plan import Evaluation, GradientRule, Plan

RULE = GradientRule("guided_backpropagation")


@dataclass(frozen=True)
class GuidedBackpropagation(Method):
    """The gradient with only positive values passed back through rectifiers."""

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="backward rule",
        units="altered gradient",
        complete=False,
        needs_baseline=False,
        deterministic=True,
        paper="Springenberg et al.: Striving for Simplicity, ICLR workshop 2015, arXiv:1412.6806",
        tier="T3",
        fails_randomization=True,
    )

    @property
    def needs(self) -> Needs:
        """Its gradient rule."""
        return Needs(RULE.name)

    def cost(self, subject: Subject) -> Cost:
        """One gradient."""
        return Cost.fixed(1)

    def plan(self, question: Question) -> Plan:
        """The instance."""
        return Plan((point(question, question.instance.moving, question.gradient_by(RULE)),))

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution:
        """What came back."""
        return Attribution(gradients(evaluation.segments[0], question), step_count=1).checked()
