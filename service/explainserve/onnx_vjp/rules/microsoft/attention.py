"""Attention: projections, masks, the softmax of the scores, and the weighted sum of the values.

Heads are laid out as (batch, heads, length, head size) throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto, helper

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Refusal, composition
from explainserve.onnx_vjp.rules.indexing import counted
from explainserve.onnx_vjp.rules.microsoft.activations import DOMAIN

_PROMPT = "explain the model on whole sequences, exported without past keys and values"


@composition("Attention", domain=DOMAIN)
def attention(op: Emitter, node: Node) -> Sequence[str | None]:
    """Query, key and value are projected by one matrix, side by side."""
    x, weights, bias, mask, past, addend = (node.input(index) for index in range(6))
    _refuse_attributes(node, "do_rotary", "past_present_share_buffer")
    heads = node.attribute("num_heads")
    projected = op.MatMul(x, weights)
    projected = op.Add(projected, bias) if bias else projected
    q, k, v = (split_heads(op, part, heads) for part in _query_key_value(op, node, projected))
    if past:
        k, v = (op.Concat(_row(op, past, index), new, axis=2) for index, new in enumerate((k, v)))
    y = _attended(op, node, q, k, v, mask, addend)
    present = len(node.outputs) > 1 and op.Concat(op.Unsqueeze(k, [0]), op.Unsqueeze(v, [0]), axis=0)
    return y, present or None


def _refuse_attributes(node: Node, *names: str) -> None:
    for name in names:
        if node.attribute(name, 0):
            raise Refusal(f"{node.proto.op_type} with {name}", _PROMPT)


def _query_key_value(op: Emitter, node: Node, projected: str) -> tuple[str, ...]:
    sizes = node.attribute("qkv_hidden_sizes")
    if sizes:
        return op.emit("Split", projected, list(sizes), outputs=3, axis=-1)
    return op.emit("Split", projected, outputs=3, axis=-1, num_outputs=3)


def split_heads(op: Emitter, x: str, heads: int) -> str:
    """(batch, length, hidden) to (batch, heads, length, head size)."""
    return op.Transpose(op.Reshape(x, [0, 0, heads, -1]), perm=[0, 2, 1, 3])


def merged_heads(op: Emitter, x: str) -> str:
    """(batch, heads, length, head size) to (batch, length, hidden)."""
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, -1])


def _row(op: Emitter, x: str, index: int) -> str:
    return op.Squeeze(op.Slice(x, [index], [index + 1], [0]), [0])


def _attended(op: Emitter, node: Node, q: str, k: str, v: str, mask: str, addend: str) -> str:
    """The whole of the operator behind its projections, with the masks and the scale that the node asks for."""
    scores = op.MatMul(op.Mul(q, scale_of(op, node, q)), op.transposed(k))
    if mask:
        scores = op.Add(scores, _masked(op, node, mask, scores))
    if node.attribute("unidirectional", 0):
        scores = op.Where(causal(op, scores), scores, float(np.finfo(op.numpy_dtype(q)).min))
    if addend:
        scores = op.Add(scores, addend)
    return merged_heads(op, op.MatMul(op.Softmax(scores, axis=-1), v))


def scale_of(op: Emitter, node: Node, q: str) -> str | float:
    """The attribute, or one over the root of the head size."""
    scale = float(node.attribute("scale", 0.0))
    return scale or op.Reciprocal(op.Sqrt(op.cast_like(op.dim(q, 3), q)))


def _masked(op: Emitter, node: Node, mask: str, scores: str) -> str:
    """Zero where a key counts, the filter value elsewhere; broadcast to the scores."""
    rank = op.rank(mask)
    if rank == 1:
        kept = _within(op, mask, scores)
    elif rank in (2, 3):
        kept = op.Unsqueeze(op.Greater(mask, np.array(0, np.int32)), [1, 2] if rank == 2 else [1])
    else:
        raise Refusal("the attention mask has four axes", "give the mask as (batch, length)")
    zero, low = (op.array(np.array(value, op.numpy_dtype(scores))) for value in (0, _filter_value(node)))
    return op.Where(kept, zero, low)


def _filter_value(node: Node) -> float:
    return float(node.attribute("mask_filter_value", -10000.0))


def _within(op: Emitter, mask: str, scores: str) -> str:
    """Keys before the end of their row and, where the vector holds starts behind the ends, not before its start."""
    batch = op.dim(scores, 0)
    zero = helper.make_tensor("zero", TensorProto.INT64, [1], [0])
    padded = op.Concat(op.Cast(mask, to=TensorProto.INT64), op.ConstantOfShape(batch, value=zero), axis=0)
    ends = op.Slice(padded, [0], batch, [0])
    starts = op.Slice(padded, batch, op.Add(batch, batch), [0])
    keys = counted(op, op.dim(scores, 3))
    low, high = (op.Unsqueeze(bound, [1, 2, 3]) for bound in (starts, ends))
    return op.And(op.GreaterOrEqual(keys, low), op.Less(keys, high))


def causal(op: Emitter, scores: str) -> str:
    """Whether a query (row) may see a key (column), both counted from the end of the sequence."""
    rows, columns = op.dim(scores, 2), op.dim(scores, 3)
    places = op.Add(counted(op, rows), op.Sub(columns, rows))
    return op.GreaterOrEqual(op.Unsqueeze(places, [1]), counted(op, columns))


@composition("MultiHeadAttention", domain=DOMAIN)
def multi_head_attention(op: Emitter, node: Node) -> Sequence[str | None]:
    """Query, key and value come projected, possibly packed into one or two tensors, or as heads already."""
    mask, addend, past_key, past_value = (node.input(index) for index in range(4, 8))
    if node.input(8) or node.input(9):
        raise Refusal("keys and values live in a shared buffer", _PROMPT)
    q, k, v = _heads(op, node, node.input(3))
    if past_key:
        k, v = op.Concat(past_key, k, axis=2), op.Concat(past_value, v, axis=2)
    return _attended(op, node, q, k, v, mask, addend), k, v


def _heads(op: Emitter, node: Node, bias: str) -> tuple[str, str, str]:
    """Queries, keys and values from however they come, with their biases."""
    q, k, v = (node.input(index) for index in range(3))
    heads = node.attribute("num_heads")
    if op.rank(q) == 5:
        q, k, v = (_packed(op, q, index) for index in range(3))
    elif op.rank(k) == 5:
        k, v = (_packed(op, k, index) for index in range(2))
    biases = _query_key_value_bias(op, bias, q, v) if bias else ("", "", "")
    parts = [op.Add(x, b) if b else x for x, b in zip((q, k, v), biases, strict=True)]
    q, k, v = (x if op.rank(x) == 4 else split_heads(op, x, heads) for x in parts)
    return q, k, v


def _packed(op: Emitter, packed: str, index: int) -> str:
    """One part of (batch, length, heads, parts, head size), as (batch, length, hidden)."""
    part = op.Squeeze(op.Slice(packed, [index], [index + 1], [3]), [3])
    return op.Reshape(part, [0, 0, -1])


def _query_key_value_bias(op: Emitter, bias: str, q: str, v: str) -> tuple[str, ...]:
    hidden = op.dim(q, 2)
    rest = op.Sub(op.dim(bias, 0), op.Add(hidden, hidden))
    return op.emit("Split", bias, op.Concat(hidden, hidden, rest, axis=0), outputs=3, axis=0)


@composition("DecoderMaskedMultiHeadAttention", domain=DOMAIN)
def decoder_masked_multi_head_attention(op: Emitter, node: Node) -> Sequence[str | None]:
    """One token against keys and values of another sequence; its own past lives in a shared buffer."""
    if node.input(5) or node.attribute("output_qk", 0):
        raise Refusal("keys and values live in a shared buffer", _PROMPT)
    q, k, v = _heads(op, node, node.input(10))
    return _attended(op, node, q, k, v, node.input(3), node.input(4)), k, v


@composition("GatedRelativePositionBias", domain=DOMAIN)
def gated_relative_position_bias(op: Emitter, node: Node) -> Sequence[str]:
    """The bias times u (r a - 1) + 2, with two gates u and r from the halves of a projection of each head's query."""
    if node.input(6):
        raise Refusal("the queries are packed without padding", "export the model without packing")
    query, query_bias, bias, weight, gate_bias, a = node.inputs[:6]
    heads = split_heads(op, op.Add(query, query_bias), node.attribute("num_heads"))
    projected = op.Add(op.MatMul(heads, weight), gate_bias)
    halves = op.ReduceSum(op.Reshape(projected, [0, 0, 0, 2, -1]), [4], keepdims=0)
    u, r = op.emit("Split", op.Sigmoid(halves), outputs=2, axis=3, num_outputs=2)
    return (op.Mul(op.Add(op.Mul(u, op.Sub(op.Mul(r, a), 1)), 2), bias),)
