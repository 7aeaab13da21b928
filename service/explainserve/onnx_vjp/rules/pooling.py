"""Pooling: each window hands its cotangent back to what it chose or averaged."""

from __future__ import annotations

from functools import reduce

import numpy as np
from onnx import TensorProto

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, rule
from explainserve.onnx_vjp.rules.indexing import counted
from explainserve.onnx_vjp.rules.windows import Windows, spatial, static, windows


@rule("MaxPool")
def max_pool(op: Emitter, node: Node, g: str) -> Gradients:
    """Indices count over the whole tensor and name the first maximum of each window, as in torch; windows that share
    one add up.
    """
    return (unpooled(op, node, g),)


def unpooled(op: Emitter, node: Node, g: str) -> str:
    """`g`, of the output's shape, added to zeros of the input's shape at the maxima of a MaxPool."""
    x = node.inputs[0]
    positions = op.Reshape(_indices(op, node), [-1])
    # onnxruntime's CPU provider has no such sums in sixteen bits; and inference writes out a vector that is cast.
    wide = op.Reshape(op.widened(g), [-1])
    blank = op.zeros(op.Reshape(op.Size(x), [1]), wide)
    summed = op.ScatterElements(blank, positions, wide, axis=0, reduction="add")
    return op.cast_like(op.reshape_like(summed, x), g)


@rule("MaxUnpool")
def max_unpool(op: Emitter, node: Node, g: str) -> Gradients:
    """Every element went to its place in the flattened output."""
    return op.Gather(op.Reshape(g, [-1]), node.inputs[1], axis=0), *[None] * (len(node.inputs) - 1)


def _indices(op: Emitter, node: Node) -> str:
    """The operator's own indices; where they count in column-major order, those of a second pooling that does not."""
    if not node.attribute("storage_order", 0):
        return op.output(node, 1)
    names = ("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")
    return op.emit("MaxPool", node.inputs[0], outputs=2, **{name: node.attribute(name) for name in names})[1]


@rule("AveragePool")
def average_pool(op: Emitter, node: Node, g: str) -> Gradients:
    view = windows(op, node, node.attribute("kernel_shape"))
    return (_spread_windows(op, _shares(op, node, g, view), node.inputs[0], view),)


def _shares(op: Emitter, node: Node, g: str, view: Windows) -> str:
    """The cotangent divided by how many elements each window averaged."""
    counted_padding, ceiled = node.attribute("count_include_pad", 0), node.attribute("ceil_mode", 0)
    if not ceiled and (counted_padding or not any(view.pads or (1,))):
        return op.Mul(g, 1 / float(np.prod(view.kernel)))
    low = op.Neg(view.before) if counted_padding else op.Sub(view.before, view.before)
    high = op.Add(spatial(op, node.inputs[0]), view.after) if counted_padding else spatial(op, node.inputs[0])
    lengths = [_lengths(op, view, axis, op.dim(g, 2 + axis), low, high) for axis in range(view.rank)]
    return op.divided(g, reduce(op.Mul, lengths))


def _lengths(op: Emitter, view: Windows, axis: int, count: str, low: str, high: str) -> str:
    """Per window of one axis, how many of its positions lie in [low, high), aligned with that axis."""
    starts = op.Sub(op.Mul(counted(op, count), [view.strides[axis]]), op.Gather(view.before, [axis]))
    steps = np.arange(view.kernel[axis]) * view.dilations[axis]
    positions = op.Add(op.Unsqueeze(starts, [1]), steps)
    inside = op.And(op.GreaterOrEqual(positions, op.Gather(low, [axis])), op.Less(positions, op.Gather(high, [axis])))
    length = op.ReduceSum(op.Cast(inside, to=TensorProto.INT64), [1], keepdims=0)
    return op.Reshape(length, [-1 if other == axis else 1 for other in range(view.rank)])


def _spread_windows(op: Emitter, shares: str, x: str, view: Windows) -> str:
    """Add each window's share to all of its positions: a transposed convolution with ones, one channel at a time."""
    images = op.Reshape(shares, op.Concat([-1, 1], spatial(op, shares), axis=0))
    if view.kernel == view.strides and max(view.dilations) == 1:
        full = _tiled(op, images, view)
    else:
        ones = np.ones((1, 1, *view.kernel), op.numpy_dtype(x))
        full = op.ConvTranspose(images, ones, strides=view.strides, dilations=view.dilations, kernel_shape=view.kernel)
    return op.reshape_like(view.placed(op, full, x), x)


def _tiled(op: Emitter, images: str, view: Windows) -> str:
    """Windows that neither overlap nor leave gaps: every share is repeated over its window, as measures fastest."""
    repeats = op.array(np.array([1, 1, *view.kernel], np.float32))
    return op.Resize(images, None, repeats, coordinate_transformation_mode="asymmetric", nearest_mode="floor")


@rule("GlobalAveragePool")
def global_average_pool(op: Emitter, node: Node, g: str) -> Gradients:
    x, y = node.inputs[0], node.outputs[0]
    shape = op.shape(x)
    sizes = static(shape[2:]) if shape is not None else None
    count = op.array(np.array(np.prod(sizes))) if sizes is not None else op.Div(op.Size(x), op.Size(y))
    return (op.expand_like(op.divided(g, count), x),)


@rule("GlobalMaxPool")
def global_max_pool(op: Emitter, node: Node, g: str) -> Gradients:
    """The first maximum of each channel takes the whole cotangent."""
    x = node.inputs[0]
    rows = op.Reshape(x, [0, 0, -1])
    first = op.ArgMax(rows, axis=2, keepdims=1)
    flat = op.Reshape(g, [0, 0, 1])
    return (op.reshape_like(op.ScatterElements(op.zeros_like(rows), first, flat, axis=2), x),)


@rule("GlobalLpPool")
def global_lp_pool(op: Emitter, node: Node, g: str) -> Gradients:
    """y = (sum |x|^p)^(1/p), so dx = g sign(x) (|x| / y)^(p-1), zero where y is."""
    x, y = node.inputs[0], node.outputs[0]
    shares = op.Div(x, op.Where(op.Equal(y, 0), 1, y))
    return (op.Mul(g, _power_slope(op, shares, float(node.attribute("p", 2)))),)


@rule("LpPool")
def lp_pool(op: Emitter, node: Node, g: str) -> Gradients:
    """y = (sum |x|^p)^(1/p), so dx = sign(x) |x|^(p-1) * (sum over windows of g y^(1-p))."""
    x, p = node.inputs[0], float(node.attribute("p", 2))
    view = windows(op, node, node.attribute("kernel_shape"))
    shares = op.Mul(g, _norm_slope(op, node.outputs[0], p))
    return (op.Mul(_power_slope(op, x, p), _spread_windows(op, shares, x, view)),)


def _power_slope(op: Emitter, x: str, p: float) -> str:
    """sign(x) |x|^(p-1)."""
    return x if p == 2 else op.Sign(x) if p == 1 else op.Mul(op.Sign(x), op.Pow(op.Abs(x), p - 1))


def _norm_slope(op: Emitter, y: str, p: float) -> str:
    """y^(1-p), zero where y is."""
    safe = op.Where(op.Equal(y, 0), 1, y)
    return op.Where(op.Equal(y, 0), 0, op.Pow(safe, 1 - p))
