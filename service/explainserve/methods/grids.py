"""Layers whose positions lie over an image: channels with a grid, in the order in which models have them.

Three layouts are told apart by the extents of one instance, beside those of the input: channels first (C, H, W),
channels last (H, W, C), and tokens (T, C), which are the cells of a grid row by row, behind tokens that stand for no
cell (a class token, say).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import InvalidRequest, Unsupported
from explainserve.explanation import Subject
from explainserve.methods.planes import extent
from explainserve.signature import NAMED_LAYERS, Layer, MapSpec, unknown_layer

MAX_PREFIX_TOKENS = 8
_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})


@dataclass(frozen=True)
class Grid:
    """How the values of a layer lie over an input.

    Attributes:
        layer: its name.
        covers: name of the input.
        rows, columns: cells along H and W.
        channels: number of channels.
        layout: "CHW", "HWC" or "TC".
        prefix_count: tokens before the cells.
    """

    layer: str
    covers: str
    rows: int
    columns: int
    channels: int
    layout: str
    prefix_count: int = 0

    @property
    def map_spec(self) -> MapSpec:
        """Of a map with one value per cell."""
        return MapSpec(self.layer, "HW", None, self.covers)

    def channels_first(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        """Values of one instance as (channels, rows, columns), float64."""
        if self.layout == "TC":
            values = values[self.prefix_count :].reshape(self.rows, self.columns, self.channels)
        moved = values if self.layout == "CHW" else np.moveaxis(values, -1, 0)
        return moved.astype(np.float64)


def grid(subject: Subject, layer: str | None) -> Grid:
    """The grid of a layer; of the default one where none is named.

    The default is the first that the model's owner picked, else the last with a grid of more than one cell that is no
    score itself; of tokens the last before the last attention, for after it only the class token reaches the score.

    Raises:
        InvalidRequest: there is no such layer (UNKNOWN_LAYER), or it has no grid (LAYER_WITHOUT_GRID).
        Unsupported: no layer has one, or no input has H and W axes (NO_GRID_LAYER).
    """
    covers = next((name for name, spec in subject.maps.items() if spec.spatial_axes is not None), None)
    if covers is None:
        raise Unsupported("NO_GRID_LAYER", "no explained input has H and W axes, so no layer lies over an image")
    known = {own.name: own for own in subject.layers}
    if layer is not None and layer not in known:
        raise unknown_layer(layer, subject.layers, list(known)[-NAMED_LAYERS:])
    named = layer or next(iter(subject.configured_layers), None)
    if named is None:
        return _default(subject, covers)
    found = _grid(known[named], covers, extent(subject, covers))
    if found is None:
        shape = [axis.size or axis.name for axis in known[named].axes]
        raise InvalidRequest(
            "LAYER_WITHOUT_GRID",
            f"layer {named!r} of shape {shape} has no known grid over input {covers!r}",
            layer=named,
            shape=shape,
        )
    return found


def upsampled(values: NDArray[np.float64], extent: tuple[int, int], how: str) -> NDArray[np.float64]:
    """Maps (..., rows, columns) at the extent (H, W) of an input: "nearest", or "bilinear" between the centers of
    cells, the border repeated."""
    for axis, size in zip((-2, -1), extent, strict=True):
        values = _resized(values, axis, size, how)
    return values


def _default(subject: Subject, covers: str) -> Grid:
    size = extent(subject, covers)
    layers = [layer for layer in subject.layers if layer.name not in subject.pre_activations]
    found = [(place, own) for place, layer in enumerate(layers) if (own := _grid(layer, covers, size))]
    spread = [(place, own) for place, own in found if own.rows * own.columns > 1]
    if not spread:
        raise Unsupported("NO_GRID_LAYER", "no layer of known shape has a grid of more than one cell; name one")
    last = spread[-1][1]
    if last.layout != "TC":
        return last
    mixing = [place for place, layer in enumerate(layers) if _mixes_tokens(layer)]
    before = [own for place, own in spread if own.layout == "TC" and mixing and place < mixing[-1]]
    return before[-1] if before else last


def _mixes_tokens(layer: Layer) -> bool:
    """Attention, or the scores of one: a square of tokens for each head."""
    sizes = [axis.size for axis in layer.axes]
    square = len(sizes) == 4 and sizes[2] is not None and sizes[2] == sizes[3]
    return layer.operator in _ATTENTION or (layer.operator == "MatMul" and square)


def _grid(layer: Layer, covers: str, extent: tuple[int, int]) -> Grid | None:
    sizes = [axis.size for axis in layer.axes[1:]]
    if len(sizes) not in (2, 3) or any(size is None for size in sizes):
        return None
    return next(_readings(layer.name, covers, [int(size or 0) for size in sizes], extent), None)


def _readings(layer: str, covers: str, sizes: list[int], extent: tuple[int, int]) -> Iterator[Grid]:
    """Every way to read the extents of a layer as a grid over the input, the likeliest first."""
    if len(sizes) == 3:
        first, middle, last = sizes
        if _same_aspect(middle, last, extent):
            yield Grid(layer, covers, middle, last, first, "CHW")
        if _same_aspect(first, middle, extent):
            yield Grid(layer, covers, first, middle, last, "HWC")
    else:
        tokens, channels = sizes
        for prefix in range(MAX_PREFIX_TOKENS + 1):
            cells = _cells(tokens - prefix, extent)
            if cells is not None:
                yield Grid(layer, covers, *cells, channels, "TC", prefix)


def _same_aspect(rows: int, columns: int, extent: tuple[int, int]) -> bool:
    """Whether cells are about as high as wide: strides that do not divide an extent round it to the next cell."""
    if not (0 < rows <= extent[0] and 0 < columns <= extent[1]):
        return False
    height, width = extent[0] / rows, extent[1] / columns
    return abs(math.log(height / width)) <= math.log1p(1.5 / min(rows, columns))


def _cells(count: int, extent: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of so many square cells."""
    if count < 1:
        return None
    rows = round(math.sqrt(count * extent[0] / extent[1]))
    fits = rows > 0 and count % rows == 0 and _same_aspect(rows, count // rows, extent)
    return (rows, count // rows) if fits else None


def _resized(values: NDArray[np.float64], axis: int, size: int, how: str) -> NDArray[np.float64]:
    count = values.shape[axis]
    centers = (np.arange(size) + 0.5) * count / size - 0.5
    if how == "nearest":
        return np.asarray(values.take(np.clip(np.floor(centers + 0.5).astype(int), 0, count - 1), axis))
    low = np.clip(np.floor(centers).astype(int), 0, count - 1)
    high = np.clip(np.floor(centers).astype(int) + 1, 0, count - 1)
    shape = [1] * values.ndim
    shape[axis] = size
    share = (centers - np.floor(centers)).reshape(shape)
    return np.asarray(values.take(low, axis) * (1 - share) + values.take(high, axis) * share)
