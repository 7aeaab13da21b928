"""DeconvNet (Zeiler, Fergus: Visualizing and Understanding Convolutional Networks, ECCV 2014, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from explainserve.explanation import Attribution, Question, Subject
from explainserve.methods.contract import Cost, Method, Needs, ReadingGuide
from explainserve.methods.rows import gradients, point
from explainserve.plan import Evaluation, GradientRule, Plan

RULE = GradientRule("deconvnet")


@dataclass(frozen=True)
class DeconvNet(Method):
    """The gradient with the rectifier applied to what is passed back, in place of its derivative."""

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="backward rule",
        units="altered gradient",
        complete=False,
        needs_baseline=False,
        deterministic=True,
        paper="Zeiler, Fergus: Visualizing and Understanding Convolutional Networks, ECCV 2014, arXiv:1311.2901",
        tier="T3",
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
