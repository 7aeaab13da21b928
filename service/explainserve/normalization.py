"""Recipes of display with their numbers, per map and joint. The server states them and never applies one.

A recipe maps a value v of its view to clip((v - center) / scale, lower, upper); `docs/normalization.md` gives the
formulas with a worked example.
"""

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from explainserve.statistics import Statistics, View


class NormalizationKind(enum.Enum):
    """The recipes; values are the wire's."""

    MIN_MAX = 1
    QUANTILE_RANGE = 2
    POSITIVE_MAX = 3
    SYMMETRIC_ABS_MAX = 4
    SYMMETRIC_QUANTILE = 5
    ABS_MASS = 6


@dataclass(frozen=True)
class Normalization:
    """A recipe with its numbers, a mirror of the message of that name in `statistics.proto`.

    `center`, `scale` and `zero_at` are None where nothing is finite. `degenerate` means that the scale came out as 0 or
    not finite (or does not exist); `scale` is 1 then. `zero_at` is the displayed value of a zero attribution, in
    [lower, upper].
    """

    kind: NormalizationKind
    view: View
    center: float | None
    scale: float | None
    lower: float
    upper: float
    zero_at: float | None
    degenerate: bool
    lower_probability: float | None = None
    upper_probability: float | None = None
    mass: float | None = None


@dataclass(frozen=True)
class Recipe:
    """How a kind reads its numbers from figures: `center` is displayed as 0, `end` as 1; so scale = end - center."""

    center: Callable[[Statistics], float | None]
    end: Callable[[Statistics], float | None]
    lower: float
    lower_probability: float | None = None
    upper_probability: float | None = None
    mass: float | None = None
    upper: float = 1.0


def _zero(_: Statistics) -> float:
    return 0.0


def _quantile_range(low: float, high: float) -> Recipe:
    return Recipe(
        lambda s: s.quantile(low), lambda s: s.quantile(high), 0.0, lower_probability=low, upper_probability=high
    )


def _symmetric_quantile(probability: float) -> Recipe:
    return Recipe(_zero, lambda s: s.abs_quantile(probability), -1.0, upper_probability=probability)


def _abs_mass(mass: float) -> Recipe:
    return Recipe(_zero, lambda s: s.abs_mass_threshold(mass), -1.0, mass=mass)


NORMALIZATIONS: dict[NormalizationKind, Recipe] = {
    NormalizationKind.MIN_MAX: Recipe(lambda s: s.min, lambda s: s.max, 0.0),
    NormalizationKind.QUANTILE_RANGE: _quantile_range(0.01, 0.99),
    NormalizationKind.POSITIVE_MAX: Recipe(_zero, lambda s: s.max, 0.0),
    NormalizationKind.SYMMETRIC_ABS_MAX: Recipe(_zero, lambda s: s.abs_max, -1.0),
    NormalizationKind.SYMMETRIC_QUANTILE: _symmetric_quantile(0.99),
    NormalizationKind.ABS_MASS: _abs_mass(0.98),
}


def normalizations(statistics: Statistics) -> list[Normalization]:
    """Every kind with its default parameters, in the order of the table, from the figures of one map or of a group."""
    return [_normalization(kind, recipe, statistics) for kind, recipe in NORMALIZATIONS.items()]


def apply(normalization: Normalization, values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Displayed values of a view's values, same shape; NaN stays NaN. ValueError where the recipe has no numbers."""
    if normalization.center is None or normalization.scale is None:
        raise ValueError(f"{normalization.kind.name} of {normalization.view.name} has no numbers: no finite element")
    with np.errstate(over="ignore"):  # what overflows is clipped
        displayed = (np.asarray(values, dtype=np.float64) - normalization.center) / normalization.scale
    return np.clip(displayed, normalization.lower, normalization.upper)


def _normalization(kind: NormalizationKind, recipe: Recipe, statistics: Statistics) -> Normalization:
    center, scale, degenerate = _numbers(recipe, statistics)
    zero_at = None if center is None or scale is None else min(max(-center / scale, recipe.lower), recipe.upper) + 0.0
    return Normalization(
        kind=kind,
        view=statistics.view,
        center=center,
        scale=scale,
        lower=recipe.lower,
        upper=recipe.upper,
        zero_at=zero_at,
        degenerate=degenerate,
        lower_probability=recipe.lower_probability,
        upper_probability=recipe.upper_probability,
        mass=recipe.mass,
    )


def _numbers(recipe: Recipe, statistics: Statistics) -> tuple[float | None, float | None, bool]:
    """Center, scale and whether the recipe is degenerate."""
    if not statistics.finite_count:
        return None, None, True
    center, end = recipe.center(statistics), recipe.end(statistics)
    assert center is not None and end is not None, "figures of a finite map exist"
    scale = end - center
    degenerate = scale == 0 or not math.isfinite(scale)
    return center, 1.0 if degenerate else scale, degenerate
