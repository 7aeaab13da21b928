"""DeconvNet (Zeiler, Fergus: Visualizing and Understanding Convolutional Networks, ECCV 2014, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from explainserve.methods.contract import ReadingGuide
from explainserve.methods.instance_gradient import InstanceGradient
from explainserve.plan import GradientRule


@dataclass(frozen=True)
class DeconvNet(InstanceGradient):
    """The gradient with the rectifier applied to what is passed back, in place of its derivative."""

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="backward rule",
        units="altered gradient",
        complete=False,
        needs_baseline=False,
        deterministic=True,
        paper="Zeiler, Fergus: Visualizing and Understanding Convolutional Networks, ECCV 2014, arXiv:1311.2901",
        tier="T3",
        fails_randomization=True,  # Sixt, Granz, Landgraf: When Explanations Lie, ICML 2020
    )
    gradient_rule: ClassVar[GradientRule] = GradientRule("deconvnet")
