"""What the curvature of an integrand adds to the trapezoid rule, as far as its own nodes show that it is smooth.

Over a gap of width h the trapezoid rule exceeds the integral by h^2 / 12 times the change of the derivative (Euler and
Maclaurin), and constant extrapolation over an end piece of width e misses e^2 / 2 times the derivative there.
Derivatives come from parabolas through neighbouring nodes. On a smooth integrand, such as that of a transformer, this
removes nearly all of the error; on one that jumps wherever a ReLU switches it is noise.

Which of the two it is, the nodes tell: each is left out and predicted from the others, without the derivatives and with
them. How much of what the first prediction misses the second one explains is a regression over all nodes and all
elements, and its coefficient, between 0 and 1, is the share of the correction that is applied. Gaps and end pieces are
asked apart: a straight line tells nothing about gaps and everything about ends. Nothing is assumed about the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Positions = NDArray[np.intp]

SMOOTH_GAIN = 16.0
"""The error of a cubic falls by another factor of 4 when gaps are halved, its square by 16. Nodes are left out at twice
the spacing of those that remain, so what a cubic leaves there overstates a smooth integrand's error by as much. It is
granted as far as the cubic explains what is missed: with few nodes a steep transition can look smooth."""


@dataclass(frozen=True, eq=False)
class Smoothness:
    """The correction of a trapezoid rule and what it does to the squared error.

    Attributes:
        coefficients: of the gradients at the nodes, to be added to the trapezoid rule, shape (nodes,).
        gap_share, end_share: of the squared error of gaps and of end pieces that is left, in [0, 1].
    """

    coefficients: Vector
    gap_share: float = 1.0
    end_share: float = 1.0


def smoothness(alphas: Vector, spacings: Vector, ends: tuple[float, float], values: Vector) -> Smoothness:
    """The correction of the trapezoid rule between these nodes, with constant extrapolation to both ends.

    Args:
        alphas: of the nodes, ascending, shape (nodes,), at least 6.
        spacings: of the gaps between neighbours, which may be cut into several equal ones, shape (nodes - 1,).
        ends: widths of the pieces before the first and after the last node.
        values: the integrand at the nodes, shape (nodes, elements).
    """
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is not corrected
        changes = values - values[0]  # all that follows is made of differences, and most of a value may cancel
        products = changes @ changes.T
    derivatives = _derivatives(alphas, np.arange(len(alphas)), _neighbourhoods(len(alphas)))
    between = _regression(*_interpolated(alphas), products)
    beyond = _regression(*_extrapolated(alphas), products)
    before, after = ends
    gaps = -(spacings**2 / 12) @ np.diff(derivatives, axis=0)
    pieces = after**2 / 2 * derivatives[-1] - before**2 / 2 * derivatives[0]
    smooth = between.coefficient**2 * (1 - between.unexplained)
    return Smoothness(
        between.coefficient * gaps + beyond.coefficient * pieces,
        gap_share=between.unexplained * (1 - smooth + smooth / SMOOTH_GAIN),
        end_share=beyond.unexplained,
    )


@dataclass(frozen=True)
class _Regression:
    """Of what is missed on what explains it: the coefficient, and the share of squares that is left; both in [0, 1]."""

    coefficient: float = 0.0
    unexplained: float = 1.0


def _regression(missed: Vector, explained: Vector, products: Vector) -> _Regression:
    """Through the origin, over the elements of all rows; rows hold coefficients of the nodes with these products."""
    weighted = explained @ products
    squares = float((weighted * explained).sum())
    together = float((weighted * missed).sum())
    total = float((missed @ products * missed).sum())
    if not (min(together, squares, total) > 0 and math.isfinite(squares) and math.isfinite(total)):
        return _Regression()
    coefficient = min(together / squares, 1.0)
    left = (total - 2 * coefficient * together + coefficient**2 * squares) / total
    return _Regression(coefficient, min(max(left, 0.0), 1.0))


def _interpolated(alphas: Vector) -> tuple[Vector, Vector]:
    """By how much the integral moves when a node joins its neighbours, and by how much a cubic without it says so.

    Coefficients of the values at all nodes, one row per node that has two neighbours on both sides.
    """
    node = np.arange(2, len(alphas) - 2)
    before, after = node - 1, node + 1
    width = (alphas[after] - alphas[before])[:, None]
    t = (alphas[node] - alphas[before])[:, None] / width
    unit = np.eye(len(alphas))
    line = (1 - t) * unit[before] + t * unit[after]
    chord = (unit[after] - unit[before]) / width
    left = _derivatives(alphas, before, np.stack([node - 2, before, after], axis=1))
    right = _derivatives(alphas, after, np.stack([before, after, node + 2], axis=1))
    cubic = width * (t * (1 - t) ** 2 * (left - chord) + t**2 * (t - 1) * (right - chord))  # Hermite, minus the line
    return width / 2 * (unit[node] - line), width / 2 * cubic


def _extrapolated(alphas: Vector) -> tuple[Vector, Vector]:
    """The same for a node that is predicted from those on one side of it: by the nearest, and by its derivative."""
    last = len(alphas) - 3
    node = np.concatenate([np.arange(last), np.arange(3, len(alphas))])
    inward = np.repeat([1, -1], last)  # those at the start from what follows, those at the end from what precedes
    nearest = node + inward
    step = (alphas[node] - alphas[nearest])[:, None]
    unit = np.eye(len(alphas))
    derivative = _derivatives(alphas, nearest, node[:, None] + inward[:, None] * [1, 2, 3])
    return abs(step) / 2 * (unit[node] - unit[nearest]), abs(step) / 2 * step * derivative


def _derivatives(alphas: Vector, nodes: Positions, around: Positions) -> Vector:
    """Coefficients of derivatives at nodes, each of the parabola through three nodes, shape (len(nodes), all nodes).

    Args:
        nodes: positions, shape (rows,).
        around: positions of the three, shape (rows, 3).
    """
    x, points = alphas[nodes][:, None], alphas[around]
    a, b = points[:, [1, 0, 0]], points[:, [2, 2, 1]]  # the two others of each
    rows = np.zeros((len(nodes), len(alphas)))
    np.put_along_axis(rows, around, ((x - a) + (x - b)) / ((points - a) * (points - b)), axis=1)
    return rows


def _neighbourhoods(count: int) -> Positions:
    """Each node with its neighbours, at an end the three last ones; shape (count, 3)."""
    first = np.arange(count)[:, None] - 1
    neighbourhoods: Positions = np.clip(first, 0, count - 3) + np.arange(3)
    return neighbourhoods
