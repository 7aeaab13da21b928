"""Convolutions.

The gradient of a convolution is a transposed convolution with the same kernel, and the other way round.
"""

from __future__ import annotations

import numpy as np

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, Refusal, rule
from explainserve.onnx_vjp.rules.windows import Windows, static, windows


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
    weights = op.constant(kernel)
    margins = [span - 1 - pad for span, pad in zip(view.spans * 2, view.before + view.after, strict=True)]
    if weights is None or any(stride != 1 for stride in view.strides) or min(margins) < 0:
        return _transposed(op, g, kernel, x, view, groups)
    return op.Conv(
        g, _flipped(weights, groups), dilations=view.dilations, pads=margins, group=groups, kernel_shape=view.kernel
    )


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
    if view.sizes is not None and view.counts is not None:
        missing = [
            _missing(*axis)
            for axis in zip(view.sizes, view.counts, view.strides, view.spans, view.before, view.after, strict=True)
        ]
        return op.ConvTranspose(g, kernel, pads=view.before + view.after, output_padding=missing, **shared)
    largest = [stride - 1 for stride in view.strides]
    full = op.ConvTranspose(g, kernel, pads=view.before + view.after, output_padding=largest, **shared)
    axes = list(range(2, 2 + view.rank))
    return op.Slice(full, [0] * view.rank, op.Gather(op.dims(x), axes), axes)


def _missing(size: int, count: int, stride: int, span: int, before: int, after: int) -> int:
    return size - ((count - 1) * stride + span - before - after)


def _kernel_gradient(op: Emitter, x: str, g: str, kernel: str, view: Windows, groups: int) -> str:
    """A convolution of x with the cotangent as kernel: channels take the place of the batch, strides that of
    dilations.
    """
    spatial = list(range(2, 2 + view.rank))
    images = op.Transpose(x, perm=[1, 0, *spatial])
    if groups > 1:
        # (C, N, ...) holds G blocks of C/G channels; the grouped convolution wants (C/G, G N, ...).
        dims = op.dims(images)
        tail = op.Slice(dims, [1], [2 + view.rank])
        blocks = op.Reshape(images, op.Concat([groups, -1], tail, axis=0))
        swapped = op.Transpose(blocks, perm=[1, 0, 2, *(axis + 1 for axis in spatial)])
        images = op.Reshape(
            swapped,
            op.Concat(op.Slice(op.Shape(swapped), [0], [1]), [-1], op.Slice(tail, [1], [1 + view.rank]), axis=0),
        )
    cotangents = op.Transpose(g, perm=[1, 0, *spatial])
    full = op.Conv(
        images, cotangents, strides=view.dilations, dilations=view.strides, pads=view.before + view.after, group=groups
    )
    exact = op.Slice(full, [0] * view.rank, list(view.kernel), spatial)
    return op.reshape_like(op.Transpose(exact, perm=[1, 0, *spatial]), kernel)


@rule("ConvTranspose")
def conv_transpose(op: Emitter, node: Node, g: str) -> Gradients:
    """The output's margin, as the padding left it, is where the convolution back starts and ends."""
    if node.differentiates(1):
        raise Refusal("the kernel of ConvTranspose depends on a differentiated tensor", "use constant kernels")
    x, kernel = node.inputs[:2]
    sizes = kernel_sizes(op, node)
    rank = len(sizes)
    strides, dilations = node.attribute("strides") or [1] * rank, node.attribute("dilations") or [1] * rank
    pads = _transpose_pads(op, node, sizes, strides, dilations)
    dx = op.Conv(
        g, kernel, strides=strides, dilations=dilations, pads=pads, group=node.attribute("group", 1), kernel_shape=sizes
    )
    if any(pads) or any(node.attribute("output_padding") or []):
        # Output padding can leave room for one more window than there are inputs.
        axes = list(range(2, 2 + rank))
        dx = op.Slice(dx, [0] * rank, op.Gather(op.dims(x), axes), axes)
    return dx, None, bias_gradient(op, node, g)


def _transpose_pads(op: Emitter, node: Node, sizes: list[int], strides: list[int], dilations: list[int]) -> list[int]:
    """The padding that crops the output, derived from output_shape or auto_pad where they are given."""
    rank = len(sizes)
    mode, wanted = node.attribute("auto_pad", "NOTSET"), node.attribute("output_shape")
    if wanted is None and not mode.startswith("SAME"):
        return list(node.attribute("pads") or [0] * 2 * rank)
    shape, extra = op.shape(node.inputs[0]), node.attribute("output_padding") or [0] * rank
    counts = static(shape[2:]) if shape is not None else None
    if counts is None:
        raise Refusal("ConvTranspose crops to an unknown size", "fix the spatial sizes, or export explicit pads")
    targets = wanted[-rank:] if wanted else [count * stride for count, stride in zip(counts, strides, strict=True)]
    spans = [dilation * (size - 1) + 1 for size, dilation in zip(sizes, dilations, strict=True)]
    totals = [
        stride * (count - 1) + added + span - target
        for stride, count, added, span, target in zip(strides, counts, extra, spans, targets, strict=True)
    ]
    totals = [max(total, 0) for total in totals]
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return small + large if mode == "SAME_UPPER" else large + small
