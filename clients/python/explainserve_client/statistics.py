"""Figures of maps, and recipes that a client may apply to raw tensors; `docs/normalization.md` has the formulas."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explainserve.v1 import statistics_pb2
from explainserve_client.errors import MissingEntryError, RequestValueError
from explainserve_client.names import short_name
from explainserve_client.table import Table
from explainserve_client.tensors import Array

Values = NDArray[np.float64]
_SCALARS = [field for field in statistics_pb2.Statistics.DESCRIPTOR.fields if field.message_type is None]
_FIGURES = tuple(field.name for field in _SCALARS if field.has_presence)
_COUNTS = tuple(field.name for field in _SCALARS if not field.has_presence and field.name != "view")
_RECIPE_NUMBERS = ("center", "scale", "zero_at", "lower_probability", "upper_probability", "mass")
VIEWS = tuple(short_name(statistics_pb2.View, number) for number in statistics_pb2.View.values() if number)


def reduce_to_view(tensor: Array, view: str, channel_axis: int | None) -> Values:
    """A raw tensor of one instance as a view, in float64.

    ELEMENTS = v; CHANNEL_SUM, CHANNEL_ABS_SUM and CHANNEL_MAX_ABS drop the channel axis by sum of v, sum of |v| and
    largest |v|.

    Raises:
        RequestValueError: no such view, or one over channels where there is no channel axis.
    """
    values = np.asarray(tensor, np.float64)
    if view == "ELEMENTS":
        return values
    if view not in VIEWS:
        raise RequestValueError(f"no view {view!r}; there are {', '.join(VIEWS)}")
    if channel_axis is None:
        raise RequestValueError(f"view {view} needs a channel axis, which this input does not have")
    with np.errstate(invalid="ignore"):  # an infinity of each sign makes the pixel NaN, as it should
        if view == "CHANNEL_SUM":
            return np.asarray(values.sum(axis=channel_axis))
        magnitudes = np.abs(values)
        return np.asarray(
            magnitudes.sum(axis=channel_axis) if view == "CHANNEL_ABS_SUM" else magnitudes.max(axis=channel_axis)
        )


@dataclass(frozen=True, slots=True)
class Statistics:
    """Figures of one view, in float64 from the float32 tensor as sent.

    `element_count` counts all elements, everything else the finite ones. A figure that does not exist (no finite
    element) is None. `std` is the population's. Quantiles are linear, as (probability, value) in ascending order;
    thresholds as (mass, value).
    """

    view: str
    element_count: int
    finite_count: int
    nan_count: int
    infinite_count: int
    positive_count: int
    negative_count: int
    zero_count: int
    min: float | None
    max: float | None
    abs_max: float | None
    sum: float | None
    positive_sum: float | None
    negative_sum: float | None
    mean: float | None
    std: float | None
    l1_norm: float | None
    l2_norm: float | None
    quantiles: tuple[tuple[float, float], ...]
    abs_quantiles: tuple[tuple[float, float], ...]
    abs_mass_thresholds: tuple[tuple[float, float], ...]

    def quantile(self, probability: float) -> float:
        """Quantile of v; MissingEntryError (a KeyError) lists the probabilities that there are."""
        return _figure(self.quantiles, probability, "quantile")

    def abs_quantile(self, probability: float) -> float:
        """Quantile of |v|; MissingEntryError lists the probabilities that there are."""
        return _figure(self.abs_quantiles, probability, "abs_quantile")

    def abs_mass_threshold(self, mass: float) -> float:
        """The first of the ascending |v| whose cumulative sum reaches `mass` times the total."""
        return _figure(self.abs_mass_thresholds, mass, "abs_mass_threshold")

    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {_short(getattr(self, name))}" for name in ("min", "max", "sum", "std"))
        lost = self.element_count - self.finite_count
        not_finite = f", {lost} not finite" if lost else ""
        return f"<Statistics {self.view} of {self.element_count} elements{not_finite}: {figures}>"

    @classmethod
    def from_proto(cls, message: statistics_pb2.Statistics) -> Statistics:
        """Reads the message."""
        return cls(
            view=short_name(statistics_pb2.View, message.view),
            **{name: getattr(message, name) for name in _COUNTS},
            **_figures_or_none(message, _FIGURES),
            quantiles=tuple((line.probability, line.value) for line in message.quantiles),
            abs_quantiles=tuple((line.probability, line.value) for line in message.abs_quantiles),
            abs_mass_thresholds=tuple((line.mass, line.value) for line in message.abs_mass_thresholds),
        )


@dataclass(frozen=True, slots=True)
class Normalization:
    """A recipe with its numbers: display = clip((value - center) / scale, lower, upper). The server never applied it.

    Attributes:
        kind: such as "MIN_MAX"; "STATED" where the scale was stated by hand.
        view: what the tensor is reduced to first.
        center, scale: None where the figure does not exist.
        lower, upper: ends of the display.
        zero_at: displayed value of a zero attribution, so at an end where zero is off the scale.
        degenerate: whether the scale is 0 or not finite; then `scale` is 1.
        lower_probability, upper_probability, mass: parameters of the recipe, where it has them.
        channel_axis, rank: channel axis and number of axes of the tensors it applies to, None where not known.
    """

    kind: str
    view: str
    center: float | None
    scale: float | None
    lower: float
    upper: float
    zero_at: float | None
    degenerate: bool = False
    lower_probability: float | None = None
    upper_probability: float | None = None
    mass: float | None = None
    channel_axis: int | None = None
    rank: int | None = None

    @property
    def symmetric(self) -> bool:
        """Whether zero is displayed in the middle, so that a diverging color scale is honest."""
        return self.center == 0 and self.lower == -self.upper and self.lower < 0

    @property
    def zero_on_scale(self) -> bool:
        """Whether zero is displayed without being clipped to an end."""
        if self.center is None or self.scale is None:
            return False
        return self.center + self.lower * self.scale <= 0 <= self.center + self.upper * self.scale

    def reduce(self, tensor: Array) -> Values:
        """A raw tensor of one instance as this recipe's view, float64.

        Raises:
            RequestValueError: a tensor of another rank.
        """
        if self.rank is not None and np.ndim(tensor) != self.rank:
            raise RequestValueError(
                f"{self.kind} of {self.view} applies to a raw tensor with {self.rank} axes, not {np.ndim(tensor)}"
            )
        return reduce_to_view(tensor, self.view, self.channel_axis)

    def display(self, values: Values) -> Values:
        """Values of the view as they are displayed; NaN stays NaN.

        Raises:
            RequestValueError: the recipe has no numbers, because no element was finite.
        """
        if self.center is None or self.scale is None:
            raise RequestValueError(f"{self.kind} of {self.view} has no numbers: no element was finite")
        with np.errstate(over="ignore"):  # beyond the float range is beyond the ends as well
            return np.clip((values - self.center) / self.scale, self.lower, self.upper)

    def apply(self, tensor: Array) -> Values:
        """Reduces a raw tensor to the view, then displays it."""
        return self.display(self.reduce(tensor))

    def __repr__(self) -> str:
        state = " degenerate" if self.degenerate else ""
        formula = f"clip((v - {_short(self.center)}) / {_short(self.scale)}, {self.lower:g}, {self.upper:g})"
        return f"<Normalization {self.kind} of {self.view}{state}: {formula}, zero at {_short(self.zero_at)}>"

    @classmethod
    def from_proto(
        cls, message: statistics_pb2.Normalization, channel_axis: int | None, rank: int | None
    ) -> Normalization:
        """Reads the message; axes come from the map or the signature."""
        return cls(
            kind=short_name(statistics_pb2.NormalizationKind, message.kind),
            view=short_name(statistics_pb2.View, message.view),
            lower=message.lower,
            upper=message.upper,
            degenerate=message.degenerate,
            channel_axis=channel_axis,
            rank=rank,
            **_figures_or_none(message, _RECIPE_NUMBERS),
        )

    @classmethod
    def stated(
        cls, low: float, high: float, view: str, channel_axis: int | None = None, rank: int | None = None
    ) -> Normalization:
        """A scale stated by hand, the same for every map drawn with it; symmetric where low = -high.

        Raises:
            RequestValueError: low is not below high, or one is not finite.
        """
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise RequestValueError(f"a scale goes from a low to a higher finite value, not from {low} to {high}")
        symmetric = low == -high
        center, scale = (0.0, high) if symmetric else (low, high - low)
        return cls(
            kind="STATED",
            view=view,
            center=center,
            scale=scale,
            lower=-1.0 if symmetric else 0.0,
            upper=1.0,
            zero_at=0.0 if symmetric else min(max(-center / scale, 0.0), 1.0) + 0.0,  # 0 and not -0
            channel_axis=channel_axis,
            rank=rank,
        )


@dataclass(frozen=True, slots=True)
class RegionSum:
    """Sums of attributions in a region; non-finite elements are left out and counted.

    Attributes:
        view: "ELEMENTS" (all channels) or "CHANNEL_SUM".
        share: `sum` divided by the sum over the whole map; None where that is zero.
    """

    name: str
    view: str
    element_count: int
    finite_count: int
    sum: float
    positive_sum: float
    negative_sum: float
    share: float | None

    @classmethod
    def from_proto(cls, message: statistics_pb2.RegionSum) -> RegionSum:
        """Reads the message."""
        return cls(
            name=message.name,
            view=short_name(statistics_pb2.View, message.view),
            element_count=message.element_count,
            finite_count=message.finite_count,
            sum=message.sum,
            positive_sum=message.positive_sum,
            negative_sum=message.negative_sum,
            share=message.share if message.HasField("share") else None,
        )


@dataclass(frozen=True, slots=True)
class PairRange:
    """Joint range of the attributions at positions `first` and `second` of the result."""

    first: int
    second: int
    input: str
    view: str
    min: float | None
    max: float | None
    abs_max: float | None

    @classmethod
    def from_proto(cls, message: statistics_pb2.PairRange) -> PairRange:
        """Reads the message."""
        return cls(
            first=message.first,
            second=message.second,
            input=message.input,
            view=short_name(statistics_pb2.View, message.view),
            min=message.min if message.HasField("min") else None,
            max=message.max if message.HasField("max") else None,
            abs_max=message.abs_max if message.HasField("abs_max") else None,
        )


@dataclass(frozen=True, slots=True)
class JointInput:
    """Figures of one input pooled over a group, by view, and recipes from them."""

    input: str
    statistics: Table[Statistics]
    normalizations: tuple[Normalization, ...] = field(repr=False)

    def normalization(self, kind: str, view: str) -> Normalization:
        """A recipe from the pooled figures, such as ("MIN_MAX", "CHANNEL_SUM").

        Raises:
            MissingEntryError: there is none; the message lists those that there are.
        """
        return find_normalization(self.normalizations, kind, view)


@dataclass(frozen=True, slots=True)
class JointStatistics:
    """Figures of a group of maps, from the pooled values of its members.

    Attributes:
        group: its name; "all" is the default group, "all/<output>/<score>" where maps have several units.
        members: positions in the result's attributions.
        inputs: by input name.
        pairs: pairwise ranges, where asked for.
    """

    group: str
    members: tuple[int, ...]
    inputs: Table[JointInput]
    pairs: tuple[PairRange, ...]

    @property
    def statistics(self) -> Table[Statistics]:
        """Pooled figures by view, where one input is explained."""
        return self.inputs.only().statistics

    def normalization(self, kind: str, view: str) -> Normalization:
        """A recipe from the pooled figures, where one input is explained."""
        return self.inputs.only().normalization(kind, view)

    def pair(self, first: int, second: int, view: str, input: str | None = None) -> PairRange:
        """The joint range of two members.

        Raises:
            MissingEntryError: there is none for them.
        """
        for found in self.pairs:
            if {found.first, found.second} == {first, second} and found.view == view and input in (None, found.input):
                return found
        raise MissingEntryError(
            f"no range of attributions {first} and {second} of {view}; Group(..., pairwise=True) asks for it"
        )


def statistics_table(messages: Iterable[statistics_pb2.Statistics]) -> Table[Statistics]:
    """Figures by view."""
    return Table("view", ((line.view, line) for line in map(Statistics.from_proto, messages)))


def find_normalization(normalizations: Iterable[Normalization], kind: str, view: str) -> Normalization:
    """The recipe of a kind and view; MissingEntryError lists those that there are."""
    there = tuple(normalizations)
    for found in there:
        if (found.kind, found.view) == (kind, view):
            return found
    names = ", ".join(f"{found.kind} of {found.view}" for found in there) or "none"
    raise MissingEntryError(f"no normalization {kind!r} of view {view!r}; there are {names}")


def _figure(figures: tuple[tuple[float, float], ...], level: float, noun: str) -> float:
    for stated, value in figures:
        if math.isclose(stated, level, rel_tol=1e-9, abs_tol=1e-12):
            return value
    levels = ", ".join(str(stated) for stated, _ in figures)
    raise MissingEntryError(f"no {noun} at {level}; there are {levels or 'none'}")


def _figures_or_none(message: Any, names: Iterable[str]) -> dict[str, Any]:
    """Optional numbers by name, None where absent."""
    return {name: getattr(message, name) if message.HasField(name) else None for name in names}


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
