"""The nouns: an instance, what is asked of it, where its path starts, and the attribution that answers."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from explainserve.plan import Differentiation, Selector, Tensors
from explainserve.signature import Score, ScoreHead


class StopReason(enum.Enum):
    """Why a path integral ended, or that it has not."""

    FIXED_STEPS = "fixed_steps"
    CONVERGED = "converged"
    MAX_STEPS = "max_steps"
    TIME_BUDGET = "time_budget"
    NON_CONVERGENT = "non_convergent"
    NON_FINITE = "non_finite"
    UNFINISHED = "unfinished"


@dataclass(frozen=True, eq=False)
class Instance:
    """One instance, without the batch axis.

    Attributes:
        moving: floating-point inputs that move along the path and receive attributions.
        fixed: all other inputs.
    """

    moving: Tensors
    fixed: Tensors


@dataclass(frozen=True, eq=False)
class Target:
    """What is explained, resolved on one instance: one number computed from one output.

    Attributes:
        index, negative_index: of the element and of a margin's subtracted element; () where there is none.
        selection: how it was chosen: "index", "label", "argmax", "top_k", "margin" or "weights".
        reduction: how remaining axes were folded: "", "sum" or "mean".
        request_index: position of the request's target it came from.
    """

    output: str
    score: Score
    head: ScoreHead
    selector: Selector
    index: tuple[int, ...] = ()
    negative_index: tuple[int, ...] = ()
    label: str = ""
    selection: str = "index"
    reduction: str = ""
    request_index: int = 0


@dataclass(frozen=True, eq=False)
class Baseline:
    """Where a path starts: values of the moving inputs, in MODEL space.

    Attributes:
        request_index: position of the request's baseline it came from.
        draw_index: draw number of a noise baseline.
    """

    moving: Tensors
    request_index: int = 0
    draw_index: int = 0


@dataclass(frozen=True, eq=False)
class Question:
    """Why does the target have this value at the instance and not the one at the baseline?

    Attributes:
        instance_output_value, baseline_output_value: F(x) and F(x'), in the unit of the target's score.
    """

    instance: Instance
    target: Target
    baseline: Baseline
    instance_output_value: float
    baseline_output_value: float

    @property
    def output_change(self) -> float:
        """F(x) - F(x')."""
        return self.instance_output_value - self.baseline_output_value

    @property
    def gradient(self) -> Differentiation:
        """The target's output and head, differentiated with respect to all moving inputs."""
        return Differentiation(self.target.output, self.target.head, tuple(self.instance.moving))


@dataclass(frozen=True, eq=False)
class Attribution:
    """The answer of a method.

    Attributes:
        tensors: raw attributions by input name, float32, in the input's shape without the batch axis.
        step_count: gradient evaluations of the path.
        map_error: estimated relative L2 error over all moving inputs, or None where the rule gives no estimate.
        alphas, scores: the score path, ascending from 0 (F(x')) to 1 (F(x)), both float64, shape (points,).
    """

    tensors: Mapping[str, NDArray[np.float32]]
    step_count: int
    stop_reason: StopReason
    map_error: float | None
    alphas: NDArray[np.float64]
    scores: NDArray[np.float64]


def attribution_sum(tensors: Mapping[str, NDArray[np.float32]]) -> float:
    """Sum over all elements of all inputs, in float64."""
    return float(sum(tensor.sum(dtype=np.float64) for tensor in tensors.values()))


def absolute_sum(tensors: Mapping[str, NDArray[np.float32]]) -> float:
    """Sum of absolute values over all elements of all inputs, in float64."""
    return float(sum(np.abs(tensor.astype(np.float64)).sum() for tensor in tensors.values()))
