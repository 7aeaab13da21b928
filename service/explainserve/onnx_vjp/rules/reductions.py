"""Reductions over axes: the cotangent spreads back over what was reduced."""

from __future__ import annotations

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, rule


def _kept(op: Emitter, node: Node, value: str) -> str:
    """A tensor of the output's shape so that it broadcasts to the input's, as what is reduced over no axes or over all
    does by itself.
    """
    axes = node.input(1)
    return value if node.attribute("keepdims", 1) or not axes else op.Unsqueeze(value, axes)


def _again(op: Emitter, node: Node, operator: str, value: str) -> str:
    """Another reduction of a tensor of the input's shape over the same axes, dimensions kept."""
    return op.emit(
        operator, value, node.input(1), keepdims=1, noop_with_empty_axes=node.attribute("noop_with_empty_axes", 0)
    )[0]


def _spread(op: Emitter, node: Node, g: str, factor: str | None = None) -> Gradients:
    kept = _kept(op, node, g)
    dx = op.Mul(kept, factor) if factor else op.expand_like(kept, node.inputs[0])
    return dx, None


@rule("ReduceSum")
def reduce_sum(op: Emitter, node: Node, g: str) -> Gradients:
    return _spread(op, node, g)


@rule("ReduceMean")
def reduce_mean(op: Emitter, node: Node, g: str) -> Gradients:
    """The number of elements per mean is the ratio of the sizes, whatever the axes are."""
    x, y = node.inputs[0], node.outputs[0]
    count = (
        op.Div(op.ReduceProd(op.dims(x), keepdims=0), op.ReduceProd(op.dims(y), keepdims=0))
        if _sized(op, x, y)
        else _dynamic_count(op, node)
    )
    return _spread(op, node, op.divided(g, count))


def _sized(op: Emitter, *values: str) -> bool:
    return all((shape := op.shape(value)) is not None and all(isinstance(d, int) for d in shape) for value in values)


def _dynamic_count(op: Emitter, node: Node) -> str:
    x = node.inputs[0]
    axes = op.constant(node.input(1))
    if axes is not None and axes.size:
        return op.ReduceProd(op.Concat(*(op.dim(x, int(axis)) for axis in axes.ravel()), axis=0), keepdims=0)
    return op.Div(op.Size(x), op.Size(node.outputs[0]))


@rule("ReduceSumSquare")
def reduce_sum_square(op: Emitter, node: Node, g: str) -> Gradients:
    return _spread(op, node, g, op.Mul(node.inputs[0], 2))


@rule("ReduceL1")
def reduce_l1(op: Emitter, node: Node, g: str) -> Gradients:
    return _spread(op, node, g, op.Sign(node.inputs[0]))


@rule("ReduceL2")
def reduce_l2(op: Emitter, node: Node, g: str) -> Gradients:
    """x / |x|, and zero where the norm is, as in torch."""
    x, norm = node.inputs[0], _kept(op, node, node.outputs[0])
    return _spread(op, node, g, op.Div(x, op.Where(op.Equal(norm, 0), 1, norm)))


@rule("ReduceLogSum")
def reduce_log_sum(op: Emitter, node: Node, g: str) -> Gradients:
    return _spread(op, node, op.Div(g, op.Exp(node.outputs[0])))


@rule("ReduceLogSumExp")
def reduce_log_sum_exp(op: Emitter, node: Node, g: str) -> Gradients:
    return _spread(op, node, g, op.Exp(op.Sub(node.inputs[0], _kept(op, node, node.outputs[0]))))


@rule("ReduceMax", "ReduceMin")
def reduce_extremum(op: Emitter, node: Node, g: str) -> Gradients:
    """Tied elements share the gradient evenly, as in torch.amax."""
    hits = op.mask(op.Equal(node.inputs[0], _kept(op, node, node.outputs[0])), op.widened(g))
    return _spread(op, node, g, op.cast_like(op.Div(hits, _again(op, node, "ReduceSum", hits)), g))


@rule("ReduceProd")
def reduce_prod(op: Emitter, node: Node, g: str) -> Gradients:
    """The product of the others. With one zero among them only that element has a gradient, with two none has."""
    x = node.inputs[0]
    zero = op.Equal(x, 0)
    zeros = _again(op, node, "ReduceSum", op.mask(zero, x))
    filled = op.Where(zero, 1, x)
    rest = op.Div(_again(op, node, "ReduceProd", filled), filled)
    allowed = op.Equal(zeros, op.mask(zero, x))
    return _spread(op, node, g, op.Where(allowed, rest, 0))


@rule("TopK")
def top_k(op: Emitter, node: Node, g: str) -> Gradients:
    x, indices = node.inputs[0], op.output(node, 1)
    return op.ScatterElements(op.zeros_like(x), indices, g, axis=node.attribute("axis", -1)), None
