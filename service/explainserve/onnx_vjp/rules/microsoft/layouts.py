"""Operators on images whose channels onnxruntime laid out otherwise: last (NHWC), or in blocks (NCHWc).

In blocks, channels are filled up with zeros to a multiple of the block, whose size depends on the processor. Tensors
keep four axes, so elements of a blocked tensor are not where its shape says. All of its domain is therefore undone at
once, along the path and beside it: between operators that block and unblock, everything works element by element.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import composition, refused
from explainserve.onnx_vjp.rules.microsoft.activations import DOMAIN
from explainserve.onnx_vjp.rules.microsoft.products import conv_sum_activation

BLOCKED = "com.microsoft.nchwc"
BLOCK_SIZE = f"{BLOCKED}.block_size"
"""Key of a model's metadata that states the size of a block; without it weights are laid out plainly at every run."""

_LARGEST_BLOCK = 64

# -- channels last
# -------------------------------------------------------------------------------------------------------------


@composition("NhwcConv", "NhwcFusedConv", domain=DOMAIN)
def nhwc_conv(op: Emitter, node: Node) -> Sequence[str]:
    """The kernel is laid out as everywhere."""
    x, kernel, bias, addend = (node.input(index) for index in range(4))
    addend = channels_first(op, addend) if addend else ""
    return (channels_last(op, conv_sum_activation(op, node, channels_first(op, x), kernel, bias, addend)),)


@composition("NhwcMaxPool", domain=DOMAIN)
def nhwc_max_pool(op: Emitter, node: Node) -> Sequence[str]:
    return (channels_last(op, _pooled(op, node, "MaxPool", channels_first(op, node.inputs[0]))),)


def channels_first(op: Emitter, x: str) -> str:
    """(N, ..., C) to (N, C, ...)."""
    rank = op.rank(x)
    return op.Transpose(x, perm=[0, rank - 1, *range(1, rank - 1)])


def channels_last(op: Emitter, x: str) -> str:
    """(N, C, ...) to (N, ..., C)."""
    return op.Transpose(x, perm=[0, *range(2, op.rank(x)), 1])


_POOLING = ("auto_pad", "ceil_mode", "count_include_pad", "dilations", "kernel_shape", "pads", "strides")


def _pooled(op: Emitter, node: Node, operator: str, x: str) -> str:
    return op.emit(operator, x, **{name: node.attribute(name) for name in _POOLING})[0]


refused(
    *("AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "DepthToSpace", "GlobalAveragePool"),
    *("GlobalLpPool", "GlobalMaxPool", "GridSample", "InstanceNormalization", "LRN", "LpPool", "MaxPool", "MaxUnpool"),
    *("QLinearAveragePool", "QLinearConv", "QLinearConvTranspose", "Resize", "SpaceToDepth"),
    reason="it is laid out for one device",
    remedy="explain the model as it was before it was compiled for the device",
    domain="com.ms.internal.nhwc",
)

# -- channels in blocks
# -------------------------------------------------------------------------------------------------------------


@composition("ReorderInput", domain=BLOCKED, everywhere=True)
def reorder_input(op: Emitter, node: Node) -> Sequence[str]:
    """What remains of blocking is the zeros that fill up the channels."""
    x = node.inputs[0]
    image = channels_first(op, x) if node.attribute("channels_last", 0) else x
    shape = op.shape(image)
    if shape is not None and isinstance(channels := shape[1], int) and channels % _LARGEST_BLOCK == 0:
        return (op.Identity(image),)
    size = op.dim(image, 1)
    missing = op.Mod(op.Neg(size), _block(op))
    dims = op.dims(image)
    zeros = op.zeros(op.Concat(op.Slice(dims, [0], [1]), missing, op.Slice(dims, [2], [4]), axis=0), image)
    return (op.Concat(image, zeros, axis=1),)


@composition("ReorderOutput", domain=BLOCKED, everywhere=True)
def reorder_output(op: Emitter, node: Node) -> Sequence[str]:
    """Without the zeros that filled up the channels."""
    x, channels = node.inputs[0], node.attribute("channels", 0)
    image = op.Slice(x, [0], [channels], [1]) if channels else op.Identity(x)
    return (channels_last(op, image) if node.attribute("channels_last", 0) else image,)


@composition("Conv", domain=BLOCKED, everywhere=True)
def blocked_conv(op: Emitter, node: Node) -> Sequence[str]:
    x, kernel, bias, addend = (node.input(index) for index in range(4))
    return (conv_sum_activation(op, node, x, _unblocked(op, node, kernel), bias, addend),)


@composition("AveragePool", "MaxPool", domain=BLOCKED, everywhere=True)
def blocked_pool(op: Emitter, node: Node) -> Sequence[str]:
    return (_pooled(op, node, node.proto.op_type, node.inputs[0]),)


@composition("GlobalAveragePool", "GlobalMaxPool", domain=BLOCKED, everywhere=True)
def blocked_global_pool(op: Emitter, node: Node) -> Sequence[str]:
    return op.emit(node.proto.op_type, node.inputs[0])


@composition("Upsample", domain=BLOCKED, everywhere=True)
def blocked_upsample(op: Emitter, node: Node) -> Sequence[str]:
    """By whole factors."""
    scales = np.array(node.attribute("scales"), np.float32)
    mode = node.attribute("coordinate_transformation_mode", "asymmetric")
    attributes = {"coordinate_transformation_mode": mode, "mode": node.attribute("mode", "nearest")}
    return (op.Resize(node.inputs[0], None, op.array(scales), nearest_mode="floor", **attributes),)


def _unblocked(op: Emitter, node: Node, kernel: str) -> str:
    """(M / b, C / c, height, width, c, b) in the shape (M, C, height, width) that the file states; c is b, or 1 where
    there are fewer input channels than fit into a block.

    All of this is constant where the size of a block is, which the file does not state.
    """
    outputs, inputs, *sizes = op.shape(kernel) or ()
    block = _block(op)
    one = op.array(np.ones(1, np.int64))
    inner = op.Where(op.Less(op.array(np.array([inputs], np.int64)), block), one, block)
    dims = op.Concat(op.Div([outputs], block), op.Div([inputs], inner), list(sizes), inner, block, axis=0)
    parts = op.Transpose(op.Reshape(kernel, dims), perm=[0, 5, 1, 4, 2, 3])
    return op.Reshape(parts, [outputs, inputs, *sizes])


def _block(op: Emitter) -> str:
    """The size of a block, of shape (1,): stated by the model, or the distance at which the second column follows the
    first where the runtime blocks an image.
    """
    stated = next((entry.value for entry in op.graph.proto.metadata_props if entry.key == BLOCK_SIZE), None)
    if stated is not None:
        return op.array(np.array([int(stated)], np.int64))
    image = np.arange(2 * _LARGEST_BLOCK, dtype=np.float32).reshape(1, _LARGEST_BLOCK, 1, 2)
    (blocked,) = op.emit("ReorderInput", op.array(image), domain=BLOCKED)
    second = op.Equal(op.Reshape(blocked, [-1]), np.array(1, np.float32))
    return op.Reshape(op.ArgMax(op.Cast(second, to=TensorProto.FLOAT), axis=0), [1])
