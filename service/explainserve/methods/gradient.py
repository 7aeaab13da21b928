"""The gradient (Simonyan, Vedaldi, Zisserman: Deep Inside Convolutional Networks, 2014, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from explainserve.methods.contract import ReadingGuide
from explainserve.methods.instance_gradient import InstanceGradient


@dataclass(frozen=True)
class Gradient(InstanceGradient):
    """dF/dx at the instance, signed."""

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="gradient",
        units="output per unit of input",
        complete=False,
        needs_baseline=False,
        deterministic=True,
        paper="Simonyan, Vedaldi, Zisserman: Deep Inside Convolutional Networks, ICLR workshop 2014, arXiv:1312.6034",
    )
