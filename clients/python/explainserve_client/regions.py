"""Parts of an input whose attributions are summed, and groups of maps whose figures are wanted together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from explainserve.v1 import statistics_pb2
from explainserve_client.errors import RequestTypeError, RequestValueError
from explainserve_client.tensors import Array, to_tensor


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle, half-open: columns [x, x + width) by rows [y, y + height) of the input's H and W axes."""

    x: int
    y: int
    width: int
    height: int

    def __post_init__(self) -> None:
        if self.x < 0 or self.y < 0 or self.width < 1 or self.height < 1:
            raise RequestValueError(f"a box starts at 0 or later and is at least 1 wide and high: {self}")


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """An area with options of its own.

    Attributes:
        area: a Box, or a boolean array of the instance's shape, or of its shape without the channel axis.
        input: name of the input; "" is the only one that fits.
        instance_index: the instance it belongs to; None is every one.
    """

    area: Box | Array
    input: str = ""
    instance_index: int | None = None


@dataclass(frozen=True, slots=True)
class AttributionSelector:
    """Selects attributions by position; None means all."""

    method_index: int | None = None
    instance_index: int | None = None
    target_index: int | None = None
    baseline_index: int | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Attributions whose figures are pooled: the union of the selectors.

    Attributes:
        pairwise: whether min, max and |v| max of each pair of members are wanted too.
    """

    selectors: Sequence[AttributionSelector]
    pairwise: bool = False


RegionLike = Box | Region | Array
GroupLike = Group | Sequence[AttributionSelector]


def region_messages(regions: Mapping[str, RegionLike | Sequence[Region]] | None) -> list[statistics_pb2.Region]:
    """The messages of a request; a name may stand for one Region per input or instance."""
    return [
        _region_message(name, area) for name, areas in _items("regions", regions) for area in _several_regions(areas)
    ]


def group_messages(groups: Mapping[str, GroupLike] | None) -> list[statistics_pb2.Group]:
    """The messages of a request."""
    return [_group_message(name, group) for name, group in _items("groups", groups)]


def _items(what: str, named: Mapping[str, Any] | None) -> Iterable[tuple[str, Any]]:
    if named is not None and not isinstance(named, Mapping):
        raise RequestTypeError(f"{what} is a dict by name, not {named!r}")
    return (named or {}).items()


def _several_regions(areas: Any) -> Sequence[Any]:
    return areas if isinstance(areas, (list, tuple)) else [areas]


def _region_message(name: str, area: Any) -> statistics_pb2.Region:
    region = area if isinstance(area, Region) else Region(area)
    message = statistics_pb2.Region(name=name, input=region.input, instance_index=region.instance_index)
    if isinstance(region.area, Box):
        box = region.area
        message.box.CopyFrom(statistics_pb2.Box(x=box.x, y=box.y, width=box.width, height=box.height))
    elif isinstance(region.area, np.ndarray) and region.area.dtype == np.bool_:
        message.mask.CopyFrom(to_tensor(region.area))
    else:
        raise RequestTypeError(f"region {name!r} is a Box or a boolean array, not {region.area!r}")
    return message


def _group_message(name: str, group: GroupLike) -> statistics_pb2.Group:
    stated = group if isinstance(group, Group) else Group(group)
    if name == "all":
        raise RequestValueError("the group 'all' is always there; give this one another name")
    if not stated.selectors:
        raise RequestValueError(f"group {name!r} selects nothing; AttributionSelector() selects every attribution")
    return statistics_pb2.Group(
        name=name, selectors=[_selector_message(selector) for selector in stated.selectors], pairwise=stated.pairwise
    )


def _selector_message(selector: AttributionSelector) -> statistics_pb2.AttributionSelector:
    return statistics_pb2.AttributionSelector(
        method_index=selector.method_index,
        instance_index=selector.instance_index,
        target_index=selector.target_index,
        baseline_index=selector.baseline_index,
    )
