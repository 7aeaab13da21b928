"""Normalizations, with the sums that onnxruntime fused into them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
from onnx import TensorProto, helper

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import composition
from explainserve.onnx_vjp.rules.microsoft.activations import DOMAIN, silu


def rms_normalized(op: Emitter, x: str, scale: str, epsilon: float, axes: Sequence[int] = (-1,)) -> tuple[str, str]:
    """scale x / sqrt(mean(x^2) + epsilon), and the inverse root."""
    wide = op.widened(x)
    mean = op.ReduceMean(op.Mul(wide, wide), list(axes), keepdims=1)
    inverse = op.Reciprocal(op.Sqrt(op.Add(mean, epsilon)))
    normal = op.cast_like(op.Mul(wide, inverse), x)
    return op.Mul(normal, scale) if scale else normal, op.cast_like(inverse, x)


@composition("SimplifiedLayerNormalization")
def simplified_layer_normalization(op: Emitter, node: Node) -> Sequence[str]:
    """Without mean and bias; onnxruntime keeps this operator in the default domain."""
    x, scale = node.inputs[:2]
    rank = op.rank(x)
    axes = range(node.attribute("axis", -1) % rank, rank)
    return rms_normalized(op, x, scale, node.attribute("epsilon", 1e-5), axes)


@composition("SkipLayerNormalization", domain=DOMAIN)
def skip_layer_normalization(op: Emitter, node: Node) -> Sequence[str]:
    x, skip, gamma, beta, bias = (node.input(index) for index in range(5))
    total = _sum(op, x, bias, skip)
    normal = op.emit(
        "LayerNormalization", total, gamma, beta, outputs=3, axis=-1, epsilon=node.attribute("epsilon", 1e-12)
    )
    return *normal, total


@composition("SkipSimplifiedLayerNormalization", domain=DOMAIN)
def skip_simplified_layer_normalization(op: Emitter, node: Node) -> Sequence[str | None]:
    x, skip, gamma, bias = (node.input(index) for index in range(4))
    total = _sum(op, x, bias, skip)
    normal, inverse = rms_normalized(op, total, gamma, node.attribute("epsilon", 1e-12))
    return normal, None, inverse, total


def _sum(op: Emitter, *terms: str) -> str:
    """The sum of those that are there."""
    return reduce(op.Add, [term for term in terms if term])


@composition("EmbedLayerNormalization", domain=DOMAIN)
def embed_layer_normalization(op: Emitter, node: Node) -> Sequence[str | None]:
    """Rows of up to three tables, added and normalized; the mask's sums where the output is used."""
    tokens, segments, words, positions, types, gamma, beta, mask, places = (node.input(index) for index in range(9))
    total = op.Add(op.Gather(words, tokens, axis=0), _positions(op, positions, places, tokens))
    total = _sum(op, total, op.Gather(types, segments, axis=0) if segments else "")
    normal = op.LayerNormalization(total, gamma, beta, axis=-1, epsilon=node.attribute("epsilon", 1e-12))
    return normal, _lengths(op, mask, tokens), total


def _positions(op: Emitter, table: str, places: str, tokens: str) -> str:
    """The rows of given positions, or the first ones, as many as there are tokens."""
    if places:
        return op.Gather(table, places, axis=0)
    return op.Unsqueeze(op.Slice(table, [0], op.dim(tokens, 1), [0]), [0])


def _lengths(op: Emitter, mask: str, tokens: str) -> str:
    if mask:
        return op.ReduceSum(mask, [1], keepdims=0)
    zeros = op.ConstantOfShape(op.dim(tokens, 0), value=helper.make_tensor("zero", TensorProto.INT32, [1], [0]))
    return zeros


@composition("GroupNorm", domain=DOMAIN)
def group_norm(op: Emitter, node: Node) -> Sequence[str]:
    return (_group_norm(op, node, node.inputs[0]),)


@composition("SkipGroupNorm", domain=DOMAIN)
def skip_group_norm(op: Emitter, node: Node) -> Sequence[str]:
    """The skip is an image, or one vector per row; the bias is a vector over channels, which come last."""
    x, _, _, skip, bias = (node.input(index) for index in range(5))
    skip = op.Unsqueeze(skip, [1, 2]) if op.rank(skip) == 2 else skip
    if not node.attribute("channels_last", 1):
        skip = op.Transpose(skip, perm=[0, 3, 1, 2]) if op.shape(skip) != op.shape(x) else skip
        bias = op.Unsqueeze(bias, [1, 2]) if bias else bias
    total = _sum(op, x, skip, bias)
    return _group_norm(op, node, total), total


def _group_norm(op: Emitter, node: Node, x: str) -> str:
    """Instance normalization of the groups, then scale and bias per channel."""
    gamma, beta = (op.Unsqueeze(op.cast_like(value, x), [1, 2]) for value in node.inputs[1:3])
    last = node.attribute("channels_last", 1)
    image = op.Transpose(x, perm=[0, 3, 1, 2]) if last else x
    groups = node.attribute("groups")
    rows = op.Reshape(image, [0, groups, -1])
    ones, zeros = np.ones(groups, np.float32), np.zeros(groups, np.float32)
    normal = op.InstanceNormalization(rows, ones, zeros, epsilon=node.attribute("epsilon", 1e-5))
    y = op.Add(op.Mul(op.reshape_like(normal, image), gamma), beta)
    y = silu(op, y) if node.attribute("activation") else y
    return op.Transpose(y, perm=[0, 2, 3, 1]) if last else y


@composition("BranchwiseRMSNorm", domain=DOMAIN)
def branchwise_rms_norm(op: Emitter, node: Node) -> Sequence[str]:
    """Each branch by itself; flat ones are folded into (branches, features) first."""
    x, scale = node.inputs[0], node.input(1)
    branches = node.attribute("num_branches", 0)
    grouped = op.Reshape(x, op.Concat(op.Slice(op.dims(x), [0], [-1]), [branches, -1], axis=0)) if branches else x
    if scale:
        scale = op.cast_like(scale, x)
        size = op.shape(scale)
        features = op.dim(grouped, -1)
        flat = size is not None and len(size) == 1
        scale = op.Reshape(scale, op.Concat([-1], features, axis=0)) if flat else scale
    normal, _ = rms_normalized(op, grouped, scale, node.attribute("epsilon", 1e-5))
    return (op.reshape_like(normal, x),)


@composition("GatedRMSNorm", domain=DOMAIN)
def gated_rms_norm(op: Emitter, node: Node) -> Sequence[str]:
    """Over each run of as many elements as there are scales, times the activated gate."""
    x, scale, gate = node.inputs
    features = op.dim(scale, 0)
    groups = op.Reshape(x, op.Concat(op.Slice(op.dims(x), [0], [-1]), [-1], features, axis=0))
    normal, _ = rms_normalized(op, groups, scale, node.attribute("epsilon", 1e-5))
    opened = op.Sigmoid(gate) if node.attribute("activation", "silu") == "sigmoid" else silu(op, gate)
    return (op.Mul(op.reshape_like(normal, x), opened),)
