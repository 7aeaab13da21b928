"""LayerCAM (Jiang, Zhang, Hou, Cheng, Wei: LayerCAM, IEEE Transactions on Image Processing 2021, equation 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from explainserve.methods.activation_map import ActivationMap
from explainserve.methods.contract import ReadingGuide


@dataclass(frozen=True)
class LayerCam(ActivationMap):
    """The sum over channels of activation times positive gradient, position by position."""

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="activation",
        units="output",
        complete=False,
        needs_baseline=False,
        deterministic=True,
        paper="Jiang et al.: LayerCAM, IEEE Transactions on Image Processing 2021",
        tier="T2",
        score_before_activation=True,
    )

    def combined(self, activation: NDArray[np.float64], gradient: NDArray[np.float64]) -> NDArray[np.float64]:
        """sum_k relu(g_kij) A_kij."""
        return np.asarray((np.maximum(gradient, 0) * activation).sum(axis=0))
