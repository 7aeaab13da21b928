"""Fixed quadrature rules on [0, 1]: where to take gradients, and with which weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import InvalidRequest

Nodes = NDArray[np.float64]
Weights = NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """A rule by its number of nodes n.

    Attributes:
        nodes_and_weights: ascending nodes in [0, 1] and weights that sum to 1, both of shape (n,).
        min_step_count: smallest n that the rule is defined for.
    """

    nodes_and_weights: Callable[[int], tuple[Nodes, Weights]]
    min_step_count: int = 1


def _left(n: int) -> tuple[Nodes, Weights]:
    return np.arange(n) / n, np.full(n, 1 / n)


def _right(n: int) -> tuple[Nodes, Weights]:
    return np.arange(1, n + 1) / n, np.full(n, 1 / n)


def _midpoint(n: int) -> tuple[Nodes, Weights]:
    return (np.arange(n) + 0.5) / n, np.full(n, 1 / n)


def _trapezoid(n: int) -> tuple[Nodes, Weights]:
    weights = np.full(n, 1 / (n - 1))
    weights[[0, -1]] /= 2
    return np.arange(n) / (n - 1), weights


@lru_cache(maxsize=64)  # an eigenvalue problem: 0.1 s for hundreds of nodes
def _gauss_legendre(n: int) -> tuple[Nodes, Weights]:
    nodes, weights = np.polynomial.legendre.leggauss(n)
    nodes, weights = (nodes + 1) / 2, weights / 2
    nodes.flags.writeable = weights.flags.writeable = False  # shared between callers
    return nodes, weights


RULES: dict[str, Rule] = {
    "left": Rule(_left),
    "right": Rule(_right),
    "midpoint": Rule(_midpoint),
    "trapezoid": Rule(_trapezoid, min_step_count=2),
    "gauss_legendre": Rule(_gauss_legendre),
}
"""Fixed rules by name. Composite rules: Davis & Rabinowitz, Methods of Numerical Integration, 2nd ed., section 2.1."""


def check_step_count(option: str, value: int, minimum: int = 1) -> None:
    """Raises InvalidRequest (STEP_COUNT_OUT_OF_RANGE) below the minimum."""
    if value < minimum:
        raise InvalidRequest(
            "STEP_COUNT_OUT_OF_RANGE",
            f"{option} is {value}; expected at least {minimum}",
            option=option,
            value=value,
            min=minimum,
        )
