"""Regions, groups and options of the figures that a request asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import InvalidRequest
from explainserve.figures import FigureOptions, Group, Region, Selector
from explainserve.regions import Box
from explainserve.rpc.enumerations import looked_up
from explainserve.rpc.tensors import decode
from explainserve.statistics import View
from explainserve.v1 import (
    explainer_service_pb2,
    statistics_pb2,
)

VIEWS: dict[int, View] = {
    statistics_pb2.VIEW_ELEMENTS: View.ELEMENTS,
    statistics_pb2.VIEW_CHANNEL_SUM: View.CHANNEL_SUM,
    statistics_pb2.VIEW_CHANNEL_ABS_SUM: View.CHANNEL_ABS_SUM,
    statistics_pb2.VIEW_CHANNEL_MAX_ABS: View.CHANNEL_MAX_ABS,
}


def regions(messages: Sequence[statistics_pb2.Region]) -> list[Region]:
    """The named areas of a request, not yet checked against the maps."""
    return [_region(message) for message in messages]


def _region(message: statistics_pb2.Region) -> Region:
    if not message.name:
        raise InvalidRequest("REGION_REQUIRED", "a region has no name")
    return Region(
        name=message.name,
        area=_area(message),
        input=message.input,
        instance_index=message.instance_index if message.HasField("instance_index") else None,
    )


def _area(message: statistics_pb2.Region) -> Box | NDArray[np.bool_]:
    match message.WhichOneof("area"):
        case "box":
            return Box(message.box.x, message.box.y, message.box.width, message.box.height)
        case "mask":
            mask = decode(f"mask of region {message.name!r}", message.mask)
            if mask.dtype != np.bool_:
                raise InvalidRequest(
                    "DTYPE_MISMATCH",
                    f"mask of region {message.name!r} has element type {mask.dtype.name}, expected bool",
                    region=message.name,
                )
            return mask.astype(np.bool_, copy=False)
        case _:
            raise InvalidRequest("REGION_REQUIRED", f"region {message.name!r} has neither box nor mask")


def groups(messages: Sequence[statistics_pb2.Group]) -> tuple[Group, ...]:
    """Raises InvalidRequest (GROUP_NAME_INVALID, EMPTY_GROUP)."""
    names = Counter(message.name for message in messages)
    for message in messages:
        if not message.name or message.name == "all" or message.name.startswith("all/") or names[message.name] > 1:
            raise InvalidRequest(
                "GROUP_NAME_INVALID",
                f"group name {message.name!r} is empty, reserved or repeated",
                group=message.name,
            )
        if not message.selectors:
            raise InvalidRequest("EMPTY_GROUP", f"group {message.name!r} has no selector", group=message.name)
    return tuple(
        Group(message.name, tuple(_selector(selector) for selector in message.selectors), message.pairwise)
        for message in messages
    )


def _selector(message: statistics_pb2.AttributionSelector) -> Selector:
    names = ("method_index", "instance_index", "target_index", "baseline_index")
    return Selector(**{n: getattr(message, n) for n in names if message.HasField(n)})  # type: ignore[arg-type]


def figure_options(message: explainer_service_pb2.ResponseOptions) -> FigureOptions:
    """What is computed beside the maps; views that are named twice count once."""
    return FigureOptions(
        statistics=not message.omit_statistics,
        joint=not message.omit_joint_statistics,
        regions=not message.omit_regions,
        views=tuple(dict.fromkeys(looked_up(VIEWS, view, "view") for view in message.views)),
    )
