"""DeepLIFT with the rescale rule (Shrikumar, Greenside, Kundaje: Learning Important Features Through Propagating
Activation Differences, ICML 2017, sections 3.1 to 3.5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from explainserve.explanation import Attribution, Question, Subject
from explainserve.methods.contract import Cost, Method, Needs, ReadingGuide
from explainserve.plan import Evaluation, GradientRule, Plan, Segment

RULE = GradientRule("deeplift_rescale")


@dataclass(frozen=True)
class DeepLift(Method):
    """(x - x') times the multipliers between instance and baseline: sums to F(x) - F(x')."""

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="backward rule",
        units="output",
        complete=True,
        needs_baseline=True,
        deterministic=True,
        paper="Shrikumar, Greenside, Kundaje: Learning Important Features Through Propagating Activation Differences, "
        "ICML 2017, arXiv:1704.02685",
        tier="T3",
        score_before_activation=True,
    )

    @property
    def needs(self) -> Needs:
        """Its rule, which compares two forward passes."""
        return Needs(RULE.name)

    def cost(self, subject: Subject) -> Cost:
        """One row, whose forward pass goes through instance and baseline."""
        return Cost.fixed(1)

    def plan(self, question: Question) -> Plan:
        """The end of the path; the rule looks at its start too."""
        one = np.ones(1)
        segment = Segment(
            start=question.start,
            end=question.instance.moving,
            fixed=question.instance.fixed,
            function=question.gradient_by(RULE),
            alphas=one,
            weights=one,
            selectors=(question.target.selector,),
        )
        return Plan((segment,))

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution:
        """Differences times multipliers."""
        multipliers, moving = evaluation.segments[0].gradient_sums, question.instance.moving
        found = {
            name: (x.astype(np.float64) - question.start[name].astype(np.float64)) * multipliers[name]
            for name, x in moving.items()
        }
        return Attribution({name: a.astype(np.float32) for name, a in found.items()}, step_count=1).checked()
