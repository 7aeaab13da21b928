"""Grad-CAM++ (Chattopadhay, Sarkar, Howlader, Balasubramanian: Grad-CAM++, WACV 2018, equations 10 and 19)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from explainserve.methods.activation_map import ActivationMap
from explainserve.methods.contract import ReadingGuide


@dataclass(frozen=True)
class GradCamPlusPlus(ActivationMap):
    """Grad-CAM with channels weighted by their positive gradients, each by its second and third order."""

    reading_guide: ClassVar[ReadingGuide] = ReadingGuide(
        family="activation",
        units="output",
        complete=False,
        needs_baseline=False,
        deterministic=True,
        paper="Chattopadhay et al.: Grad-CAM++, WACV 2018, arXiv:1710.11063",
        tier="T2",
        score_before_activation=True,
    )

    def combined(self, activation: NDArray[np.float64], gradient: NDArray[np.float64]) -> NDArray[np.float64]:
        """sum_k w_k A_kij with w_k = sum_ij alpha_kij relu(g_kij), alpha = g^2 / (2 g^2 + (sum_ij A) g^3).

        The paper differentiates exp(F): its factor exp(F) is the same for the whole map, overflows, and is left out.
        Where alpha is 0 / 0 it is 0.
        """
        square = np.square(gradient)
        denominator = 2 * square + activation.sum(axis=(1, 2), keepdims=True) * square * gradient
        alpha = np.divide(square, denominator, out=np.zeros_like(square), where=denominator != 0)
        weights = (alpha * np.maximum(gradient, 0)).sum(axis=(1, 2))
        return np.asarray(np.tensordot(weights, activation, axes=1))
