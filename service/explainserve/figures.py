"""The figures that go with the maps of an answer: statistics per view, recipes, regions, and joint figures of
groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import InvalidRequest
from explainserve.explainer import Answer, Explanation
from explainserve.explanation import Attribution, Fit, StopReason, Subject, Target
from explainserve.methods import Method, name_of
from explainserve.normalization import Normalization, normalizations
from explainserve.query import Query
from explainserve.regions import Box, RegionSum, check_box, check_mask, region_sums
from explainserve.signature import InputSpec, MapSpec
from explainserve.statistics import Range, Statistics, View, joint_range, pooled_statistics, reduce_to_view, statistics

Map = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Region:
    """A part of one input; `input` is "" for the only one that fits."""

    name: str
    area: Box | NDArray[np.bool_]
    input: str = ""
    instance_index: int | None = None


@dataclass(frozen=True)
class Selector:
    """Selects maps by position; None means all."""

    method_index: int | None = None
    instance_index: int | None = None
    target_index: int | None = None
    baseline_index: int | None = None

    def matches(self, places: Places) -> NDArray[np.bool_]:
        """Which maps are selected, shape (maps,)."""
        selected = np.full(len(places.positions), True)
        wanted = (self.method_index, self.instance_index, self.target_index, self.baseline_index)
        for position, own in zip(wanted, places.positions.T, strict=True):
            if position is not None:
                selected &= own == position
        return selected


@dataclass(frozen=True)
class Group:
    """A named group of maps."""

    name: str
    selectors: tuple[Selector, ...]
    pairwise: bool = False


FOLDED = np.iinfo(np.int64).min
"""Baseline position of a map without a baseline, or of a mean over them: no selector names it."""

Unit = tuple[str, str, str]
"""Output and score of a map, and the unit of its values as its method states it."""

Position = tuple[int, int, int, int | None]
"""Method, instance, target and baseline of a map; None for one without a baseline, or a mean over them."""


@dataclass(frozen=True, eq=False)
class Places:
    """Where the maps of a response stand, in its order, and in which units; known before they are computed.

    Attributes:
        positions: method, instance, target and baseline (FOLDED where there is none), int64, shape (maps, 4).
        units: position in `names`, int64, shape (maps,).
        names: the distinct units, ordered.
    """

    positions: NDArray[np.int64]
    units: NDArray[np.int64]
    names: tuple[Unit, ...]

    @classmethod
    def of(cls, places: Sequence[tuple[Position, Unit]]) -> Places:
        """From position and unit of each map."""
        names = tuple(sorted({unit for _, unit in places}))
        code = {unit: position for position, unit in enumerate(names)}
        positions = [(*whose, FOLDED if baseline is None else baseline) for (*whose, baseline), _ in places]
        return cls(
            np.array(positions, np.int64).reshape(-1, 4), np.array([code[unit] for _, unit in places], np.int64), names
        )

    def members(self, group: Group) -> list[int]:
        """Positions of a group's maps.

        Raises:
            InvalidRequest: it selects nothing (EMPTY_GROUP), or maps of different units (INCOMMENSURABLE_GROUP).
        """
        selected = np.zeros(len(self.positions), np.bool_)
        for selector in group.selectors:
            selected |= selector.matches(self)
        if not selected.any():
            raise InvalidRequest("EMPTY_GROUP", f"group {group.name!r} selects no attribution", group=group.name)
        units = ["/".join(self.names[k]) for k in np.unique(self.units[selected])]
        if len(units) > 1:
            raise InvalidRequest(
                "INCOMMENSURABLE_GROUP",
                f"group {group.name!r} mixes maps of different units: {', '.join(units)}",
                group=group.name,
                units=", ".join(units),
            )
        return np.flatnonzero(selected).tolist()


@dataclass(frozen=True)
class FigureOptions:
    """What is computed beside the maps.

    Attributes:
        views: wanted views; () means ELEMENTS, and CHANNEL_SUM where the input has a channel axis.
    """

    statistics: bool = True
    joint: bool = True
    regions: bool = True
    views: tuple[View, ...] = ()

    def views_of(self, spec: MapSpec | InputSpec) -> tuple[View, ...]:
        """The views of one input: without a channel axis ELEMENTS only."""
        if spec.channel_axis is None:
            return (View.ELEMENTS,)
        return self.views or (View.ELEMENTS, View.CHANNEL_SUM)


@dataclass(frozen=True, eq=False)
class Entry:
    """One map of the response: an explanation, or the mean of several over their baselines.

    Attributes:
        method: that made it.
        baseline_index: None for one without a baseline, and for a mean over baselines.
        maps: how each tensor is laid out.
        baseline_output_value: None without a baseline.
        attribution: of the method; a mean has no score path.
        tensors, step_count, stop_reason, map_error: of the map.
        spread: population standard deviation over baselines, by input.
        folded: whether it is a mean over baselines.
    """

    method: Method
    method_index: int
    instance_index: int
    target_index: int
    baseline_index: int | None
    target: Target
    maps: Mapping[str, MapSpec]
    attribution: Attribution
    tensors: dict[str, Map]
    spread: dict[str, Map]
    instance_output_value: float
    baseline_output_value: float | None
    step_count: int
    stop_reason: StopReason
    map_error: float | None
    folded: bool = False
    _figures: dict[tuple[str, View], ViewFigures] = field(default_factory=dict, init=False)

    @property
    def position(self) -> Position:
        """Its place in the answer."""
        return self.method_index, self.instance_index, self.target_index, self.baseline_index

    @property
    def output_change(self) -> float | None:
        """F(x) - F(x'); None without a baseline."""
        return None if self.baseline_output_value is None else self.instance_output_value - self.baseline_output_value

    @property
    def unit(self) -> Unit:
        """Maps of one unit may be compared."""
        return self.target.output, self.target.score.name, self.method.reading_guide.units

    def values(self, name: str, view: View) -> NDArray[np.float64]:
        """One view of the map of one input or layer."""
        return reduce_to_view(self.tensors[name], view, self.maps[name].channel_axis)

    def figures(self, name: str, view: View) -> ViewFigures:
        """Figures of one view, computed once: groups of one map ask again."""
        if (name, view) not in self._figures:
            self._figures[name, view] = ViewFigures.of(statistics(self.values(name, view), view))
        return self._figures[name, view]


@dataclass(frozen=True, eq=False)
class ViewFigures:
    """Figures of one view of one map, or of several together."""

    statistics: Statistics
    normalizations: tuple[Normalization, ...]

    @classmethod
    def of(cls, own: Statistics) -> ViewFigures:
        """With all recipes."""
        return cls(own, tuple(normalizations(own)))


@dataclass(frozen=True, eq=False)
class InputFigures:
    """Figures of one input of one map."""

    views: tuple[ViewFigures, ...] = ()
    regions: tuple[RegionSum, ...] = ()


@dataclass(frozen=True)
class PairRange:
    """Joint range of two maps, by position in the answer."""

    first: int
    second: int
    input: str
    view: View
    range: Range


@dataclass(frozen=True, eq=False)
class JointFigures:
    """Figures of a group from the pooled values of its members, by position in the answer."""

    group: str
    members: tuple[int, ...]
    inputs: dict[str, tuple[ViewFigures, ...]]
    pairs: tuple[PairRange, ...] = ()


def entries(answer: Answer, fold_baselines: bool) -> list[Entry]:
    """The maps of the response, ordered by method, instance, target, baseline."""
    maps = [_entry(explanation) for explanation in answer.explanations]
    if not fold_baselines:
        return maps
    groups: dict[tuple[int, int, int], list[Entry]] = {}
    for entry in maps:
        groups.setdefault((entry.method_index, entry.instance_index, entry.target_index), []).append(entry)
    return [own[0] if own[0].baseline_index is None else _mean(own) for own in groups.values()]


def check_regions(regions: Sequence[Region], subject: Subject, methods: Sequence[Method] = ()) -> list[Region]:
    """Names the input of every region, and checks that it lies inside, and within the maps of all methods.

    Raises:
        InvalidRequest: REGION_OUT_OF_BOUNDS, REGION_INPUT_REQUIRED, REGION_NAME_REPEATED, REGION_NOT_IN_MAP.
    """
    named = [_named(region, subject) for region in regions]
    keys = Counter((region.name, region.input, region.instance_index) for region in named)
    for (name, *_), count in keys.items():
        if count > 1:
            raise InvalidRequest("REGION_NAME_REPEATED", f"two regions are named {name!r}", region=name)
    for region in named:
        _check_area(region, subject.maps[region.input], subject.shapes[region.input])
        for method in methods:
            _check_in_map(region, method, subject)
    return named


def group_sizes(query: Query, fold_baselines: bool, groups: Sequence[Group]) -> list[int]:
    """Numbers of maps in each group, before anything is computed.

    Raises:
        InvalidRequest: as `Places.members`.
    """
    places = Places.of(list(_planned(query, fold_baselines)) if groups else [])
    return [len(places.members(group)) for group in groups]


def input_figures(entry: Entry, spec: MapSpec, options: FigureOptions, regions: Sequence[Region]) -> InputFigures:
    """Figures of one input of one map."""
    tensor = entry.tensors[spec.name]
    views = [entry.figures(spec.name, view) for view in (options.views_of(spec) if options.statistics else ())]
    sums = [
        found
        for region in regions
        if options.regions and region.input == spec.name and region.instance_index in (None, entry.instance_index)
        for found in region_sums(tensor, spec.channel_axis, spec.spatial_axes, region.area, region.name)
    ]
    return InputFigures(tuple(views), tuple(sums))


def joint_figures(maps: Sequence[Entry], options: FigureOptions, groups: Sequence[Group]) -> list[JointFigures]:
    """Figures of the default group, split by unit, and of the named groups.

    Raises:
        InvalidRequest: as `Places.members`.
    """
    everything = _by_unit(maps) if options.joint else {}
    places = Places.of([(entry.position, entry.unit) for entry in maps])
    joint = [_joint(name, members, maps, options, pairwise=False) for name, members in everything.items()]
    for group in groups:
        joint.append(_joint(group.name, places.members(group), maps, options, pairwise=group.pairwise))
    return joint


def _entry(explanation: Explanation) -> Entry:
    place, question, attribution = explanation.place, explanation.question, explanation.attribution
    return Entry(
        method=explanation.method,
        method_index=place.method,
        instance_index=place.instance,
        target_index=place.target,
        baseline_index=place.baseline,
        target=question.target,
        maps={**question.subject.maps, **attribution.maps},
        attribution=attribution,
        tensors=dict(attribution.tensors),
        spread={},
        instance_output_value=question.instance_output_value,
        baseline_output_value=_start_output_value(explanation),
        step_count=attribution.step_count,
        stop_reason=attribution.stop_reason,
        map_error=attribution.map_error,
    )


def _start_output_value(explanation: Explanation) -> float | None:
    """F where the path starts: at a baseline, or where the method itself puts it."""
    if explanation.method.reading_guide.needs_baseline:
        return explanation.question.baseline_output_value
    return explanation.attribution.baseline_output_value


_WORST_FIRST = (
    StopReason.NON_FINITE,
    StopReason.UNFINISHED,
    StopReason.NON_CONVERGENT,
    StopReason.TIME_BUDGET,
    StopReason.MAX_STEPS,
    StopReason.CONVERGED,
    StopReason.FIXED_STEPS,
)


def _mean(parts: Sequence[Entry]) -> Entry:
    """The mean over baselines with spread."""
    attributions = [part.attribution for part in parts]
    stacked = {name: np.stack([p.tensors[name].astype(np.float64) for p in parts]) for name in parts[0].tensors}
    means = {name: maps.mean(axis=0).astype(np.float32) for name, maps in stacked.items()}
    mean = Attribution(
        means,
        step_count=sum(p.step_count for p in parts),
        stop_reason=min((p.stop_reason for p in parts), key=_WORST_FIRST.index),
        map_error=_mean_error(parts, means),
        maps=attributions[0].maps,
        standard_errors=_mean_standard_errors(attributions),
        fit=_mean_fit(attributions),
        segments=attributions[0].segments,  # those of the instance, whatever the baseline
    )
    return replace(
        parts[0],
        attribution=mean,
        baseline_index=None,
        tensors=means,
        spread={name: maps.std(axis=0).astype(np.float32) for name, maps in stacked.items()},
        baseline_output_value=float(np.mean([cast(float, p.baseline_output_value) for p in parts])),
        step_count=mean.step_count,
        stop_reason=mean.stop_reason,
        map_error=mean.map_error,
        folded=True,
    )


def _mean_standard_errors(parts: Sequence[Attribution]) -> dict[str, Map]:
    """Of the mean at most, by the triangle inequality: parts draw the same samples, so their errors may add up. None
    where a part has none."""
    stacked = {
        name: np.stack([part.standard_errors[name].astype(np.float64) for part in parts])
        for name in parts[0].standard_errors
        if all(name in part.standard_errors for part in parts)
    }
    return {name: errors.mean(axis=0).astype(np.float32) for name, errors in stacked.items()}


def _mean_fit(parts: Sequence[Attribution]) -> Fit | None:
    """The mean of linear models has the mean intercept; no scores tell how much of them it explains."""
    intercepts = [part.fit.intercept for part in parts if part.fit is not None]
    return Fit(None, float(np.mean(intercepts))) if len(intercepts) == len(parts) else None


def _mean_error(parts: Sequence[Entry], means: dict[str, Map]) -> float | None:
    """Relative error of the mean by the triangle inequality; None where a part has none or the mean is zero."""
    norm = _norm(means)
    if norm == 0 or any(part.map_error is None for part in parts):
        return None
    errors = [cast(float, part.map_error) * _norm(part.tensors) for part in parts]
    return float(np.mean(errors)) / norm


def _norm(tensors: dict[str, Map]) -> float:
    return float(np.sqrt(sum(np.square(tensor.astype(np.float64)).sum() for tensor in tensors.values())))


def _named(region: Region, subject: Subject) -> Region:
    shapes = subject.shapes
    if region.input:
        if region.input not in shapes:
            raise InvalidRequest(
                "REGION_INPUT_REQUIRED",
                f"region {region.name!r}: {region.input!r} is no explained input; those are {', '.join(shapes)}",
                region=region.name,
                input=region.input,
            )
        return region
    boxed = isinstance(region.area, Box)
    fitting = [name for name in shapes if not boxed or subject.maps[name].spatial_axes is not None]
    if len(fitting) != 1:
        raise InvalidRequest(
            "REGION_INPUT_REQUIRED",
            f"region {region.name!r} fits {len(fitting)} explained inputs"
            + (" with H and W axes" if boxed else "")
            + "; name its input",
            region=region.name,
        )
    return replace(region, input=fitting[0])


def _check_area(region: Region, spec: MapSpec, shape: tuple[int, ...]) -> None:
    try:
        if isinstance(region.area, Box):
            check_box(region.area, shape, spec.spatial_axes)
        else:
            check_mask(region.area, shape, spec.channel_axis)
    except ValueError as error:
        raise InvalidRequest(
            "REGION_OUT_OF_BOUNDS", f"region {region.name!r}: {error}", region=region.name, input=region.input
        ) from error


def _check_in_map(region: Region, method: Method, subject: Subject) -> None:
    """Raises InvalidRequest where a map is not of the region's input, or lacks the channels of its mask."""
    maps, name = method.maps(subject), name_of(method)
    spec = maps.get(region.input)
    if spec is None:
        raise InvalidRequest(
            "REGION_NOT_IN_MAP",
            f"region {region.name!r} is of input {region.input!r}, and the map of {name} of {', '.join(maps)}; leave "
            "out regions, or ask for that method apart",
            region=region.name,
            input=region.input,
            method=name,
        )
    if spec.covers and not isinstance(region.area, Box) and region.area.ndim != len(spec.layout):
        raise InvalidRequest(
            "REGION_NOT_IN_MAP",
            f"the mask of region {region.name!r} has a channel axis, and the map of {name} has none",
            region=region.name,
            input=region.input,
            method=name,
        )


def _by_unit(maps: Sequence[Entry]) -> dict[str, list[int]]:
    """Positions of the default group "all"; where units differ of "all/<output>/<score>", and where methods have
    several, of "all/<output>/<score>/<unit>"."""
    units: dict[Unit, list[int]] = {}
    for position, entry in enumerate(maps):
        units.setdefault(entry.unit, []).append(position)
    if len(units) == 1:
        return {"all": list(range(len(maps)))}
    depth = 3 if len({unit for *_, unit in units}) > 1 else 2
    return {"/".join(("all", *unit[:depth])): members for unit, members in units.items()}


def _planned(query: Query, fold_baselines: bool) -> Iterator[tuple[Position, Unit]]:
    """Positions of the maps to come, in the order of `entries`."""
    for m, method in enumerate(query.methods):
        guide = method.reading_guide
        for i in range(len(query.instances)):
            each = guide.one_map_per_baseline and not fold_baselines
            baselines: Sequence[int | None] = range(query.baseline_count(i)) if each else [None]
            units = [
                (spec.function(query.model.signature).output, spec.score.name, guide.units)
                for spec in query.scored_targets_of(method, i)
                for _ in range(spec.target_count)
            ]
            yield from (((m, i, t, b), unit) for t, unit in enumerate(units) for b in baselines)


def _joint(
    name: str,
    members: list[int],
    maps: Sequence[Entry],
    options: FigureOptions,
    *,
    pairwise: bool,
) -> JointFigures:
    """Per input or layer, and view, over the maps that have it: maps of layers do not share their tensors with others,
    and one that a method lays out without channels has no view over channels."""
    inputs: dict[str, tuple[ViewFigures, ...]] = {}
    pairs: list[PairRange] = []
    for tensor in dict.fromkeys(tensor for k in members for tensor in maps[k].tensors):
        pooled: list[ViewFigures] = []
        for view, own in _by_view(tensor, members, maps, options).items():
            pooled.append(_pooled([maps[k] for k in own], tensor, view))
            if pairwise:
                pairs += _pairs(own, [maps[k].figures(tensor, view).statistics for k in own], tensor, view)
        inputs[tensor] = tuple(pooled)
    return JointFigures(name, tuple(members), inputs, tuple(pairs))


def _by_view(
    tensor: str, members: Sequence[int], maps: Sequence[Entry], options: FigureOptions
) -> dict[View, list[int]]:
    """The members that have a tensor in each view."""
    found: dict[View, list[int]] = {}
    for k in members:
        for view in options.views_of(maps[k].maps[tensor]) if tensor in maps[k].tensors else ():
            found.setdefault(view, []).append(k)
    return found


def _pooled(members: list[Entry], name: str, view: View) -> ViewFigures:
    if len(members) == 1:
        return members[0].figures(name, view)
    return ViewFigures.of(pooled_statistics([member.values(name, view) for member in members], view))


def _pairs(members: list[int], figures: list[Statistics], name: str, view: View) -> list[PairRange]:
    return [
        PairRange(first, second, name, view, joint_range([figures[a], figures[b]]))
        for a, first in enumerate(members)
        for b, second in enumerate(members)
        if a < b
    ]


__all__ = [
    "Entry",
    "FigureOptions",
    "Group",
    "InputFigures",
    "JointFigures",
    "PairRange",
    "Places",
    "Region",
    "Selector",
    "ViewFigures",
    "check_regions",
    "entries",
    "group_sizes",
    "input_figures",
    "joint_figures",
]
