"""Operators that choose or order elements by what other inputs, or the elements themselves, say."""

from __future__ import annotations

import numpy as np

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, rule
from explainserve.onnx_vjp.rules.indexing import counted, place


@rule("Compress", since=9)
def compress(op: Emitter, node: Node, g: str) -> Gradients:
    x, condition = node.inputs
    chosen = op.Reshape(op.NonZero(condition), [-1])
    return _placed_back(op, g, x, node.attribute("axis"), chosen), None


@rule("Unique", since=11)
def unique(op: Emitter, node: Node, g: str) -> Gradients:
    """Of equal elements the first is the one that is read."""
    return (_placed_back(op, g, node.inputs[0], node.attribute("axis"), op.output(node, 1)),)


def _placed_back(op: Emitter, g: str, x: str, axis: int | None, positions: str) -> str:
    """The cotangent at `positions` of one axis of x, or of all its elements in a row, and zero elsewhere."""
    if axis is not None:
        return place(op, g, x, axis % op.rank(x), positions, distinct=True)
    return op.reshape_like(place(op, g, op.Reshape(x, [-1]), 0, positions, distinct=True), x)


@rule("OneHot", since=9)
def one_hot(op: Emitter, node: Node, g: str) -> Gradients:
    """Two numbers, off and on, are written all over the output; each one's gradient is the sum over its places."""
    indices, depth, values = node.inputs
    on = op.OneHot(
        indices, depth, op.cast_like(op.array(np.array([0.0, 1.0])), values), axis=node.attribute("axis", -1)
    )
    sums = [op.ReduceSum(op.Mul(g, places), keepdims=0) for places in (op.Sub(1, on), on)]
    return None, None, op.Concat(*(op.Reshape(total, [1]) for total in sums), axis=0)


@rule("ReverseSequence", since=10)
def reverse_sequence(op: Emitter, node: Node, g: str) -> Gradients:
    """Reversing again."""
    batch, time = node.attribute("batch_axis", 1), node.attribute("time_axis", 0)
    return op.ReverseSequence(g, node.inputs[1], batch_axis=batch, time_axis=time), None


@rule("Range", since=11)
def range_(op: Emitter, node: Node, g: str) -> Gradients:
    """y_i = start + i delta; the limit says only how many there are."""
    steps = op.cast_like(counted(op, op.dim(node.outputs[0], 0)), g)
    return op.ReduceSum(g, keepdims=0), None, op.ReduceSum(op.Mul(g, steps), keepdims=0)
