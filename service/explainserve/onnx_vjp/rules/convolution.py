"""Convolutions.

The gradient of a convolution is a transposed convolution with the same kernel, and the other way round.
"""

from __future__ import annotations

import numpy as np

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, Refusal, rule
from explainserve.onnx_vjp.rules.windows import Windows, halves, of_padding, spatial, windows


@rule("Conv")
def conv(op: Emitter, node: Node, g: str) -> Gradients:
    x, kernel = node.inputs[:2]
    view = windows(op, node, kernel_sizes(op, node))
    groups = node.attribute("group", 1)
    dx = _input_gradient(op, g, kernel, x, view, groups) if node.differentiates(0) else None
    dkernel = _kernel_gradient(op, x, g, kernel, view, groups) if node.differentiates(1) else None
    return dx, dkernel, bias_gradient(op, node, g)


def kernel_sizes(op: Emitter, node: Node) -> list[int]:
    """The spatial sizes of the kernel; refused where neither the node nor the kernel's shape tells them."""
    shape = op.shape(node.inputs[1])
    sizes = node.attribute("kernel_shape") or (shape[2:] if shape else [None])
    if not all(isinstance(size, int) for size in sizes):
        raise Refusal("the kernel's size is unknown", "store kernel_shape in the node, or the kernel as an initializer")
    return list(sizes)


def bias_gradient(op: Emitter, node: Node, g: str, position: int = 2) -> str | None:
    """The cotangent summed over all axes but that of the channels; `position` is that of the bias among the inputs."""
    others = [axis for axis in range(op.rank(node.outputs[0])) if axis != 1]
    return op.ReduceSum(g, others, keepdims=0) if node.differentiates(position) else None


def _input_gradient(op: Emitter, g: str, kernel: str, x: str, view: Windows, groups: int) -> str:
    """With stride 1 and a constant kernel a plain convolution, which measures faster than a transposed one."""
    weights, margins = op.constant(kernel), _margins(view)
    if weights is None or margins is None:
        return _transposed(op, g, kernel, x, view, groups)
    return op.Conv(
        g, _flipped(weights, groups), dilations=view.dilations, pads=margins, group=groups, kernel_shape=view.kernel
    )


def _margins(view: Windows) -> list[int] | None:
    """The padding of the convolution in the opposite direction, or None where none does: windows that skip elements,
    padding beyond the kernel, or padding that only the run tells.
    """
    if view.pads is None or any(stride != 1 for stride in view.strides):
        return None
    margins = [span - 1 - pad for span, pad in zip(view.spans * 2, view.pads, strict=True)]
    return None if any(margin < 0 for margin in margins) else margins


def _flipped(weights: np.ndarray, groups: int) -> np.ndarray:
    """The kernel of the opposite direction: (M, C/G, ...) to (C, M/G, ...), reversed along the spatial axes."""
    outputs, inputs, *spatial = weights.shape
    grouped = weights.reshape(groups, outputs // groups, inputs, *spatial).swapaxes(1, 2)
    return np.ascontiguousarray(
        np.flip(grouped.reshape(groups * inputs, outputs // groups, *spatial), tuple(range(2, weights.ndim)))
    )


def _transposed(op: Emitter, g: str, kernel: str, x: str, view: Windows, groups: int) -> str:
    """The transposed convolution that returns to the size of x; what the stride left over is output padding."""
    shared = {"strides": view.strides, "dilations": view.dilations, "group": groups, "kernel_shape": view.kernel}
    missing = op.constant(view.missing(op, x, g))
    if missing is None or view.pads is None:
        largest = [stride - 1 for stride in view.strides]
        return view.cut(op, op.ConvTranspose(g, kernel, output_padding=largest, **shared), x)
    return op.ConvTranspose(g, kernel, pads=view.pads, output_padding=list(missing), **shared)


def _kernel_gradient(op: Emitter, x: str, g: str, kernel: str, view: Windows, groups: int) -> str:
    """A convolution of x with the cotangent as kernel: channels take the place of the batch, strides that of
    dilations.
    """
    axes = view.axes
    padded, pads = view.padded(op, x)
    images = op.Transpose(padded, perm=[1, 0, *axes])
    if groups > 1:
        # (C, N, ...) holds G blocks of C/G channels; the grouped convolution wants (C/G, G N, ...).
        dims = op.dims(images)
        tail = op.Slice(dims, [1], [2 + view.rank])
        blocks = op.Reshape(images, op.Concat([groups, -1], tail, axis=0))
        swapped = op.Transpose(blocks, perm=[1, 0, 2, *(axis + 1 for axis in axes)])
        images = op.Reshape(
            swapped,
            op.Concat(op.Slice(op.Shape(swapped), [0], [1]), [-1], op.Slice(tail, [1], [1 + view.rank]), axis=0),
        )
    cotangents = op.Transpose(g, perm=[1, 0, *axes])
    full = op.Conv(images, cotangents, strides=view.dilations, dilations=view.strides, pads=pads, group=groups)
    exact = op.Slice(full, [0] * view.rank, list(view.kernel), axes)
    return op.reshape_like(op.Transpose(exact, perm=[1, 0, *axes]), kernel)


@rule("ConvTranspose")
def conv_transpose(op: Emitter, node: Node, g: str) -> Gradients:
    """The convolution whose input gradient this is: it reads the cotangent, padded by what was cropped, and its kernel
    has the same gradient with x as the cotangent.
    """
    x, kernel = node.inputs[:2]
    view, groups = _transposed_windows(op, node), node.attribute("group", 1)
    dx = _convolved(op, node, g, view) if node.differentiates(0) else None
    dkernel = _kernel_gradient(op, g, x, kernel, view, groups) if node.differentiates(1) else None
    return dx, dkernel, bias_gradient(op, node, g)


def _convolved(op: Emitter, node: Node, g: str, view: Windows) -> str:
    x, kernel = node.inputs[:2]
    padded, pads = view.padded(op, g)
    shared = {"strides": view.strides, "dilations": view.dilations, "kernel_shape": view.kernel}
    dx = op.Conv(padded, kernel, pads=pads, group=node.attribute("group", 1), **shared)
    if not any(pads) and not any(node.attribute("output_padding") or []):
        return dx
    # Output padding can leave room for one more window than there are inputs.
    return op.Slice(dx, [0] * view.rank, spatial(op, x), view.axes)


def _transposed_windows(op: Emitter, node: Node) -> Windows:
    """The padding crops the output; where output_shape or auto_pad are given, it follows from them."""
    sizes = kernel_sizes(op, node)
    rank = len(sizes)
    mode, wanted = node.attribute("auto_pad", "NOTSET"), node.attribute("output_shape")
    if wanted is None and not mode.startswith("SAME"):
        return windows(op, node, sizes)
    strides, dilations = node.attribute("strides") or [1] * rank, node.attribute("dilations") or [1] * rank
    spans = [dilation * (size - 1) + 1 for size, dilation in zip(sizes, dilations, strict=True)]
    extra = node.attribute("output_padding") or [0] * rank
    # One window after the last stride, less the strides before it, which SAME keeps.
    total = op.array(np.array(extra) + np.array(spans) - np.array(strides))
    if wanted is not None:
        full = op.Add(op.Mul(spatial(op, node.inputs[0]), list(strides)), total)
        total = op.Sub(full, list(wanted[-rank:]))
    before, after = halves(op, op.Max(total, op.array(np.zeros(rank, np.int64))), mode)
    return of_padding(op, sizes, strides, dilations, before, after)


@rule("Col2Im")
def col2im(op: Emitter, node: Node, g: str) -> Gradients:
    """Blocks that were added up at their places in the image are read there again: a convolution of each channel with
    one kernel per position of the block, which is one there and zero elsewhere.
    """
    x, _, block = node.inputs
    size = op.ReduceProd(block, keepdims=1)
    kernels = op.Reshape(op.EyeLike(op.zeros(op.Concat(size, size, axis=0), x)), op.Concat([-1, 1], block, axis=0))
    images = op.Reshape(g, op.Concat([-1, 1], spatial(op, g), axis=0))
    geometry = {name: node.attribute(name) for name in ("dilations", "pads", "strides")}
    return op.reshape_like(op.Conv(images, kernels, **geometry), x), None, None
