"""Resize and Pad: linear maps along each axis, undone by the transposed maps.

The map of an axis is what the operator itself makes of the identity matrix, so every mode and coordinate convention
is covered by one formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, Refusal, rule
from explainserve.onnx_vjp.shapes import Dimension


@rule("Pad")
def pad(op: Emitter, node: Node, g: str) -> Gradients:
    """Padding with a constant is undone by cropping, and the constant's gradient is the sum over the padding; a padding
    that repeats elements adds their cotangents.
    """
    x, pads, axes = node.inputs[0], node.inputs[1], node.input(3)
    mode = node.attribute("mode", "constant")
    if mode == "constant":
        dvalue = None
        if node.differentiates(2):
            around = op.Pad(op.zeros_like(x), pads, 1, axes)
            dvalue = op.reshape_like(op.ReduceSum(op.Mul(g, around), keepdims=0), node.inputs[2])
        return _cropped(op, g, x, pads, axes), None, dvalue, None
    chosen = _padded_axes(op, node)
    for order, axis in enumerate(chosen):
        amounts = [op.Gather(pads, [position]) for position in (order, order + len(chosen))]
        constants = [op.constant(amount) for amount in amounts]
        if any(constant is None or constant.any() for constant in constants):
            g = _unpadded(op, g, axis, op.Pad(_identity(op, x, axis), _last_axis(op, *amounts), mode=mode))
    return g, None, None, None


def _cropped(op: Emitter, g: str, x: str, pads: str, axes: str) -> str:
    """What lies inside the padding, and zeros where a negative one had cut."""
    zero = op.array(np.array([0]))
    filling = op.Max(op.Neg(pads), zero)
    constant = op.constant(filling)
    if constant is None or constant.any():
        g = op.Pad(g, filling, None, axes)
    which = op.Cast(axes, to=TensorProto.INT64) if axes else op.array(np.arange(op.rank(x)))
    start = op.Gather(op.Reshape(op.Max(pads, zero), [2, -1]), op.array(np.array(0)))
    return op.Slice(g, start, op.Add(start, op.Gather(op.dims(x), which)), which)


def _padded_axes(op: Emitter, node: Node) -> list[int]:
    rank, axes = op.rank(node.inputs[0]), node.input(3)
    chosen = op.constant(axes) if axes else np.arange(rank)
    if chosen is None:
        raise Refusal("Pad over axes that are computed from the input", "store the axes in the file")
    return [int(axis) % rank for axis in chosen]


def _last_axis(op: Emitter, before: str, after: str) -> str:
    """The padding of a matrix along its rows."""
    return op.Concat([0], before, [0], after, axis=0)


def _unpadded(op: Emitter, g: str, axis: int, matrix: str) -> str:
    """The matrix (in, out) of a padding times the cotangent: in the middle it only moves, so that the ends suffice."""
    values = op.constant(matrix)
    ends = None if values is None else _ends(values)
    if values is None or ends is None:
        return _axis_map(op, g, axis, matrix)
    start, stop, shift = ends
    parts = [
        _axis_map(op, op.Slice(g, [0], [start + shift], [axis]), axis, op.array(values[:start, : start + shift])),
        op.Slice(g, [start + shift], [stop + shift], [axis]),
        _axis_map(
            op, op.Slice(g, [stop + shift], [values.shape[1]], [axis]), axis, op.array(values[stop:, stop + shift :])
        ),
    ]
    sizes = (start, stop - start, len(values) - stop)
    return op.Concat(*(part for part, size in zip(parts, sizes, strict=True) if size), axis=axis)


def _ends(matrix: np.ndarray) -> tuple[int, int, int] | None:
    """(start, stop, shift) where the rows from start to stop are those of a shifted identity and the blocks before and
    after do not mix, else None.
    """
    alone = np.flatnonzero(np.count_nonzero(matrix, axis=1) == 1)
    if not alone.size:
        return None
    start, stop = int(alone[0]), int(alone[-1]) + 1
    shift = int(np.argmax(matrix[start])) - start
    middle = np.eye(stop - start, matrix.shape[1], start + shift, dtype=matrix.dtype)
    apart = not matrix[:start, stop + shift :].any() and not matrix[stop:, : start + shift].any()
    return (start, stop, shift) if apart and np.array_equal(matrix[start:stop], middle) else None


def _axis_map(op: Emitter, g: str, axis: int, matrix: str) -> str:
    """The transpose of a linear map along one axis: `matrix` (in, out) times the cotangent along `axis`."""
    rank = op.rank(g)
    if axis == rank - 2:
        return op.MatMul(matrix, g)
    if axis == rank - 1:
        return op.MatMul(g, op.Transpose(matrix, perm=[1, 0]))
    perm: Sequence[int] = [*(other for other in range(rank) if other != axis), axis]
    moved = op.MatMul(op.Transpose(g, perm=perm), op.Transpose(matrix, perm=[1, 0]))
    return op.Transpose(moved, perm=[int(other) for other in np.argsort(perm)])


def _identity(op: Emitter, x: str, axis: int) -> str:
    """The identity matrix of the size of an axis: constant where the size is."""
    shape = op.shape(x)
    if shape is not None and isinstance(size := shape[axis], int):
        return op.array(np.eye(size, dtype=op.numpy_dtype(x)))
    size_twice = op.Concat(op.dim(x, axis), op.dim(x, axis), axis=0)
    return op.EyeLike(op.zeros(size_twice, x))


@rule("Resize")
def resize(op: Emitter, node: Node, g: str) -> Gradients:
    absent = [None] * (len(node.inputs) - 1)
    repeats = _repeats(op, node)
    if repeats is not None:
        # A pooling, which measures faster than a matrix product.
        sums = op.AveragePool(g, kernel_shape=repeats, strides=repeats)
        return op.Mul(sums, float(np.prod(repeats))), *absent
    for position, axis in enumerate(_resized_axes(op, node)):
        if not _keeps(op, node, position, axis):
            g = _axis_map(op, g, axis, _resized_identity(op, node, position, axis))
    return g, *absent


def _repeats(op: Emitter, node: Node) -> list[int] | None:
    """How often every element is repeated along each spatial axis, where that is all that happens, else None."""
    coordinates, rounding = (
        node.attribute(name, default)
        for name, default in (
            ("coordinate_transformation_mode", "half_pixel"),
            ("nearest_mode", "round_prefer_floor"),
        )
    )
    centred = coordinates in ("half_pixel", "half_pixel_symmetric") and rounding.startswith("round")
    if node.attribute("mode", "nearest") != "nearest" or not (
        centred or (coordinates == "asymmetric" and rounding == "floor")
    ):
        return None
    scales = _scales(op, node)
    if scales is None or any(scale != int(scale) or scale < 1 for scale in scales) or any(s != 1 for s in scales[:2]):
        return None
    return [int(scale) for scale in scales[2:]] if len(scales) in (3, 4, 5) else None


def _scales(op: Emitter, node: Node) -> list[float] | None:
    """The scale of every axis where all are known."""
    x, y = op.shape(node.inputs[0]), op.shape(node.outputs[0])
    constant = op.constant(node.input(2))
    if constant is not None and constant.size:
        every = np.ones(op.rank(node.inputs[0]))
        every[_resized_axes(op, node)] = constant
        return [float(scale) for scale in every]
    if node.attribute("keep_aspect_ratio_policy", "stretch") != "stretch" or node.input(2) or x is None or y is None:
        return None
    ratios = [_ratio(*pair) for pair in zip(x, y, strict=True)]
    known = [ratio for ratio in ratios if ratio is not None]
    return known if len(known) == len(ratios) else None


def _ratio(before: Dimension, after: Dimension) -> float | None:
    if isinstance(before, int) and isinstance(after, int) and before:
        return after / before
    return 1.0 if before == after and before is not None else None


def _resized_axes(op: Emitter, node: Node) -> list[int]:
    rank = op.rank(node.inputs[0])
    return [int(axis) % rank for axis in node.attribute("axes") or range(rank)]


def _crops(node: Node) -> bool:
    return bool(node.attribute("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize")


def _keeps(op: Emitter, node: Node, position: int, axis: int) -> bool:
    """Whether the axis is certainly left as it is."""
    roi, scales = op.constant(node.input(1)), op.constant(node.input(2))
    if _crops(node) and (roi is None or roi[position] != 0 or roi[position + len(roi) // 2] != 1):
        return False
    if scales is not None and scales.size:
        return float(scales[position]) == 1.0
    before, after = op.shape(node.inputs[0]), op.shape(node.outputs[0])
    return before is not None and after is not None and before[axis] is not None and before[axis] == after[axis]


def _resized_identity(op: Emitter, node: Node, position: int, axis: int) -> str:
    """The same Resize along the rows of an identity matrix: the matrix (in, out) of the axis.

    What is extrapolated is constant: zero.
    """
    x, scales = node.inputs[0], node.input(2)
    rows = _identity(op, x, axis)
    identity = op.Unsqueeze(rows, [0, 1])
    names = ("antialias", "coordinate_transformation_mode", "cubic_coeff_a", "exclude_outside", "mode", "nearest_mode")
    attributes = {name: node.attribute(name) for name in names}
    roi, size = _roi(op, node, position), op.dim(node.outputs[0], axis)
    if scales and ((constant := op.constant(scales)) is None or constant.size):
        scale = op.Gather(scales, [position])
        if _may_keep_its_size(op, node, position, axis):
            return _apart(op, node, rows, roi, scale, attributes)
        resized = op.Resize(identity, roi, _last(op, scale), **attributes)
    elif _keeps_aspect(node):
        resized = _by_common_scale(op, node, identity, size, attributes)
    else:
        resized = op.Resize(identity, roi, None, op.Concat([1, 1], op.dim(x, axis), size, axis=0), **attributes)
    return op.Squeeze(resized, [0, 1])


def _may_keep_its_size(op: Emitter, node: Node, position: int, axis: int) -> bool:
    """Whether a scale other than 1 may leave the size of an axis as it is, as 1.1 does that of five."""
    before, after = op.shape(node.inputs[0]), op.shape(node.outputs[0])
    sizes = {shape[axis] for shape in (before, after) if shape is not None and isinstance(shape[axis], int)}
    scales = op.constant(node.input(2))
    return len(sizes) < 2 and (scales is None or 1 < scales[position] < 2)


def _apart(op: Emitter, node: Node, rows: str, roi: str | None, scale: str, attributes: dict[str, Any]) -> str:
    """Resize of one axis that may keep its size, beside an axis that changes exactly if one of the node does:
    onnxruntime copies where no size changes, whatever the scales.
    """
    differ = op.Not(op.Equal(op.dims(node.inputs[0]), op.dims(node.outputs[0])))
    changed = op.ReduceMax(op.Cast(differ, to=TensorProto.FLOAT), keepdims=1)
    scales = op.Concat(np.ones(2, np.float32), op.Add(changed, 1), scale, axis=0)
    resized = op.Resize(op.Unsqueeze(rows, [1, 2]), roi, scales, **attributes)
    return op.Gather(op.Squeeze(resized, [1]), op.array(np.array(0)), axis=1)


def _last(op: Emitter, scale: str) -> str:
    """A scale of the last of four axes."""
    return op.Concat(np.ones(3, np.float32), scale, axis=0)


def _keeps_aspect(node: Node) -> bool:
    """Whether the scale is one for all axes and the sizes are rounded from it; corners that are aligned fix the scale
    again.
    """
    stretched = node.attribute("keep_aspect_ratio_policy", "stretch") == "stretch"
    return not stretched and node.attribute("coordinate_transformation_mode", "half_pixel") != "align_corners"


def _by_common_scale(op: Emitter, node: Node, identity: str, size: str, attributes: dict[str, Any]) -> str:
    """A scale alone rounds the size down, so the rows are longer than needed, continued by their last element as the
    border of the image is.
    """
    mode = node.attribute("coordinate_transformation_mode", "half_pixel")
    if (
        mode not in ("half_pixel", "asymmetric")
        or node.attribute("antialias", 0)
        or node.attribute("exclude_outside", 0)
    ):
        raise Refusal(
            f"Resize keeps the aspect ratio with antialias, exclude_outside or coordinates '{mode}'",
            "store the output sizes in the file, with keep_aspect_ratio_policy 'stretch'",
        )
    x, sizes = node.inputs[0], node.input(3)
    lengths = op.Gather(op.dims(x), _resized_axes(op, node))
    ratios = op.Div(*(op.Cast(value, to=TensorProto.FLOAT) for value in (sizes, lengths)))
    smallest = node.attribute("keep_aspect_ratio_policy") == "not_larger"
    scale = (op.ReduceMin if smallest else op.ReduceMax)(ratios, keepdims=1)
    border = op.Concat([0, 0, 0, 0, 0, 0, 0], op.Slice(op.dims(identity), [3], [4]), axis=0)
    longer = op.Resize(op.Pad(identity, border, mode="edge"), None, _last(op, scale), **attributes)
    return op.Slice(longer, [0], size, [3])


def _roi(op: Emitter, node: Node, position: int) -> str | None:
    """The region of interest of one axis, as the last of four; the others are whole."""
    if not _crops(node):
        return None
    roi, count = node.inputs[1], len(_resized_axes(op, node))
    start, end = op.Gather(roi, [position]), op.Gather(roi, [position + count])
    whole = np.zeros(3, op.numpy_dtype(roi))
    return op.Concat(whole, start, whole + 1, end, axis=0)
