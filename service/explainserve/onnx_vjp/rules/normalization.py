"""Softmax and the normalizations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, composition, rule


@rule("Softmax", since=13)
def softmax(op: Emitter, node: Node, g: str) -> Gradients:
    """dx = y (g - sum(g y)).

    A row that is masked as a whole is NaN. Where attention replaces such rows afterwards, nothing flows through them.
    """
    y, axis = node.outputs[0], node.attribute("axis", -1)
    if _is_replaced_in_part(op, y):
        y = op.Where(op.IsNaN(y), 0, y)
    return (op.Mul(y, op.Sub(g, op.ReduceSum(op.Mul(g, y), [axis], keepdims=1))),)


def _is_replaced_in_part(op: Emitter, value: str) -> bool:
    """Whether a Where chooses between the value, perhaps in another type, and something else."""
    names = {value}
    for node in op.graph.nodes:
        if node.op_type in ("Cast", "CastLike", "Identity") and node.input[0] in names:
            names.add(node.output[0])
        elif node.op_type == "Where" and names.intersection(node.input[1:]):
            return True
    return False


@rule("LogSoftmax", since=13)
def log_softmax(op: Emitter, node: Node, g: str) -> Gradients:
    """dx = g - exp(y) sum(g)."""
    y, axis = node.outputs[0], node.attribute("axis", -1)
    return (op.Sub(g, op.Mul(op.Exp(y), op.ReduceSum(g, [axis], keepdims=1))),)


@rule("BatchNormalization", every_output=True)
def batch_normalization(op: Emitter, node: Node, cotangents: list[str | None]) -> Gradients:
    """y = scale (x - mean) / sqrt(var + epsilon) + bias per channel: by stored statistics or, in training, by those of
    the batch.
    """
    if node.attribute("training_mode", 0):
        return _normalized_by_batch(op, node, cotangents)
    return _normalized_as_stored(op, node, str(cotangents[0]))


def _normalized_as_stored(op: Emitter, node: Node, g: str) -> Gradients:
    """An affine map per channel."""
    x, scale, bias, mean, variance = node.inputs
    inverse = op.Reciprocal(op.Sqrt(op.Add(variance, node.attribute("epsilon", 1e-5))))
    slope = op.Mul(op.cast_like(scale, inverse), inverse)
    dx = op.Mul(g, _per_channel(op, op.cast_like(slope, g), x))
    if not any(node.differentiates(index) for index in range(1, 5)):
        return dx, None, None, None, None
    others = _all_but_channels(op, x)
    g, x = op.cast_like(g, inverse), op.cast_like(x, inverse)
    total = op.ReduceSum(g, others, keepdims=0)
    moment = op.ReduceSum(op.Mul(g, op.Sub(x, _per_channel(op, mean, x))), others, keepdims=0)
    dscale, dmean = op.Mul(moment, inverse), op.Neg(op.Mul(total, slope))
    dvariance = op.Mul(op.Mul(op.Mul(moment, slope), op.Mul(inverse, inverse)), -0.5)
    return dx, op.cast_like(dscale, scale), op.cast_like(total, bias), dmean, dvariance


def _normalized_by_batch(op: Emitter, node: Node, cotangents: list[str | None]) -> Gradients:
    """The statistics that are returned besides are momentum times the stored ones plus 1 - momentum times the batch's
    mean and variance, whose slopes over the n elements of a channel are 1 / n and 2 (x - mean) / n.
    """
    (g, dmean, dvariance), (x, scale, bias, mean, _) = (*cotangents, None, None)[:3], node.inputs
    momentum, wide, others = node.attribute("momentum", 0.9), op.cast_like(x, mean), _all_but_channels(op, x)
    normal, inverse = _statistics(op, wide, others, node.attribute("epsilon", 1e-5))
    count = op.ReduceProd(op.Gather(op.dims(x), others), keepdims=0)
    parts, dscale, dbias = [], None, None
    if g is not None:
        g = op.cast_like(g, mean)
        weighted = op.Mul(g, _per_channel(op, op.cast_like(scale, mean), x))
        parts.append(_standardized(op, weighted, normal, inverse, others))
        dscale = op.cast_like(op.ReduceSum(op.Mul(g, normal), others, keepdims=0), scale)
        dbias = op.cast_like(op.ReduceSum(g, others, keepdims=0), bias)
    if dmean is not None:
        share = op.Mul(op.divided(dmean, count), 1 - momentum)
        parts.append(op.expand_like(_per_channel(op, share, x), wide))
        dmean = op.Mul(dmean, momentum)
    if dvariance is not None:
        share = op.Mul(op.divided(dvariance, count), 2 * (1 - momentum))
        parts.append(op.Mul(_per_channel(op, share, x), op.Div(normal, inverse)))
        dvariance = op.Mul(dvariance, momentum)
    return op.cast_like(reduce(op.Add, parts), x), dscale, dbias, dmean, dvariance


def _all_but_channels(op: Emitter, x: str) -> list[int]:
    return [axis for axis in range(op.rank(x)) if axis != 1]


def _per_channel(op: Emitter, vector: str, x: str) -> str:
    """A vector over channels, broadcastable to x of shape (N, C, ...)."""
    trailing = op.rank(x) - 2
    return op.Unsqueeze(vector, list(range(1, trailing + 1))) if trailing > 0 else vector


def _standardized(op: Emitter, g: str, normal: str, inverse: str, axes: list[int]) -> str:
    """The gradient through normal = (x - mean(x)) / sqrt(var(x) + epsilon): inverse (g - mean(g) - normal mean(g
    normal)).
    """
    mean = op.ReduceMean(g, axes, keepdims=1)
    along = op.ReduceMean(op.Mul(g, normal), axes, keepdims=1)
    return op.Mul(op.Sub(op.Sub(g, mean), op.Mul(normal, along)), inverse)


def _statistics(op: Emitter, x: str, axes: list[int], epsilon: float) -> tuple[str, str]:
    """x standardized over the axes, and the inverse standard deviation."""
    centered, variance = _centered(op, x, axes)
    inverse = op.Reciprocal(op.Sqrt(op.Add(variance, epsilon)))
    return op.cast_like(op.Mul(centered, inverse), x), op.cast_like(inverse, x)


def _centered(op: Emitter, x: str, axes: list[int]) -> tuple[str, str]:
    """x less its mean over the axes, and the variance: both in float32 where x is shorter."""
    wide = op.widened(x)
    centered = op.Sub(wide, op.ReduceMean(wide, axes, keepdims=1))
    return centered, op.ReduceMean(op.Mul(centered, centered), axes, keepdims=1)


@rule("LayerNormalization", every_output=True, since=17)
def layer_normalization(op: Emitter, node: Node, cotangents: list[str | None]) -> Gradients:
    """The operator's own mean and inverse deviation are switched on as outputs and used again."""
    (x, scale), g = node.inputs[:2], cotangents[0]
    axis = node.attribute("axis", -1)
    axes = list(range(axis, 0 if axis < 0 else op.rank(x)))
    wide = op.widened(x)
    mean, inverse = (op.cast_like(op.output(node, index), wide) for index in (1, 2))
    normal, inverse = (op.cast_like(value, x) for value in (op.Mul(op.Sub(wide, mean), inverse), inverse))
    parts = [_statistics_gradient(op, x, normal, inverse, axes, cotangents)]
    if g is None:
        return parts[0], None, None
    parts.append(_standardized(op, op.Mul(g, scale), normal, inverse, axes))
    dscale = op.sum_to(op.Mul(g, normal), scale) if node.differentiates(1) else None
    dbias = op.sum_to(g, node.inputs[2]) if node.differentiates(2) else None
    return reduce(op.Add, filter(None, parts)), dscale, dbias


def _statistics_gradient(
    op: Emitter, x: str, normal: str, inverse: str, axes: list[int], cotangents: list[str | None]
) -> str | None:
    """Over the n elements of a row, d mean / dx = 1 / n and d inverse / dx = -inverse^2 normal / n."""
    _, dmean, dinverse = (*cotangents, None, None)[:3]
    parts = []
    if dmean is not None:
        parts.append(op.expand_like(op.cast_like(dmean, x), x))
    if dinverse is not None:
        parts.append(op.Neg(op.Mul(op.Mul(op.cast_like(dinverse, x), op.Mul(inverse, inverse)), normal)))
    if not parts:
        return None
    return op.divided(reduce(op.Add, parts), op.ReduceProd(op.Gather(op.dims(x), axes), keepdims=0))


@rule("InstanceNormalization")
def instance_normalization(op: Emitter, node: Node, g: str) -> Gradients:
    x, scale, _ = node.inputs
    axes = list(range(2, op.rank(x)))
    normal, inverse = _statistics(op, x, axes, node.attribute("epsilon", 1e-5))
    dx = _standardized(op, op.Mul(g, _per_channel(op, scale, x)), normal, inverse, axes)
    return dx, op.ReduceSum(op.Mul(g, normal), [0, *axes], keepdims=0), op.ReduceSum(g, [0, *axes], keepdims=0)


@rule("GroupNormalization", since=18)
def group_normalization_18(op: Emitter, node: Node, g: str) -> Gradients:
    """Scale and bias per group (deprecated form)."""
    return _group_normalization(op, node, g, per_group=True)


@rule("GroupNormalization", since=21)
def group_normalization_21(op: Emitter, node: Node, g: str) -> Gradients:
    """Scale and bias per channel."""
    return _group_normalization(op, node, g, per_group=False)


def _group_normalization(op: Emitter, node: Node, g: str, per_group: bool) -> Gradients:
    x, scale, _ = node.inputs
    groups = node.attribute("num_groups")
    grouped = np.array([0, groups, -1], np.int64)
    rows, cotangent = op.Reshape(x, grouped), op.Reshape(g, grouped)
    normal, inverse = _statistics(op, rows, [2], node.attribute("epsilon", 1e-5))
    if per_group:
        weighted = op.Mul(cotangent, op.Unsqueeze(scale, [1]))
        dscale, dbias = (op.ReduceSum(value, [0, 2], keepdims=0) for value in (op.Mul(cotangent, normal), cotangent))
    else:
        weighted = op.Reshape(op.Mul(g, _per_channel(op, scale, x)), grouped)
        others = _all_but_channels(op, x)
        dscale = op.ReduceSum(op.Mul(g, op.reshape_like(normal, x)), others, keepdims=0)
        dbias = op.ReduceSum(g, others, keepdims=0)
    return op.reshape_like(_standardized(op, weighted, normal, inverse, [2]), x), dscale, dbias


@rule("LpNormalization")
def lp_normalization(op: Emitter, node: Node, g: str) -> Gradients:
    """y = x / |x|_p along an axis, so dx = (g - u sum(g y)) / |x|_p with u the gradient of the norm: sign(x) or y.

    A row of zeros stays zeros and has no gradient.
    """
    x, y, axis = node.inputs[0], node.outputs[0], node.attribute("axis", -1)
    euclidean = node.attribute("p", 2) == 2
    norm = (op.ReduceL2 if euclidean else op.ReduceL1)(x, [axis], keepdims=1)
    along = op.ReduceSum(op.Mul(g, y), [axis], keepdims=1)
    dx = op.Div(op.Sub(g, op.Mul(y if euclidean else op.Sign(x), along)), norm)
    return (op.Where(op.Equal(norm, 0), 0, dx),)


@composition("MeanVarianceNormalization", since=9)
def mean_variance_normalization(op: Emitter, node: Node) -> Sequence[str | None]:
    """(x - mean) / (deviation + 1e-9); onnx's own function has it for float32 only."""
    centered, variance = _centered(op, node.inputs[0], node.attribute("axes", [0, 2, 3]))
    return (op.cast_like(op.Div(centered, op.Add(op.Sqrt(variance), 1e-9)), node.inputs[0]),)


@rule("LRN")
def local_response_normalization(op: Emitter, node: Node, g: str) -> Gradients:
    """y = x s^-beta with s = bias + alpha A(x^2), where A averages over neighbouring channels, so
    dx = g s^-beta - 2 alpha beta x A'(g x s^(-beta-1)). For an even size A reaches further after than before; A' is A
    with both exchanged.
    """
    x, g, size = op.widened(node.inputs[0]), op.widened(g), node.attribute("size")
    alpha, beta, bias = node.attribute("alpha", 1e-4), node.attribute("beta", 0.75), node.attribute("bias", 1.0)
    before, after = (size - 1) // 2, size // 2
    s = op.Add(op.Mul(_over_channels(op, op.Mul(x, x), before, after), alpha), bias)
    scaled = op.Mul(g, op.Pow(s, -beta))
    along = _over_channels(op, op.Div(op.Mul(scaled, x), s), after, before)
    return (op.cast_like(op.Sub(scaled, op.Mul(op.Mul(x, along), 2 * alpha * beta)), node.inputs[0]),)


def _over_channels(op: Emitter, value: str, before: int, after: int) -> str:
    """The average over a channel and its neighbours, zero beyond the first and the last."""
    columns = op.Reshape(value, op.Concat([0, 1], op.dim(value, 1), [-1], axis=0))
    size = [1 + before + after, 1]
    averaged = op.AveragePool(columns, kernel_shape=size, pads=[before, 0, after, 0], count_include_pad=1)
    return op.reshape_like(averaged, value)
