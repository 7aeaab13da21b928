"""Gradient x input (Shrikumar, Greenside, Shcherbina, Kundaje: Not Just a Black Box, 2016, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from explainserve.explanation import Attribution, Question
from explainserve.methods.contract import ReadingGuide
from explainserve.methods.instance_gradient import InstanceGradient
from explainserve.methods.rows import gradients
from explainserve.plan import Evaluation, Plan


@dataclass(frozen=True)
class GradientXInput(InstanceGradient):
    """x dF/dx at the instance, in MODEL space: sums to F(x) for networks of rectifiers without biases only."""

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="gradient",
        units="output",
        complete=False,
        needs_baseline=False,
        deterministic=True,
        paper="Shrikumar, Greenside, Shcherbina, Kundaje: Not Just a Black Box, 2016, arXiv:1605.01713",
    )

    def attribution(self, question: Question, plan: Plan, evaluation: Evaluation) -> Attribution:
        """The product, element by element."""
        found, x = gradients(evaluation.segments[0], question), question.instance.moving
        product = {name: x[name].astype(np.float32) * gradient for name, gradient in found.items()}
        return Attribution(product, step_count=1).checked()
