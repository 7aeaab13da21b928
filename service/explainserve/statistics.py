"""Figures of attribution maps: what a client needs to draw or compare them, computed and never applied.

The dataclasses mirror the messages of `statistics.proto` field by field; `docs/normalization.md` gives every formula
with a worked example. Everything is float64, computed from the float32 tensor exactly as it is sent.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

QUANTILE_PROBABILITIES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.25, 0.5, 0.62, 0.75, 0.95, 0.98, 0.99, 0.995, 0.999)
ABS_QUANTILE_PROBABILITIES = (0.5, 0.62, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
ABS_MASS_LEVELS = (0.95, 0.98, 0.99)


class View(enum.Enum):
    """A reduction of a map that a client is likely to draw; values are the wire's."""

    ELEMENTS = 1
    CHANNEL_SUM = 2
    CHANNEL_ABS_SUM = 3
    CHANNEL_MAX_ABS = 4


@dataclass(frozen=True)
class Quantile:
    """A quantile by linear interpolation; `probability` in [0, 1]."""

    probability: float
    value: float


@dataclass(frozen=True)
class AbsMassThreshold:
    """The first of the ascending |v| whose cumulative sum reaches `mass`, in [0, 1], times the total."""

    mass: float
    value: float


@dataclass(frozen=True)
class Statistics:
    """Figures of one view: `element_count` counts all elements, everything else the finite ones.

    Figures that do not exist (no finite element) are None, or empty.
    """

    view: View
    element_count: int
    finite_count: int
    nan_count: int
    infinite_count: int
    positive_count: int
    negative_count: int
    zero_count: int
    min: float | None = None
    max: float | None = None
    abs_max: float | None = None
    sum: float | None = None
    positive_sum: float | None = None
    negative_sum: float | None = None
    mean: float | None = None
    std: float | None = None
    l1_norm: float | None = None
    l2_norm: float | None = None
    quantiles: tuple[Quantile, ...] = ()
    abs_quantiles: tuple[Quantile, ...] = ()
    abs_mass_thresholds: tuple[AbsMassThreshold, ...] = ()

    def quantile(self, probability: float) -> float:
        """Quantile of v at one of QUANTILE_PROBABILITIES; KeyError elsewhere, or where nothing is finite."""
        return {quantile.probability: quantile.value for quantile in self.quantiles}[probability]

    def abs_quantile(self, probability: float) -> float:
        """Quantile of |v| at one of ABS_QUANTILE_PROBABILITIES; KeyError elsewhere, or where nothing is finite."""
        return {quantile.probability: quantile.value for quantile in self.abs_quantiles}[probability]

    def abs_mass_threshold(self, mass: float) -> float:
        """Threshold of |v| at one of ABS_MASS_LEVELS; KeyError elsewhere, or where nothing is finite."""
        return {threshold.mass: threshold.value for threshold in self.abs_mass_thresholds}[mass]


@dataclass(frozen=True)
class Range:
    """Joint range of several maps; None where no element of any is finite."""

    min: float | None
    max: float | None
    abs_max: float | None


def reduce_to_view(tensor: NDArray[np.float32], view: View, channel_axis: int | None) -> NDArray[np.float64]:
    """The values of a view, shaped like `tensor` (ELEMENTS) or like `tensor` without its channel axis.

    A pixel with a non-finite channel is non-finite. Channels are added in their order. ValueError for a channel view of
    a tensor without a channel axis.
    """
    if view is View.ELEMENTS:
        return tensor.astype(np.float64)
    if channel_axis is None:
        raise ValueError(f"view {view.name} needs a channel axis; the tensor of shape {tensor.shape} has none")
    # Channels first: reducing a short last axis is ten times slower.
    channels = np.moveaxis(tensor, channel_axis, 0).astype(np.float64, order="C")
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, as it should be
        return _reduce_channels(channels, view)


def _reduce_channels(channels: NDArray[np.float64], view: View) -> NDArray[np.float64]:
    """Overwrites `channels`."""
    if view is not View.CHANNEL_SUM:
        np.abs(channels, out=channels)
    return np.asarray(channels.max(axis=0) if view is View.CHANNEL_MAX_ABS else channels.sum(axis=0))


def statistics(values: NDArray[np.float64], view: View) -> Statistics:
    """Figures of the values of a view, of any shape, as `reduce_to_view` gives them."""
    values = values.ravel()
    is_finite = np.isfinite(values)
    finite = values if is_finite.all() else values[is_finite]
    nan_count = int(np.count_nonzero(np.isnan(values)))
    positive_count = int(np.count_nonzero(finite > 0))
    negative_count = int(np.count_nonzero(finite < 0))
    counts = Statistics(
        view=view,
        element_count=values.size,
        finite_count=finite.size,
        nan_count=nan_count,
        infinite_count=values.size - finite.size - nan_count,
        positive_count=positive_count,
        negative_count=negative_count,
        zero_count=finite.size - positive_count - negative_count,
    )
    return _with_figures(counts, finite) if finite.size else counts


def pooled_statistics(values: Sequence[NDArray[np.float64]], view: View) -> Statistics:
    """Joint figures of several maps: those of all their values together. ValueError without a map."""
    if not values:
        raise ValueError("pooled statistics need at least one map, got none")
    return statistics(np.concatenate([map_values.ravel() for map_values in values]), view)


def joint_range(maps: Sequence[Statistics]) -> Range:
    """Range of several maps of one view, from their own figures; maps without a finite element do not count."""
    return Range(
        min=min((figures.min for figures in maps if figures.min is not None), default=None),
        max=max((figures.max for figures in maps if figures.max is not None), default=None),
        abs_max=max((figures.abs_max for figures in maps if figures.abs_max is not None), default=None),
    )


def relative_convergence_delta(convergence_delta: float | None, output_change: float | None) -> float | None:
    """|delta| / |F(x) - F(x')|, the share of the change of the score that the map misses; None where undefined."""
    return _magnitude_ratio(convergence_delta, output_change)


def delta_over_abs_sum(convergence_delta: float | None, abs_sum: float) -> float | None:
    """|delta| / sum|a|, with the sum over all inputs; None where undefined."""
    return _magnitude_ratio(convergence_delta, abs_sum)


def _magnitude_ratio(numerator: float | None, denominator: float | None) -> float | None:
    if numerator is None or denominator is None or denominator == 0 or not math.isfinite(denominator):
        return None
    ratio = abs(numerator) / abs(denominator)
    return ratio if math.isfinite(ratio) else None


def _with_figures(counts: Statistics, finite: NDArray[np.float64]) -> Statistics:
    ascending, magnitudes = _sorted(finite)
    total = float(finite.sum())
    positive_sum = float(ascending[finite.size - counts.positive_count :].sum(dtype=np.float64))
    negative_sum = float(ascending[: counts.negative_count].sum(dtype=np.float64))
    return replace(
        counts,
        min=float(ascending[0]),
        max=float(ascending[-1]),
        abs_max=float(magnitudes[-1]),
        sum=total,
        positive_sum=positive_sum,
        negative_sum=negative_sum,
        mean=total / finite.size,
        std=float(finite.std()),
        l1_norm=positive_sum - negative_sum,
        l2_norm=float(np.linalg.norm(finite)),
        quantiles=_quantiles(ascending, QUANTILE_PROBABILITIES),
        abs_quantiles=_quantiles(magnitudes, ABS_QUANTILE_PROBABILITIES),
        abs_mass_thresholds=_abs_mass_thresholds(magnitudes, ABS_MASS_LEVELS),
    )


def _sorted(finite: NDArray[np.float64]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """v ascending and |v| ascending; values that are exact in float32 are sorted there, in about half the time.

    In place where it can be: fresh memory for a map costs about as much as sorting it.
    """
    with np.errstate(over="ignore"):
        single = finite.astype(np.float32)
    ascending: NDArray[np.floating] = single if np.array_equal(single, finite) else finite.copy()
    ascending.sort()
    magnitudes = np.abs(ascending)
    if ascending[0] < 0:
        magnitudes.sort()  # with SIMD: faster than a stable sort, which would only merge the two runs that are there
    return ascending, magnitudes


def _quantiles(ascending: NDArray[np.floating], probabilities: Sequence[float]) -> tuple[Quantile, ...]:
    """Hyndman and Fan's definition 7, to the bit what `numpy.quantile(..., method="linear")` gives, from one sort."""
    positions = (ascending.size - 1) * np.asarray(probabilities)
    below = np.floor(positions).astype(np.intp)
    weight = positions - below
    low, high = ascending[[below, np.minimum(below + 1, ascending.size - 1)]].astype(np.float64)
    step = high - low
    # Like numpy, from the nearer neighbour: exact at both ends and never out of order.
    values = np.where(weight < 0.5, low + step * weight, high - step * (1 - weight))
    return tuple(map(Quantile, probabilities, values.tolist()))


def _abs_mass_thresholds(magnitudes: NDArray[np.floating], levels: Sequence[float]) -> tuple[AbsMassThreshold, ...]:
    mass = magnitudes.astype(np.float64)
    np.cumsum(mass, out=mass)
    first = np.searchsorted(mass, np.asarray(levels) * mass[-1], side="left")
    return tuple(map(AbsMassThreshold, levels, magnitudes[first].tolist()))
