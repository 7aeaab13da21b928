"""Regions and groups, and the messages they become."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from explainserve.v1 import statistics_pb2, tensor_pb2
from explainserve_client import AttributionSelector, Box, Group, Region, RequestTypeError, RequestValueError
from explainserve_client.regions import group_messages, region_messages

BOX = statistics_pb2.Box(x=1, y=2, width=3, height=4)


def test_a_box_and_a_mask() -> None:
    mask = np.eye(3, dtype=bool)
    box, masked = region_messages({"box": Box(1, 2, 3, 4), "diagonal": mask})

    assert box == statistics_pb2.Region(name="box", box=BOX)
    assert (masked.name, list(masked.mask.shape), masked.mask.data) == ("diagonal", [3, 3], mask.tobytes())
    assert masked.mask.data_type == tensor_pb2.DATA_TYPE_BOOL


def test_one_name_may_stand_for_a_region_of_each_instance() -> None:
    regions = {"digit": [Region(Box(1, 2, 3, 4), instance_index=0), Region(Box(1, 2, 3, 4), "image", 1)]}

    assert region_messages(regions) == [
        statistics_pb2.Region(name="digit", box=BOX, instance_index=0),
        statistics_pb2.Region(name="digit", box=BOX, input="image", instance_index=1),
    ]


@pytest.mark.parametrize("area", [np.zeros((3, 3)), "left", None])
def test_what_is_no_area_is_refused(area: Any) -> None:
    with pytest.raises(RequestTypeError, match="region 'left' is a Box or a boolean array"):
        region_messages({"left": area})


@pytest.mark.parametrize("sides", [(-1, 0, 1, 1), (0, -1, 1, 1), (0, 0, 0, 1), (0, 0, 1, 0)])
def test_a_box_is_not_empty_and_not_before_the_edge(sides: tuple[int, int, int, int]) -> None:
    with pytest.raises(RequestValueError, match="a box starts at 0"):
        Box(*sides)


def test_regions_are_named() -> None:
    with pytest.raises(RequestTypeError, match="regions is a dict by name"):
        region_messages([Box(0, 0, 1, 1)])  # type: ignore[arg-type]


def test_groups() -> None:
    first, second = group_messages(
        {
            "first": [AttributionSelector(target_index=0), AttributionSelector(instance_index=1, baseline_index=2)],
            "pairs": Group([AttributionSelector(method_index=0)], pairwise=True),
        }
    )

    assert first == statistics_pb2.Group(
        name="first",
        selectors=[
            statistics_pb2.AttributionSelector(target_index=0),
            statistics_pb2.AttributionSelector(instance_index=1, baseline_index=2),
        ],
    )
    assert second.pairwise and second.selectors[0].HasField("method_index")


@pytest.mark.parametrize(
    ("groups", "message"), [({"all": [AttributionSelector()]}, "always there"), ({"a": []}, "nothing")]
)
def test_groups_that_cannot_be_are_refused(groups: Any, message: str) -> None:
    with pytest.raises(RequestValueError, match=message):
        group_messages(groups)
