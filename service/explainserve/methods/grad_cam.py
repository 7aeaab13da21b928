"""Grad-CAM (Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra: Grad-CAM, ICCV 2017, equations 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from explainserve.methods.activation_map import ActivationMap
from explainserve.methods.contract import ReadingGuide


@dataclass(frozen=True)
class GradCam(ActivationMap):
    """The sum over channels of activation times the mean gradient of the channel, signed."""

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="activation",
        units="output",
        complete=False,
        needs_baseline=False,
        deterministic=True,
        paper="Selvaraju et al.: Grad-CAM, ICCV 2017, arXiv:1610.02391",
        tier="T2",
        score_before_activation=True,
    )

    def combined(self, activation: NDArray[np.float64], gradient: NDArray[np.float64]) -> NDArray[np.float64]:
        """sum_k (mean_ij g_kij) A_kij."""
        return np.asarray(np.tensordot(gradient.mean(axis=(1, 2)), activation, axes=1))
