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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

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
    derivatives = np.array([_derivative(alphas, node, _around(node, len(alphas))) for node in range(len(alphas))])
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
    squares = np.einsum("ij,jk,ik->", explained, products, explained)
    together = np.einsum("ij,jk,ik->", missed, products, explained)
    total = np.einsum("ij,jk,ik->", missed, products, missed)
    if not (min(together, squares, total) > 0 and np.isfinite([squares, total]).all()):
        return _Regression()
    coefficient = min(float(together / squares), 1.0)
    left = (total - 2 * coefficient * together + coefficient**2 * squares) / total
    return _Regression(coefficient, float(np.clip(left, 0.0, 1.0)))


def _interpolated(alphas: Vector) -> tuple[Vector, Vector]:
    """By how much the integral moves when a node joins its neighbours, and by how much a cubic without it says so.

    Coefficients of the values at all nodes, one row per node that has two neighbours on both sides.
    """
    rows = [_between(alphas, node) for node in range(2, len(alphas) - 2)]
    missed, explained = zip(*rows, strict=True)
    return np.array(missed), np.array(explained)


def _extrapolated(alphas: Vector) -> tuple[Vector, Vector]:
    """The same for a node that is predicted from those on one side of it: by the nearest, and by its derivative."""
    count = len(alphas)
    rows = [_beyond(alphas, node, node + 1, (node + 1, node + 2, node + 3)) for node in range(count - 3)]
    rows += [_beyond(alphas, node, node - 1, (node - 1, node - 2, node - 3)) for node in range(3, count)]
    missed, explained = zip(*rows, strict=True)
    return np.array(missed), np.array(explained)


def _beyond(alphas: Vector, node: int, nearest: int, around: Sequence[int]) -> tuple[Vector, Vector]:
    step = alphas[node] - alphas[nearest]
    change = np.zeros(len(alphas))
    change[node], change[nearest] = 1, -1
    return abs(step) / 2 * change, abs(step) / 2 * step * _derivative(alphas, nearest, around)


def _between(alphas: Vector, node: int) -> tuple[Vector, Vector]:
    width = alphas[node + 1] - alphas[node - 1]
    t = (alphas[node] - alphas[node - 1]) / width
    line, chord = np.zeros(len(alphas)), np.zeros(len(alphas))
    line[node - 1], line[node + 1] = 1 - t, t
    chord[node - 1], chord[node + 1] = -1 / width, 1 / width
    value = np.zeros(len(alphas))
    value[node] = 1
    left = _derivative(alphas, node - 1, (node - 2, node - 1, node + 1))
    right = _derivative(alphas, node + 1, (node - 1, node + 1, node + 2))
    cubic = width * (t * (1 - t) ** 2 * (left - chord) + t**2 * (t - 1) * (right - chord))  # Hermite, minus the line
    return width / 2 * (value - line), width / 2 * cubic


def _derivative(alphas: Vector, node: int, around: Sequence[int]) -> Vector:
    """Coefficients of the derivative at a node of the parabola through three nodes."""
    row = np.zeros(len(alphas))
    x = alphas[node]
    for k in around:
        a, b = (alphas[other] for other in around if other != k)
        row[k] = ((x - a) + (x - b)) / ((alphas[k] - a) * (alphas[k] - b))
    return row


def _around(node: int, count: int) -> tuple[int, int, int]:
    """A node and its neighbours; at an end, the three last ones."""
    first = min(max(node - 1, 0), count - 3)
    return first, first + 1, first + 2
