"""The gradient (Simonyan, Vedaldi, Zisserman: Deep Inside Convolutional Networks, 2014, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from explainserve.explanation import Attribution, Question, Subject
from explainserve.methods.contract import Cost, Method, ReadingGuide
from explainserve.methods.rows import gradients, point
from explainserve.plan import Evaluation, Plan


@dataclass(frozen=True)
class Gradient(Method):
    """dF/dx at the instance, signed."""

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="gradient",
        units="output per unit of input",
        complete=False,
        needs_baseline=False,
        deterministic=True,
        paper="Simonyan, Vedaldi, Zisserman: Deep Inside Convolutional Networks, ICLR workshop 2014, arXiv:1312.6034",
    )

    def cost(self, subject: Subject) -> Cost:
        """One gradient."""
        return Cost.fixed(1)

    def plan(self, question: Question) -> Plan:
        """The instance."""
        return Plan((point(question, question.instance.moving, question.gradient),))

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution:
        """What came back."""
        return Attribution(gradients(evaluation.segments[0], question), step_count=1).checked()
