"""Sums of attributions in boxes and masks: reading numbers beats reading colors."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from explainserve.statistics import View, reduce_to_view


@dataclass(frozen=True)
class Box:
    """A rectangle in the H and W axes, half-open: columns [x, x + width), rows [y, y + height)."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class RegionSum:
    """Sums over the finite elements of a region; `share` is None where the sum over the whole map is zero."""

    name: str
    view: View
    element_count: int
    finite_count: int
    sum: float
    positive_sum: float
    negative_sum: float
    share: float | None


def check_box(box: Box, shape: tuple[int, ...], spatial_axes: tuple[int, int] | None) -> None:
    """ValueError for a box that is empty or leaves the input; `spatial_axes`: positions of H and W in `shape`."""
    if spatial_axes is None:
        raise ValueError(f"a box needs H and W axes; the input of shape {shape} states none")
    height, width = (shape[axis] for axis in spatial_axes)
    for side, start, length, limit in (("x", box.x, box.width, width), ("y", box.y, box.height, height)):
        if start < 0 or length < 1 or start + length > limit:
            extent = "width" if side == "x" else "height"
            raise ValueError(
                f"box {side}={start}, {extent}={length} covers [{start}, {start + length}); "
                f"expected a non-empty part of [0, {limit})"
            )


def check_mask(mask: NDArray[np.bool_], shape: tuple[int, ...], channel_axis: int | None) -> None:
    """ValueError for a mask that is not boolean, or of neither the input's shape nor that without the channel axis."""
    if mask.dtype != np.bool_:
        raise ValueError(f"mask has dtype {mask.dtype}; expected bool")
    allowed = [shape] if channel_axis is None else [shape, _without_axis(shape, channel_axis)]
    if mask.shape not in allowed:
        raise ValueError(f"mask has shape {mask.shape}; expected {' or '.join(map(str, allowed))}")


def region_sums(
    tensor: NDArray[np.float32],
    channel_axis: int | None,
    spatial_axes: tuple[int, int] | None,
    region: Box | NDArray[np.bool_],
    name: str = "",
) -> list[RegionSum]:
    """Sums of a map in a region over all elements, and over CHANNEL_SUM where there is a channel axis.

    A mask of the full shape may hold some channels of a pixel only: then CHANNEL_SUM adds those channels, over the
    pixels that have any, so that both views agree. Non-finite elements are left out. ValueError as in `check_box` and
    `check_mask`.
    """
    inside = _membership(tensor.shape, channel_axis, spatial_axes, region)
    sums = [_region_sum(name, View.ELEMENTS, tensor[inside].astype(np.float64), tensor.astype(np.float64))]
    if channel_axis is not None:
        whole = reduce_to_view(tensor, View.CHANNEL_SUM, channel_axis)
        # Selected, not multiplied: 0 x NaN is NaN.
        selected = reduce_to_view(np.where(inside, tensor, np.float32(0)), View.CHANNEL_SUM, channel_axis)
        sums.append(_region_sum(name, View.CHANNEL_SUM, selected[inside.any(axis=channel_axis)], whole))
    return sums


def _membership(
    shape: tuple[int, ...],
    channel_axis: int | None,
    spatial_axes: tuple[int, int] | None,
    region: Box | NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Which elements of a tensor of `shape` are in the region."""
    if isinstance(region, Box):
        check_box(region, shape, spatial_axes)
        return _box_membership(shape, spatial_axes, region)
    check_mask(region, shape, channel_axis)
    if channel_axis is None or region.ndim == len(shape):
        return region
    return np.broadcast_to(np.expand_dims(region, channel_axis), shape)


def _box_membership(shape: tuple[int, ...], spatial_axes: tuple[int, int] | None, box: Box) -> NDArray[np.bool_]:
    assert spatial_axes is not None, "check_box refuses a box without H and W axes"
    part = [slice(None)] * len(shape)
    part[spatial_axes[0]] = slice(box.y, box.y + box.height)
    part[spatial_axes[1]] = slice(box.x, box.x + box.width)
    inside = np.zeros(shape, dtype=np.bool_)
    inside[tuple(part)] = True
    return inside


def _region_sum(name: str, view: View, values: NDArray[np.float64], whole: NDArray[np.float64]) -> RegionSum:
    finite = values[np.isfinite(values)]
    total = float(whole[np.isfinite(whole)].sum())
    region_total = float(finite.sum())
    return RegionSum(
        name=name,
        view=view,
        element_count=values.size,
        finite_count=finite.size,
        sum=region_total,
        positive_sum=float(finite[finite > 0].sum()),
        negative_sum=float(finite[finite < 0].sum()),
        share=region_total / total if total else None,
    )


def _without_axis(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return tuple(np.delete(shape, axis).tolist())
