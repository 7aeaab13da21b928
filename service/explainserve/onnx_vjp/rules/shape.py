"""Operators that move elements without changing them: the gradient moves them back."""

from __future__ import annotations

import numpy as np

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, rule
from explainserve.onnx_vjp.rules.windows import static


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(op: Emitter, node: Node, g: str) -> Gradients:
    return op.reshape_like(g, node.inputs[0]), *[None] * (len(node.inputs) - 1)


@rule("Transpose")
def transpose(op: Emitter, node: Node, g: str) -> Gradients:
    """The inverse permutation; all axes reversed are their own."""
    perm = node.attribute("perm")
    return (op.Transpose(g, perm=perm and [int(axis) for axis in np.argsort(perm)]),)


@rule("Concat")
def concat(op: Emitter, node: Node, g: str) -> Gradients:
    """Every input takes its own stretch of the axis."""
    axis, shapes = node.attribute("axis"), [op.shape(name) for name in node.inputs]
    if len(shapes) == 1:
        return (g,)
    sizes = static([shape[axis] if shape is not None else None for shape in shapes])
    if sizes is None:
        lengths = op.Concat(*(op.Gather(op.Shape(name), [axis]) for name in node.inputs), axis=0)
        return op.emit("Split", g, lengths, outputs=len(shapes), axis=axis)
    wanted = [index for index in range(len(sizes)) if node.differentiates(index)]
    if len(wanted) > 1:
        return op.emit("Split", g, list(sizes), outputs=len(sizes), axis=axis)
    start = sum(sizes[: wanted[0]])
    part = op.Slice(g, [start], [start + sizes[wanted[0]]], [axis])
    return [part if index in wanted else None for index in range(len(sizes))]


@rule("Split", every_output=True)
def split(op: Emitter, node: Node, cotangents: list[str | None]) -> Gradients:
    parts = [g if g is not None else op.zeros_like(name) for g, name in zip(cotangents, node.outputs, strict=True)]
    return op.Concat(*parts, axis=node.attribute("axis", 0)), None


@rule("Tile")
def tile(op: Emitter, node: Node, g: str) -> Gradients:
    """Fold every axis into (repeats, size) and sum over the repeats."""
    x, repeats = node.inputs
    rank = op.rank(x)
    pairs = op.Concat(op.Reshape(repeats, [-1, 1]), op.Reshape(op.dims(x), [-1, 1]), axis=1)
    folded = op.Reshape(g, op.Reshape(pairs, [-1]))
    return op.ReduceSum(folded, list(range(0, 2 * rank, 2)), keepdims=0), None


# The axes of (N, b, b, C, H, W) or (N, C, b, b, H, W), depth split, that the blocks of space come from: (N, C, H,
# b, W, b).
_BLOCKS = {"DCR": [0, 3, 4, 1, 5, 2], "CRD": [0, 1, 4, 2, 5, 3]}


@rule("DepthToSpace")
def depth_to_space(op: Emitter, node: Node, g: str) -> Gradients:
    """Space back to depth."""
    x, block = node.inputs[0], node.attribute("blocksize")
    batch, channels, height, width = (op.dim(x, axis) for axis in range(4))
    blocks = op.Reshape(g, op.Concat(batch, op.Div(channels, [block * block]), height, [block], width, [block], axis=0))
    back = np.argsort(_BLOCKS[node.attribute("mode", "DCR")])
    return (op.reshape_like(op.Transpose(blocks, perm=[int(axis) for axis in back]), x),)


@rule("SpaceToDepth")
def space_to_depth(op: Emitter, node: Node, g: str) -> Gradients:
    return (op.DepthToSpace(g, blocksize=node.attribute("blocksize"), mode=node.attribute("mode", "DCR")),)
