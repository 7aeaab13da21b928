"""Operators that write elements by position: what is overwritten has no gradient, what is written reads its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnx import TensorProto

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, rule
from explainserve.onnx_vjp.rules.indexing import counted, reduced_scatter


@dataclass(frozen=True)
class _Positions:
    """Where a node writes: `write(data, updates, reduction)` as the node does, and `read(data)` of the same places."""

    write: Callable[[str, str, str], str]
    read: Callable[[str], str]


@rule("ScatterElements")
def scatter_elements(op: Emitter, node: Node, g: str) -> Gradients:
    indices, axis = node.inputs[1], node.attribute("axis", 0)
    return _scattered(
        op,
        node,
        g,
        _Positions(
            lambda data, updates, reduction: op.ScatterElements(data, indices, updates, axis=axis, reduction=reduction),
            lambda data: op.GatherElements(data, indices, axis=axis),
        ),
    )


@rule("ScatterND")
def scatter_nd(op: Emitter, node: Node, g: str) -> Gradients:
    indices = node.inputs[1]
    return _scattered(
        op,
        node,
        g,
        _Positions(
            lambda data, updates, reduction: (
                op.ScatterND(data, indices, updates)
                if reduction == "none"
                else reduced_scatter(op, data, indices, updates, reduction)
            ),
            lambda data: op.GatherND(data, indices),
        ),
    )


def _scattered(op: Emitter, node: Node, g: str, positions: _Positions) -> Gradients:
    reduction = node.attribute("reduction", "none")
    if reduction == "add":
        return g, None, positions.read(g)
    if reduction == "mul":
        return _multiplied(op, node, g, positions)
    if reduction in ("max", "min"):
        return _extreme(op, node, g, positions)
    return _overwritten(op, node, g, positions)


def _overwritten(op: Emitter, node: Node, g: str, positions: _Positions) -> Gradients:
    """Of updates to one place the last one stays. Only constant indices are looked through for such: ONNX leaves
    them undefined.
    """
    updates = node.inputs[2]
    taken = positions.read(g)
    if op.constant(node.inputs[1]) is not None:
        order = op.reshape_like(counted(op, op.ReduceProd(op.dims(updates), keepdims=1)), updates)
        places = op.Cast(op.zeros_like(node.inputs[0]), to=TensorProto.INT64)
        last = op.Equal(positions.read(positions.write(places, order, "none")), order)
        if (known := op.constant(last)) is None or not known.all():
            taken = op.Mul(taken, op.mask(last, g))
    return positions.write(g, op.zeros_like(updates), "none"), None, taken


def _multiplied(op: Emitter, node: Node, g: str, positions: _Positions) -> Gradients:
    """The product of the others. With one zero among them only that element has a gradient, with two none has."""
    x, _, updates = node.inputs
    x_zero, update_zero = (op.mask(op.Equal(value, 0), value) for value in (x, updates))
    x_filled, update_filled = (op.Where(op.Equal(value, 0), 1, value) for value in (x, updates))
    zeros = positions.write(x_zero, update_zero, "add")
    product = op.Mul(g, positions.write(x_filled, update_filled, "mul"))
    dx = op.Where(op.Equal(zeros, x_zero), op.Div(product, x_filled), 0)
    dupdates = op.Div(positions.read(product), update_filled)
    return dx, None, op.Where(op.Equal(positions.read(zeros), update_zero), dupdates, 0)


def _extreme(op: Emitter, node: Node, g: str, positions: _Positions) -> Gradients:
    """Tied elements share the gradient evenly, as in torch.scatter_reduce."""
    x, _, updates = node.inputs
    y = node.outputs[0]
    kept = op.mask(op.Equal(x, y), g)
    taken = op.mask(op.Equal(updates, positions.read(y)), g)
    share = op.Div(g, positions.write(kept, taken, "add"))
    return op.Mul(share, kept), None, op.Mul(positions.read(share), taken)


@rule("TensorScatter", since=24)
def tensor_scatter(op: Emitter, node: Node, g: str) -> Gradients:
    """A cache whose stretch of one axis, from a place per batch element on, is replaced by the update."""
    past, update, starts = node.inputs[0], node.inputs[1], node.input(2)
    rank, mode = op.rank(past), node.attribute("mode", "linear")
    axis = node.attribute("axis", -2) % rank
    line = op.Reshape(counted(op, op.dim(update, axis)), [-1 if other == axis else 1 for other in range(rank)])
    if starts:
        line = op.Add(line, op.Reshape(starts, [-1] + [1] * (rank - 1)))
    if mode == "circular":
        line = op.Mod(line, op.dim(past, axis))
    taken = op.GatherElements(g, op.expand_like(line, update), axis=axis)
    return op.TensorScatter(g, op.zeros_like(update), starts or None, mode=mode, axis=axis), taken, None
