"""Resize and Pad: linear maps along each axis, undone by the transposed maps.

The map of an axis is what the operator itself makes of the identity matrix, so every mode and coordinate convention
is covered by one formula.
"""

from __future__ import annotations

import numpy as np

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, Refusal, rule
from explainserve.onnx_vjp.rules.indexing import axis_map


@rule("Pad")
def pad(op: Emitter, node: Node, g: str) -> Gradients:
    """Padding with a constant is undone by cropping; a padding that repeats elements adds their cotangents."""
    x, pads, axes = node.inputs[0], node.inputs[1], node.input(3)
    mode = node.attribute("mode", "constant")
    cropped = op.Pad(g, op.Neg(pads), None, axes)
    if mode == "constant":
        value = node.input(2)
        dvalue = (
            op.Sub(op.ReduceSum(g, keepdims=0), op.ReduceSum(cropped, keepdims=0)) if node.differentiates(2) else None
        )
        return cropped, None, op.reshape_like(dvalue, value) if dvalue else None, None
    amounts, which = op.constant(pads), op.constant(axes)
    if amounts is None or (axes and which is None):
        raise Refusal(
            f"Pad in mode '{mode}' by an amount that is computed from the input", "store the padding in the file"
        )
    chosen = [int(axis) % op.rank(x) for axis in which] if which is not None else list(range(op.rank(x)))
    for axis, before, after in zip(chosen, amounts[: len(chosen)], amounts[len(chosen) :], strict=True):
        if before or after:
            identity = _identity(op, x, axis)
            g = axis_map(op, g, axis, op.Pad(identity, [0, int(before), 0, int(after)], mode=mode))
    return g, None, None, None


def _identity(op: Emitter, x: str, axis: int) -> str:
    """The identity matrix of the size of an axis: constant where the size is."""
    shape = op.shape(x)
    if shape is not None and isinstance(size := shape[axis], int):
        return op.array(np.eye(size, dtype=op.numpy_dtype(x)))
    size_twice = op.Concat(op.dim(x, axis), op.dim(x, axis), axis=0)
    return op.EyeLike(op.zeros(size_twice, x))


@rule("Resize")
def resize(op: Emitter, node: Node, g: str) -> Gradients:
    for position, axis in enumerate(_resized_axes(op, node)):
        if not _keeps(op, node, position, axis):
            g = axis_map(op, g, axis, _resized_identity(op, node, position, axis))
    return g, *[None] * (len(node.inputs) - 1)


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
    x = node.inputs[0]
    identity = op.Unsqueeze(_identity(op, x, axis), [0, 1])
    names = ("antialias", "coordinate_transformation_mode", "cubic_coeff_a", "exclude_outside", "mode", "nearest_mode")
    attributes = {name: node.attribute(name) for name in names}
    roi, scales = _roi(op, node, position), node.input(2)
    if scales and ((constant := op.constant(scales)) is None or constant.size):
        scale = op.Concat(np.ones(3, np.float32), op.Gather(scales, [position]), axis=0)
        resized = op.Resize(identity, roi, scale, **attributes)
    else:
        size = op.dim(x, axis)
        resized = op.Resize(
            identity, roi, None, op.Concat([1, 1], size, op.dim(node.outputs[0], axis), axis=0), **attributes
        )
    return op.Squeeze(resized, [0, 1])


def _roi(op: Emitter, node: Node, position: int) -> str | None:
    """The region of interest of one axis, as the last of four; the others are whole."""
    if not _crops(node):
        return None
    roi, count = node.inputs[1], len(_resized_axes(op, node))
    start, end = op.Gather(roi, [position]), op.Gather(roi, [position + count])
    whole = np.zeros(3, op.numpy_dtype(roi))
    return op.Concat(whole, start, whole + 1, end, axis=0)
