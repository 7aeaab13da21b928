"""Guided backpropagation (Springenberg, Dosovitskiy, Brox, Riedmiller: Striving for Simplicity, ICLR workshop 2015,
section 3.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from explainserve.methods.contract import ReadingGuide
from explainserve.methods.instance_gradient import InstanceGradient
from explainserve.plan import GradientRule


@dataclass(frozen=True)
class GuidedBackpropagation(InstanceGradient):
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
    gradient_rule: ClassVar[GradientRule] = GradientRule("guided_backpropagation")
