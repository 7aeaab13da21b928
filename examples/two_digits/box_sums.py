"""Integrated Gradients in plain torch, summed in a box around each digit: what training is checked against.

It shares no code with the service, so it is also an oracle for what the service returns.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from network import TwoDigits, gray_input, normalized
from pictures import Pair

STEP_COUNT = 128


def probability_attributions(network: TwoDigits, instance: Tensor, classes: Sequence[int]) -> Tensor:
    """Integrated Gradients (Sundararajan et al. 2017, eq. 1) of each class's probability against the gray picture.

    Midpoint rule with 128 points; instance (3, 64, 64), result (classes, 3, 64, 64).
    """
    baseline = gray_input()
    alphas = (torch.arange(STEP_COUNT) + 0.5) / STEP_COUNT
    rows = (baseline + alphas[:, None, None, None] * (instance - baseline)).requires_grad_(True)
    scores = network(rows).softmax(1)[:, list(classes)].sum(0)
    gradients = [torch.autograd.grad(score, rows, retain_graph=True)[0].mean(0) for score in scores]
    return torch.stack(gradients) * (instance - baseline)


def box_sums(network: TwoDigits, pair: Pair) -> NDArray[np.float64]:
    """Sum of attributions, in probability: rows are the classes (left, right), columns the boxes (left, right)."""
    instance = normalized(pair.picture.image[None])[0]
    maps = probability_attributions(network, instance, pair.labels).double().sum(1)
    sums = [[m[y : y + height, x : x + width].sum() for x, y, width, height in pair.picture.boxes] for m in maps]
    return np.array(sums)


def own_positive_other_negative(sums: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each class's own box is positive and the other box negative; (pictures, 2, 2) gives (pictures, 2)."""
    own = np.diagonal(sums, axis1=1, axis2=2)
    other = np.diagonal(sums[:, :, ::-1], axis1=1, axis2=2)
    return np.asarray((own > 0) & (other < 0))
