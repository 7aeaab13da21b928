"""Reading an image at computed places: GridSample, RoiAlign, MaxRoiPool, DeformConv.

One idea covers them. The value at a point is a sum over the corners around it, y = sum of w x[position], where w is a
product over the axes of functions of the point's coordinates. So dx adds w g at the positions, and the gradient of a
coordinate is the sum of w' <x[position], g>. Images are laid out as rows of channels, (images * pixels, channels): one
corner of all points is then one Gather of rows there and one scattered sum of rows back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product

import numpy as np
from onnx import TensorProto

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, rule
from explainserve.onnx_vjp.rules.convolution import bias_gradient, kernel_sizes
from explainserve.onnx_vjp.rules.indexing import counted, reduced_scatter

Bound = str | float


@dataclass(frozen=True)
class Neighbour:
    """One neighbour of every point along one axis: its position (int64), its weight, and the weight's derivative by
    the point's coordinate, None where it is zero. All broadcast over the points.
    """

    position: str
    weight: str
    slope: str | None


@dataclass(frozen=True)
class Corner:
    """A neighbour along every axis: its row, its weight, and the weight's derivative by each coordinate, as columns
    with one entry per point.
    """

    row: str
    weight: str
    slopes: tuple[str | None, ...]


def _corners(op: Emitter, images: str, sizes: Sequence[str], axes: Sequence[Sequence[Neighbour]]) -> Iterator[Corner]:
    """Every choice of one neighbour per axis; `images` tells which image each point lies in."""
    for chosen in product(*axes):
        row = images
        for size, neighbour in zip(sizes, chosen, strict=True):
            row = op.Add(op.Mul(row, size), neighbour.position)
        weights = [neighbour.weight for neighbour in chosen]
        slopes = [
            _column(op, reduce(op.Mul, [*weights[:axis], neighbour.slope, *weights[axis + 1 :]]))
            if neighbour.slope
            else None
            for axis, neighbour in enumerate(chosen)
        ]
        yield Corner(_column(op, row), _column(op, reduce(op.Mul, weights)), tuple(slopes))


def _column(op: Emitter, value: str) -> str:
    return op.Reshape(value, [-1, 1])


def _total(op: Emitter, parts: Sequence[str]) -> str:
    return reduce(op.Add, parts)


# -- images as rows of channels
# --------------------------------------------------------------------------------------------


def _rows(op: Emitter, x: str) -> str:
    """(N, C, ...) as (N * ..., C)."""
    rank = op.rank(x)
    return op.Reshape(op.Transpose(x, perm=[0, *range(2, rank), 1]), op.Concat([-1], op.dim(x, 1), axis=0))


def _image(op: Emitter, rows: str, like: str) -> str:
    """Rows back in the shape (N, C, ...) of `like`."""
    rank = op.rank(like)
    dims = op.Gather(op.dims(like), [0, *range(2, rank), 1])
    return op.Transpose(op.Reshape(rows, dims), perm=[0, rank - 1, *range(1, rank - 1)])


def _read(op: Emitter, rows: str, corner: Corner) -> str:
    """The pixel at the corner of every point, (points, C)."""
    return op.Gather(rows, op.Reshape(corner.row, [-1]), axis=0)


def _written(op: Emitter, corners: Sequence[Corner], cotangents: Sequence[str], x: str) -> str:
    """dx: each corner's cotangent, (points, C), added at its position with its weight."""
    dims = op.dims(x)
    pixels = op.ReduceProd(op.Gather(dims, [0, *range(2, op.rank(x))]), keepdims=1)
    total = op.zeros(op.Concat(pixels, op.dim(x, 1), axis=0), x)
    for corner, g in zip(corners, cotangents, strict=True):
        total = reduced_scatter(op, total, corner.row, op.Mul(g, corner.weight), "add")
    return _image(op, total, x)


def _coordinate_gradients(
    op: Emitter, rows: str, corners: Sequence[Corner], cotangents: Sequence[str]
) -> list[str | None]:
    """Per axis a column with the gradient of every point's coordinate, None where nothing depends on it."""
    along = [
        op.ReduceSum(op.Mul(_read(op, rows, corner), g), [1], keepdims=1)
        for corner, g in zip(corners, cotangents, strict=True)
    ]
    by_axis = [
        [op.Mul(part, slope) for part, slope in zip(along, slopes, strict=True) if slope]
        for slopes in zip(*(corner.slopes for corner in corners), strict=True)
    ]
    return [_total(op, parts) if parts else None for parts in by_axis]


# -- neighbours along one axis
# ---------------------------------------------------------------------------------------------


def _linear(op: Emitter, coordinate: str) -> list[tuple[str, str, str]]:
    """(floating position, weight, slope): 1 - t and t, where t is the fraction of the coordinate."""
    low = op.Floor(coordinate)
    t = op.Sub(coordinate, low)
    one = op.cast_like(op.array(np.ones(1)), t)
    return [(low, op.Sub(1, t), op.Neg(one)), (op.Add(low, 1), t, one)]


# Keys' cubic convolution with a = -3/4: near(s) for distances up to 1, far(s) up to 2, coefficients from the highest
# power down.
_NEAR, _FAR = np.array([1.25, -2.25, 0.0, 1.0]), np.array([-0.75, 3.75, -6.0, 3.0])


def _cubic(op: Emitter, coordinate: str) -> list[tuple[str, str, str]]:
    """(floating position, weight, slope) of the four nearest, by their distances 1 + t, t, 1 - t, 2 - t."""
    low = op.Floor(coordinate)
    t = op.Sub(coordinate, low)
    taps = []
    for step, kernel in zip((-1, 0, 1, 2), (_FAR, _NEAR, _NEAR, _FAR), strict=True):
        distance, sign = (op.Sub(t, float(step)), 1) if step <= 0 else (op.Sub(float(step), t), -1)
        slope = _polynomial(op, sign * np.polyder(kernel), distance)
        taps.append((op.Add(low, float(step)), _polynomial(op, kernel, distance), slope))
    return taps


def _polynomial(op: Emitter, coefficients: np.ndarray, x: str) -> str:
    """Horner's scheme."""
    value = op.Mul(x, float(coefficients[0]))
    for coefficient in coefficients[1:-1]:
        value = op.Mul(op.Add(value, float(coefficient)), x)
    return op.Add(value, float(coefficients[-1]))


def _within(op: Emitter, value: str, low: Bound, high: Bound) -> str:
    """Whether the value lies in [low, high]."""
    return op.And(op.GreaterOrEqual(value, low), op.LessOrEqual(value, high))


def _held(op: Emitter, value: str, last: str) -> tuple[str, str]:
    """The value clipped to [0, last], and its slope, which is zero at the ends too."""
    inner = op.And(op.Greater(value, 0), op.Less(value, last))
    return op.Min(op.Max(value, 0), last), op.mask(inner, value)


def _pixel(op: Emitter, position: str, size: str) -> str:
    """A floating position as int64, held inside the image: an infinity or NaN must not read elsewhere."""
    zero = op.array(np.zeros(1, np.int64))
    return op.Min(op.Max(op.Cast(position, to=TensorProto.INT64), zero), op.Sub(size, np.ones(1, np.int64)))


def _or_nothing(op: Emitter, size: str, position: str, weight: str, slope: str | None) -> Neighbour:
    """A neighbour that is zero outside the image."""
    inside = op.mask(_within(op, position, 0, op.Sub(op.cast_like(size, position), 1)), position)
    return Neighbour(_pixel(op, position, size), op.Mul(weight, inside), op.Mul(slope, inside) if slope else None)


# -- GridSample and AffineGrid
# ---------------------------------------------------------------------------------------------


@rule("GridSample", since=16)
def grid_sample(op: Emitter, node: Node, g: str) -> Gradients:
    """The last axis of the grid holds coordinates in [-1, 1], those of the innermost spatial axis first."""
    x, grid = node.inputs
    spatial = op.rank(x) - 2
    sizes = [op.dim(x, 2 + axis) for axis in range(spatial)]
    values = [op.Gather(grid, np.array(spatial - 1 - axis), axis=1 + spatial) for axis in range(spatial)]
    lines = [_Line.of(op, node, size, grid) for size in sizes]
    points = [_grid_coordinate(op, line, value) for line, value in zip(lines, values, strict=True)]
    axes = [_grid_neighbours(op, line, coordinate) for line, (coordinate, _) in zip(lines, points, strict=True)]
    corners = list(_corners(op, _count_images(op, x, spatial), sizes, axes))
    cotangents = [_rows(op, g)] * len(corners)
    dx = _written(op, corners, cotangents, x) if node.differentiates(0) else None
    if not node.differentiates(1):
        return dx, None
    found = _coordinate_gradients(op, _rows(op, x), corners, cotangents)
    columns = [
        op.Mul(gradient, _column(op, slope)) for gradient, (_, slope) in zip(found, points, strict=True) if gradient
    ]
    return dx, op.reshape_like(op.Concat(*columns[::-1], axis=1), grid) if columns else op.zeros_like(grid)


def _count_images(op: Emitter, x: str, trailing: int) -> str:
    """0, 1, ... for the images of x, along the first of 1 + trailing axes."""
    return op.Reshape(counted(op, op.dim(x, 0)), [-1, *[1] * trailing])


@dataclass(frozen=True)
class _Line:
    """One spatial axis as GridSample sees it: -1 and 1 lie at `low` and `high`, its last pixel at `last`."""

    size: str
    last: str
    low: str
    high: str
    smooth: bool
    nearest: bool
    padding: str

    @classmethod
    def of(cls, op: Emitter, node: Node, size: str, like: str) -> _Line:
        last = op.Sub(op.cast_like(size, like), 1)
        margin = 0.0 if node.attribute("align_corners", 0) else 0.5
        mode = node.attribute("mode", "linear")
        return cls(
            size,
            last,
            op.Sub(op.Mul(last, 0), margin),
            op.Add(last, margin),
            mode in ("cubic", "bicubic"),
            mode == "nearest",
            node.attribute("padding_mode", "zeros"),
        )


def _grid_coordinate(op: Emitter, line: _Line, value: str) -> tuple[str, str]:
    """The coordinate in pixels, moved into the image where the padding says so, and its slope by the grid's value.

    Linear interpolation has no slope at or beyond the outermost pixels, as in torch.
    """
    slope = op.Mul(op.Sub(line.high, line.low), 0.5)
    coordinate = op.Add(op.Mul(value, slope), op.Mul(line.last, 0.5))
    if line.nearest:
        return op.Round(coordinate), slope
    if line.padding == "reflection":
        coordinate, sign = _reflected(op, coordinate, line)
        slope = op.Mul(slope, sign)
    if line.padding != "zeros" and not line.smooth:
        coordinate, inner = _held(op, coordinate, line.last)
        slope = op.Mul(slope, inner)
    return coordinate, slope


def _reflected(op: Emitter, value: str, line: _Line) -> tuple[str, str]:
    """A triangular wave between low and high, and its slope, 1 or -1."""
    span = op.Max(op.Sub(line.high, line.low), 1)
    t = op.Sub(value, line.low)
    turn = op.Mul(span, 2)
    rest = op.Sub(span, op.Sub(t, op.Mul(turn, op.Floor(op.Div(t, turn)))))
    return op.Add(op.Sub(span, op.Abs(rest)), line.low), op.Sign(rest)


def _grid_neighbours(op: Emitter, line: _Line, coordinate: str) -> list[Neighbour]:
    if line.nearest:
        return [_grid_neighbour(op, line, coordinate, None, None)]
    return [_grid_neighbour(op, line, *tap) for tap in (_cubic if line.smooth else _linear)(op, coordinate)]


def _grid_neighbour(op: Emitter, line: _Line, position: str, weight: str | None, slope: str | None) -> Neighbour:
    """Outside the image the padding decides what is read: nothing, the border, or the pixel behind the mirror."""
    weight = weight or op.cast_like(op.array(np.ones(1)), position)
    if line.padding == "zeros":
        return _or_nothing(op, line.size, position, weight, slope)
    if line.padding == "reflection":
        position, _ = _reflected(op, position, line)
    return Neighbour(_pixel(op, position, line.size), weight, slope)


@rule("AffineGrid", since=20)
def affine_grid(op: Emitter, node: Node, g: str) -> Gradients:
    """The grid is theta (N, d, d + 1) times the homogeneous points of the untransformed grid, which the operator itself
    tells.
    """
    theta, size = node.inputs
    spatial = op.rank(g) - 2
    plain = op.array(np.eye(spatial, spatial + 1, dtype=op.numpy_dtype(theta))[None])
    one_image = op.Concat([1], op.Slice(size, [1], [2 + spatial]), axis=0)
    base = op.AffineGrid(plain, one_image, align_corners=node.attribute("align_corners", 0))
    points = op.Reshape(base, [-1, spatial])
    homogeneous = op.Pad(points, [0, 0, 0, 1], 1)
    cotangents = op.Reshape(g, [0, -1, spatial])
    return op.MatMul(op.transposed(cotangents), homogeneous), None


# -- RoiAlign
# --------------------------------------------------------------------------------------------------------------


@rule("RoiAlign")
def roi_align(op: Emitter, node: Node, g: str) -> Gradients:
    """Every bin averages its samples or takes the largest weighted corner: points (R, P_h, S_h, P_w, S_w)."""
    x, _, images = node.inputs
    vertical, horizontal = _roi_axis(op, node, 0), _roi_axis(op, node, 1)
    corners, bins, samples = _sampled(op, images, vertical, horizontal, g)
    if node.attribute("mode", "avg") == "max":
        cotangents = _largest(op, _rows(op, x), corners, bins, samples, _present(op, vertical, horizontal))
    else:
        share = op.Div(bins, op.Unsqueeze(op.Mul(vertical.count, horizontal.count), [3, 4, 5]))
        cotangents = [_per_sample(op, share, samples)] * len(corners)
    dx = _written(op, corners, cotangents, x) if node.differentiates(0) else None
    if not node.differentiates(1):
        return dx, None, None
    down, along = (
        op.Reshape(gradient, samples) if gradient else None
        for gradient in _coordinate_gradients(op, _rows(op, x), corners, cotangents)
    )
    top, bottom = _ends(op, vertical, op.ReduceSum(down, [3, 4], keepdims=0))
    left, right = _ends(op, horizontal, op.ReduceSum(along, [1, 2], keepdims=0))
    scale = node.attribute("spatial_scale", 1.0)
    return dx, op.Mul(op.Concat(left, top, right, bottom, axis=1), scale), None


@dataclass(frozen=True)
class _RoiAxis:
    """Height or width of the regions. Tensors are (R, P, S): regions, bins, samples per bin.

    `count` (1 or R, 1, 1) is the number of samples, `present` (R, 1, S) masks the samples that a region has, None where
    all have the same number. `fraction` is where in the region a sample lies, `stretches` whether the region's end
    moves it.
    """

    size: str
    bins: str
    count: str
    present: str | None
    fraction: str
    stretches: str | None
    neighbours: list[Neighbour]


def _roi_axis(op: Emitter, node: Node, axis: int) -> _RoiAxis:
    x, rois = node.inputs[:2]
    half_pixel = node.attribute("coordinate_transformation_mode", "half_pixel") == "half_pixel"
    bins = node.attribute(("output_height", "output_width")[axis], 1)
    start, end = (
        op.Unsqueeze(
            op.Sub(op.Mul(op.Gather(rois, [column], axis=1), node.attribute("spatial_scale", 1.0)), 0.5 * half_pixel),
            [2],
        )
        for column in (1 - axis, 3 - axis)
    )
    length = op.Sub(end, start)
    stretches = None if half_pixel else op.mask(op.Greater(length, 1), length)
    length = length if half_pixel else op.Max(length, 1)
    count, steps, present = _samples(op, node, length, bins)
    within = op.Div(op.Add(steps, 0.5), count)
    fraction = op.Div(op.Add(within, np.arange(bins, dtype=float)[:, None]), float(bins))
    coordinate = op.Add(start, op.Mul(fraction, length))
    size = op.dim(x, 2 + axis)
    neighbours = _roi_neighbours(op, coordinate, size, present)
    return _RoiAxis(size, op.array(np.array([bins])), count, present, fraction, stretches, neighbours)


def _samples(op: Emitter, node: Node, length: str, bins: int) -> tuple[str, str, str | None]:
    """How many samples a bin has, their numbers 0, 1, ..., and which of them a region has: one per pixel of the bin
    where the node does not fix it.
    """
    fixed = node.attribute("sampling_ratio", 0)
    if fixed:
        return (
            op.cast_like(op.array(np.full((1, 1, 1), float(fixed))), length),
            op.cast_like(op.array(np.arange(fixed, dtype=float)), length),
            None,
        )
    count = op.Max(op.Ceil(op.Div(length, float(bins))), 0)
    most = op.Cast(op.Max(op.ReduceMax(count, keepdims=0), 1), to=TensorProto.INT64)
    steps = op.cast_like(counted(op, op.Reshape(most, [1])), length)
    return op.Max(count, 1), steps, op.Less(steps, count)


def _roi_neighbours(op: Emitter, coordinate: str, size: str, present: str | None) -> list[Neighbour]:
    """Samples up to one pixel outside count as at the border, those further away as nothing."""
    length = op.cast_like(size, coordinate)
    last = op.Sub(length, 1)
    counts = _within(op, coordinate, -1, length)
    weight = op.mask(op.And(counts, present) if present else counts, coordinate)
    held, inner = _held(op, coordinate, last)
    return [
        Neighbour(_pixel(op, position, size), op.Mul(part, weight), op.Mul(op.Mul(slope, inner), weight))
        for position, part, slope in _linear(op, held)
    ]


def _sampled(
    op: Emitter, images: str, vertical: _RoiAxis, horizontal: _RoiAxis, g: str
) -> tuple[list[Corner], str, str]:
    """The corners of all samples, the bins' cotangents (R, P_h, 1, P_w, 1, C), and (R, P_h, S_h, P_w, S_w); `images`
    (R,) tells which image a region lies in.
    """
    axes = [
        [_moved(op, n, [3, 4]) for n in vertical.neighbours],
        [_moved(op, n, [1, 2]) for n in horizontal.neighbours],
    ]
    images = op.Unsqueeze(op.Cast(images, to=TensorProto.INT64), [1, 2, 3, 4])
    corners = list(_corners(op, images, [vertical.size, horizontal.size], axes))
    bins = op.Unsqueeze(op.Transpose(g, perm=[0, 2, 3, 1]), [2, 4])
    return corners, bins, op.Concat(op.dim(bins, 0), *_lengths(op, vertical, horizontal), axis=0)


def _moved(op: Emitter, neighbour: Neighbour, axes: list[int]) -> Neighbour:
    """The tensors of one axis among those of both."""
    slope = op.Unsqueeze(neighbour.slope, axes) if neighbour.slope else None
    return Neighbour(op.Unsqueeze(neighbour.position, axes), op.Unsqueeze(neighbour.weight, axes), slope)


def _lengths(op: Emitter, *axes: _RoiAxis) -> list[str]:
    """(P_h, S_h, P_w, S_w)."""
    return [part for axis in axes for part in (axis.bins, op.dim(axis.fraction, 2))]


def _per_sample(op: Emitter, bins: str, samples: str) -> str:
    """What belongs to a bin, (R, P_h, 1, P_w, 1, C), as rows for all of its samples."""
    channels = op.dim(bins, 5)
    return op.Reshape(op.Expand(bins, op.Concat(samples, channels, axis=0)), op.Concat([-1], channels, axis=0))


def _present(op: Emitter, vertical: _RoiAxis, horizontal: _RoiAxis) -> str | None:
    """Which samples exist, (R, 1, S_h, 1, S_w, 1)."""
    if vertical.present is None or horizontal.present is None:
        return None
    return op.And(op.Unsqueeze(vertical.present, [3, 4, 5]), op.Unsqueeze(horizontal.present, [1, 2, 5]))


def _largest(
    op: Emitter, rows: str, corners: Sequence[Corner], bins: str, samples: str, present: str | None
) -> list[str]:
    """The bin's cotangent for the corners whose weighted value is its maximum, evenly for ties, as rows."""
    dims = op.Concat(samples, op.dim(bins, 5), axis=0)
    values = [op.Reshape(op.Mul(_read(op, rows, corner), corner.weight), dims) for corner in corners]
    shown = [op.Where(present, value, -np.inf) if present else value for value in values]
    top = op.ReduceMax(op.Max(*shown), [2, 4], keepdims=1)
    hits = [op.mask(op.Equal(value, top), bins) for value in shown]
    share = op.Div(bins, op.ReduceSum(_total(op, hits), [2, 4], keepdims=1))
    return [op.Reshape(op.Mul(share, hit), op.Concat([-1], op.dim(bins, 5), axis=0)) for hit in hits]


def _ends(op: Emitter, axis: _RoiAxis, gradient: str) -> tuple[str, str]:
    """The gradients of a region's start and end, (R, 1) each: a sample lies at start + fraction (end - start)."""
    moved = op.Mul(gradient, axis.fraction)
    moved = op.Mul(moved, axis.stretches) if axis.stretches else moved
    end = op.ReduceSum(moved, [1, 2], keepdims=0)
    start = op.Sub(op.ReduceSum(gradient, [1, 2], keepdims=0), end)
    return op.Unsqueeze(start, [1]), op.Unsqueeze(end, [1])


@rule("MaxRoiPool")
def max_roi_pool(op: Emitter, node: Node, g: str) -> Gradients:
    """RoiAlign's maximum over all pixels of a bin. The bounds are rounded, so that the regions have no gradient."""
    x, rois = node.inputs
    vertical, horizontal = _pooled_axis(op, node, 0), _pooled_axis(op, node, 1)
    images = op.Gather(rois, np.array(0), axis=1)
    corners, bins, samples = _sampled(op, images, vertical, horizontal, g)
    cotangents = _largest(op, _rows(op, x), corners, bins, samples, _present(op, vertical, horizontal))
    return _written(op, corners, cotangents, x), None


def _pooled_axis(op: Emitter, node: Node, axis: int) -> _RoiAxis:
    """Bins overlap where the region's length is no multiple of their number: their bounds are rounded outwards."""
    x, rois = node.inputs
    bins, size = node.attribute("pooled_shape")[axis], op.dim(x, 2 + axis)
    first, last = (
        op.Floor(op.Add(op.Mul(op.Gather(rois, [column], axis=1), node.attribute("spatial_scale", 1.0)), 0.5))
        for column in (2 - axis, 4 - axis)
    )
    stride = op.Div(op.Max(op.Add(op.Sub(last, first), 1), 1), float(bins))
    edge = op.cast_like(size, x)
    start, stop = (
        op.Unsqueeze(op.Min(op.Max(op.Add(bound, first), 0), edge), [2])
        for bound in (
            op.Floor(op.Mul(stride, np.arange(bins, dtype=float))),
            op.Ceil(op.Mul(stride, np.arange(1, bins + 1, dtype=float))),
        )
    )
    longest = op.Cast(op.Max(op.ReduceMax(op.Sub(stop, start), keepdims=0), 1), to=TensorProto.INT64)
    position = op.Add(start, op.cast_like(counted(op, op.Reshape(longest, [1])), start))
    present = op.Less(position, stop)
    neighbour = Neighbour(_pixel(op, position, size), op.mask(present, position), None)
    return _RoiAxis(size, op.array(np.array([bins])), start, present, position, None, [neighbour])


# -- DeformConv
# ------------------------------------------------------------------------------------------------------------


@rule("DeformConv", since=19)
def deform_conv(op: Emitter, node: Node, g: str) -> Gradients:
    """The kernel times columns of pixels that are read at moved positions and multiplied by the mask."""
    x, kernel, offset = node.inputs[:3]
    view = _deformation(op, node)
    weights = op.Reshape(kernel, op.Concat([view.groups], view.outputs, [-1], axis=0))
    grouped = op.Reshape(g, op.Concat([0, view.groups], view.outputs, [-1], axis=0))
    columns = _pixel_rows(op, view, op.MatMul(op.transposed(weights), grouped))
    mask = _column(op, node.input(4)) if node.input(4) else None
    images = op.Reshape(x, op.Concat([-1], view.channels, op.Slice(op.dims(x), [2], [op.rank(x)]), axis=0))
    rows, cotangents = _rows(op, images), [op.Mul(columns, mask) if mask else columns] * len(view.corners)
    dx = op.reshape_like(_written(op, view.corners, cotangents, images), x) if node.differentiates(0) else None
    dkernel = doffset = dmask = None
    if node.differentiates(2):
        doffset = _offset_gradient(op, view, _coordinate_gradients(op, rows, view.corners, cotangents), offset)
    if node.differentiates(1) or node.differentiates(4):
        read = _total(op, [op.Mul(_read(op, rows, corner), corner.weight) for corner in view.corners])
        dmask = op.reshape_like(op.ReduceSum(op.Mul(read, columns), [1], keepdims=1), node.input(4)) if mask else None
        masked = _pixel_columns(op, view, op.Mul(read, mask) if mask else read)
        dkernel = op.reshape_like(op.ReduceSum(op.MatMul(grouped, op.transposed(masked)), [0], keepdims=0), kernel)
    return dx, dkernel, doffset, bias_gradient(op, node, g, 3), dmask


@dataclass(frozen=True)
class _Deformation:
    """Columns are (N, G, C/G K, P) beside the kernel and rows of pixels (N O K P, C/O) beside the images: N images,
    G groups, O offset groups, K positions of the kernel, P of the output. `outputs` is M/G, `inputs` C/G K and
    `channels` C/O.
    """

    groups: int
    offset_groups: int
    taps: int
    outputs: str
    inputs: str
    channels: str
    batch: str
    corners: list[Corner]


def _deformation(op: Emitter, node: Node) -> _Deformation:
    x, kernel = node.inputs[:2]
    groups, offset_groups = node.attribute("group", 1), node.attribute("offset_group", 1)
    taps = int(np.prod(kernel_sizes(op, node)))
    return _Deformation(
        groups,
        offset_groups,
        taps,
        op.Div(op.dim(kernel, 0), [groups]),
        op.Mul(op.dim(kernel, 1), [taps]),
        op.Div(op.dim(x, 1), [offset_groups]),
        op.dim(x, 0),
        _deformed_corners(op, node, taps),
    )


def _deformed_corners(op: Emitter, node: Node, taps: int) -> list[Corner]:
    """Points are (N, O, K, ...): where the undeformed window reads, plus the offset."""
    x, _, offset = node.inputs[:3]
    kernel = kernel_sizes(op, node)
    rank, groups = len(kernel), node.attribute("offset_group", 1)
    strides, dilations = node.attribute("strides") or [1] * rank, node.attribute("dilations") or [1] * rank
    pads = node.attribute("pads") or [0] * 2 * rank
    folded = op.Reshape(offset, op.Concat([0, groups, taps, rank], op.Slice(op.dims(offset), [2], [2 + rank]), axis=0))
    sizes, axes = [op.dim(x, 2 + axis) for axis in range(rank)], []
    for axis, within in enumerate(np.indices(kernel).reshape(rank, taps)):
        moved = op.Gather(folded, np.array(axis), axis=3)
        starts = op.Sub(op.Mul(counted(op, op.dim(offset, 2 + axis)), [strides[axis]]), [pads[axis]])
        starts = op.Reshape(starts, [-1 if other == axis else 1 for other in range(rank)])
        window = (within * dilations[axis]).reshape(taps, *[1] * rank)
        coordinate = op.Add(moved, op.cast_like(op.Add(starts, window), moved))
        axes.append([_or_nothing(op, sizes[axis], *tap) for tap in _linear(op, coordinate)])
    images = op.Reshape(counted(op, op.Mul(op.dim(x, 0), [groups])), [-1, groups, *[1] * (1 + rank)])
    return list(_corners(op, images, sizes, axes))


def _pixel_rows(op: Emitter, view: _Deformation, columns: str) -> str:
    """(N, G, C/G K, P) as (N O K P, C/O)."""
    apart = op.Reshape(columns, op.Concat([0, view.offset_groups], view.channels, [view.taps, -1], axis=0))
    return op.Reshape(op.Transpose(apart, perm=[0, 1, 3, 4, 2]), op.Concat([-1], view.channels, axis=0))


def _pixel_columns(op: Emitter, view: _Deformation, rows: str) -> str:
    """(N O K P, C/O) as (N, G, C/G K, P)."""
    apart = op.Reshape(rows, op.Concat(view.batch, [view.offset_groups, view.taps, -1], view.channels, axis=0))
    back = op.Transpose(apart, perm=[0, 1, 4, 2, 3])
    return op.Reshape(back, op.Concat([0, view.groups], view.inputs, [-1], axis=0))


def _offset_gradient(op: Emitter, view: _Deformation, found: Sequence[str | None], offset: str) -> str:
    """Columns per axis, (N O K P, 1), in the order (N, O, K, axes, P)."""
    columns = op.Concat(*found, axis=1)
    apart = op.Reshape(columns, op.Concat(op.dim(offset, 0), [view.offset_groups * view.taps, -1, len(found)], axis=0))
    return op.reshape_like(op.Transpose(apart, perm=[0, 1, 3, 2]), offset)
