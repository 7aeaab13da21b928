"""One gradient at the instance, under any gradient rule: what methods of a single backward pass have in common."""

from __future__ import annotations

from dataclasses import dataclass

from explainserve.explanation import Attribution, Question, Subject
from explainserve.methods.contract import Cost, Method, Needs
from explainserve.methods.rows import gradients, point
from explainserve.plan import STANDARD, Evaluation, GradientRule, Plan


@dataclass(frozen=True)
class InstanceGradient(Method):
    """What comes back from one backward pass; methods say by which rule, and how to read it."""

    @property
    def gradient_rule(self) -> GradientRule:
        """What the pass follows."""
        return STANDARD

    @property
    def needs(self) -> Needs:
        """Its gradient rule."""
        return Needs(self.gradient_rule.name)

    def cost(self, subject: Subject) -> Cost:
        """One gradient."""
        return Cost.fixed(1)

    def plan(self, question: Question) -> Plan:
        """The instance."""
        return Plan((point(question, question.instance.moving, question.gradient_by(self.gradient_rule)),))

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution:
        """What came back."""
        return Attribution(gradients(evaluation.segments[0], question), step_count=1).checked()
