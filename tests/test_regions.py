"""Sums in boxes and masks against plain loops, and the refusals."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from explainserve.regions import Box, RegionSum, check_box, check_mask, region_sums
from explainserve.statistics import View
from explainserve.v1 import statistics_pb2

FINITE = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
LAYOUTS = {"CHW": (0, (1, 2)), "HWC": (2, (0, 1)), "HW": (None, (0, 1))}


@st.composite
def boxed_maps(draw, elements=FINITE):
    """A map of some layout, and a box inside it."""
    channel_axis, spatial_axes = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    side = st.integers(1, 5)
    height, width = draw(side), draw(side)
    shape = [height, width]
    if channel_axis is not None:
        shape.insert(channel_axis, draw(st.integers(1, 3)))
    tensor = draw(hnp.arrays(np.float32, tuple(shape), elements=elements))
    x, y = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    box = Box(x, y, draw(st.integers(1, width - x)), draw(st.integers(1, height - y)))
    return tensor, channel_axis, spatial_axes, box


def pixels_in(box: Box) -> list[tuple[int, int]]:
    return [(row, column) for row in range(box.y, box.y + box.height) for column in range(box.x, box.x + box.width)]


def channels_last(tensor: np.ndarray, channel_axis: int | None) -> np.ndarray:
    """(H, W, C) in float64."""
    wide = tensor.astype(np.float64)
    return wide[..., None] if channel_axis is None else np.moveaxis(wide, channel_axis, -1)


def check_sums(got: RegionSum, values: list[float], total: float) -> None:
    finite = [v for v in values if np.isfinite(v)]
    assert (got.element_count, got.finite_count) == (len(values), len(finite))
    assert got.sum == pytest.approx(sum(finite), abs=1e-9)
    assert got.positive_sum == pytest.approx(sum(v for v in finite if v > 0), abs=1e-9)
    assert got.negative_sum == pytest.approx(sum(v for v in finite if v < 0), abs=1e-9)
    assert (got.share is None) == (total == 0)
    if got.share is not None:
        assert got.share * total == pytest.approx(got.sum, abs=1e-9)


@given(boxed_maps(st.one_of(FINITE, st.sampled_from([np.nan, np.inf, -np.inf]))))
def test_box_sums_are_those_of_its_pixels(case):
    tensor, channel_axis, spatial_axes, box = case
    maps = channels_last(tensor, channel_axis)
    with np.errstate(invalid="ignore"):
        summed = maps.sum(axis=-1)

    got = region_sums(tensor, channel_axis, spatial_axes, box, "left")

    assert [s.view for s in got] == [View.ELEMENTS] + [View.CHANNEL_SUM] * (channel_axis is not None)
    assert {s.name for s in got} == {"left"}
    whole = tensor.astype(np.float64)
    check_sums(got[0], [v for p in pixels_in(box) for v in maps[p]], whole[np.isfinite(whole)].sum())
    for sums in got[1:]:
        total = np.where(np.isfinite(summed), summed, 0).sum()
        check_sums(sums, [summed[p] for p in pixels_in(box)], float(total))


@given(boxed_maps())
def test_a_mask_of_the_same_pixels_gives_the_same_sums(case):
    tensor, channel_axis, spatial_axes, box = case
    pixels = np.zeros([tensor.shape[axis] for axis in spatial_axes], dtype=bool)
    pixels[box.y : box.y + box.height, box.x : box.x + box.width] = True
    full = pixels if channel_axis is None else np.broadcast_to(np.expand_dims(pixels, channel_axis), tensor.shape)

    expected = region_sums(tensor, channel_axis, spatial_axes, box)

    assert region_sums(tensor, channel_axis, spatial_axes, pixels) == expected
    assert region_sums(tensor, channel_axis, None, full) == expected


@given(boxed_maps())
def test_views_agree_and_the_whole_has_share_one(case):
    tensor, channel_axis, spatial_axes, _ = case
    height, width = (tensor.shape[axis] for axis in spatial_axes)

    for sums in region_sums(tensor, channel_axis, spatial_axes, Box(0, 0, width, height)):
        assert sums.sum == pytest.approx(float(tensor.sum(dtype=np.float64)), abs=1e-9)
        assert sums.share is None or sums.share == pytest.approx(1, abs=1e-6)


@given(boxed_maps(), st.data())
def test_a_region_and_its_complement_add_up(case, data):
    tensor, channel_axis, _, _ = case
    mask = data.draw(hnp.arrays(bool, tensor.shape))

    inside, outside = (region_sums(tensor, channel_axis, None, m)[0] for m in (mask, ~mask))

    assert inside.element_count + outside.element_count == tensor.size
    assert inside.sum + outside.sum == pytest.approx(float(tensor.sum(dtype=np.float64)), abs=1e-9)


@given(boxed_maps(), st.data())
def test_a_mask_of_some_channels_sums_those_in_both_views(case, data):
    tensor, channel_axis, _, _ = case
    mask = data.draw(hnp.arrays(bool, tensor.shape))

    got = region_sums(tensor, channel_axis, None, mask)

    assert all(sums.sum == pytest.approx(got[0].sum, abs=1e-9) for sums in got)
    if channel_axis is not None:
        assert got[1].element_count == np.count_nonzero(mask.any(axis=channel_axis))


def test_a_masked_out_nan_stays_out():
    tensor = np.array([[[np.nan, 1.0]], [[2.0, 3.0]]], dtype=np.float32)
    mask = np.array([[[False, True]], [[True, True]]])

    elements, channels = region_sums(tensor, 0, (1, 2), mask)

    assert (elements.element_count, elements.finite_count, elements.sum) == (3, 3, 6)
    assert (channels.element_count, channels.finite_count, channels.sum) == (2, 2, 6)


def test_share_of_a_zero_total_is_absent():
    tensor = np.array([[1.0, -1.0]], dtype=np.float32)

    (sums,) = region_sums(tensor, None, (0, 1), Box(0, 0, 1, 1))

    assert sums.sum == 1
    assert sums.share is None


def test_a_mask_works_without_spatial_axes():
    (sums,) = region_sums(np.array([1.0, 2.0, 5.0], np.float32), None, None, np.array([True, False, True]))

    assert (sums.sum, sums.share) == (6, 0.75)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (Box(-1, 0, 1, 1), r"x=-1, width=1 covers \[-1, 0\).*\[0, 4\)"),
        (Box(3, 0, 2, 1), r"x=3, width=2 covers \[3, 5\).*\[0, 4\)"),
        (Box(0, 2, 1, 2), r"y=2, height=2 covers \[2, 4\).*\[0, 3\)"),
        (Box(0, 0, 0, 1), r"x=0, width=0.*non-empty"),
        (Box(0, 0, 1, -1), r"y=0, height=-1.*non-empty"),
    ],
)
@pytest.mark.parametrize("layout", ["CHW", "HWC"])
def test_boxes_outside_are_refused(box, message, layout):
    channel_axis, spatial_axes = LAYOUTS[layout]
    shape = (2, 3, 4) if layout == "CHW" else (3, 4, 2)

    with pytest.raises(ValueError, match=message):
        check_box(box, shape, spatial_axes)
    with pytest.raises(ValueError, match=message):
        region_sums(np.zeros(shape, np.float32), channel_axis, spatial_axes, box)


def test_the_largest_box_is_accepted():
    check_box(Box(0, 0, 4, 3), (2, 3, 4), (1, 2))


def test_a_box_needs_spatial_axes():
    with pytest.raises(ValueError, match=r"needs H and W axes.*\(7,\)"):
        check_box(Box(0, 0, 1, 1), (7,), None)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((2, 3, 4), np.uint8), "dtype uint8; expected bool"),
        (np.zeros((4, 3), bool), r"shape \(4, 3\); expected \(2, 3, 4\) or \(3, 4\)"),
        (np.zeros((1, 3, 4), bool), r"shape \(1, 3, 4\)"),
        (np.zeros((), bool), r"shape \(\)"),
    ],
)
def test_masks_of_another_shape_or_type_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        check_mask(mask, (2, 3, 4), 0)


def test_without_a_channel_axis_only_the_full_shape_is_accepted():
    check_mask(np.zeros((3, 4), bool), (3, 4), None)
    with pytest.raises(ValueError, match=r"expected \(3, 4\)$"):
        check_mask(np.zeros(4, bool), (3, 4), None)


@pytest.mark.parametrize(("ours", "wire"), [(RegionSum, statistics_pb2.RegionSum), (Box, statistics_pb2.Box)])
def test_dataclasses_mirror_the_wire(ours, wire):
    assert [field.name for field in dataclasses.fields(ours)] == [field.name for field in wire.DESCRIPTOR.fields]
