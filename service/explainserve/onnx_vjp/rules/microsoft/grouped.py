"""Attention of language models: queries share keys, positions are rotated, keys and values may come from before.

`seqlens_k` holds, per row, the position of its last token. What a row has of the past is what its new tokens leave.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Refusal, composition
from explainserve.onnx_vjp.rules.indexing import counted
from explainserve.onnx_vjp.rules.microsoft.activations import DOMAIN
from explainserve.onnx_vjp.rules.microsoft.attention import merged_heads, scale_of, split_heads
from explainserve.onnx_vjp.rules.microsoft.normalization import rms_normalized
from explainserve.onnx_vjp.rules.microsoft.rotary import rotated


@composition("GroupQueryAttention", domain=DOMAIN)
def group_query_attention(op: Emitter, node: Node) -> Sequence[str | None]:
    _refuse_caches(op, node)
    past_key, past_value = node.input(3), node.input(4)
    q, k, v = _heads(op, node)
    before = _tokens_before(op, node, q) if past_key else op.array(np.zeros(1, np.int64))
    if node.attribute("do_rotary", 0):
        q, k = (_turned(op, node, x, before) for x in (q, k))
    if past_key:
        k, v = op.Concat(past_key, k, axis=2), op.Concat(past_value, v, axis=2)
    scores = _scores(op, node, q, k)
    scores = op.Where(_visible(op, node, scores, before), scores, float(np.finfo(op.numpy_dtype(q)).min))
    y = _shared(op, _probabilities(op, node, scores), v, node.attribute("kv_num_heads"))
    return merged_heads(op, op.Reshape(y, [0, node.attribute("num_heads"), -1, 0])), k, v


def _refuse_caches(op: Emitter, node: Node) -> None:
    """Quantized and sliding caches, and a bias over columns that may not be where they are in the cache."""
    quantized = {node.attribute(name, "NONE") for name in ("k_quant_type", "v_quant_type")} != {"NONE"}
    if quantized or node.attribute("sliding_window_cache", 0) or (node.input(10) and node.input(3)):
        raise Refusal(
            "keys and values live in a cache that is quantized, sliding, or joined by an attention bias",
            "export the model for whole sequences, without a cache",
        )


def _heads(op: Emitter, node: Node) -> tuple[str, str, str]:
    """Queries, keys and values as heads; normalized where the node holds the scales."""
    q, k, v = (node.input(index) for index in range(3))
    queries, pairs = node.attribute("num_heads"), node.attribute("kv_num_heads")
    if not k:
        heads = split_heads(op, q, queries + 2 * pairs)
        q, k, v = op.emit("Split", heads, [queries, pairs, pairs], outputs=3, axis=1)
    else:
        q, k, v = split_heads(op, q, queries), split_heads(op, k, pairs), split_heads(op, v, pairs)
    epsilon = node.attribute("qk_norm_epsilon", 1e-6)
    if node.input(14):
        q, k = (rms_normalized(op, x, node.input(index), epsilon)[0] for x, index in ((q, 14), (k, 15)))
    return q, k, v


def _tokens_before(op: Emitter, node: Node, q: str) -> str:
    """How many tokens of the past each row has, of shape (batch,): none in a prompt, whatever the past holds."""
    ends = op.Add(op.Cast(node.inputs[5], to=TensorProto.INT64), [1])
    return op.Max(op.Sub(ends, op.dim(q, 2)), [0])


def _turned(op: Emitter, node: Node, x: str, before: str) -> str:
    places = node.input(9) or op.Add(op.Unsqueeze(before, [1]), counted(op, op.dim(x, 2)))
    cosines, sines = (op.Gather(table, places, axis=0) for table in node.inputs[7:9])
    return rotated(op, x, cosines, sines, node.attribute("rotary_interleaved", 0))


def _scores(op: Emitter, node: Node, q: str, k: str) -> str:
    """(batch, heads, queries, keys): the queries of heads that share their keys lie one behind the other."""
    scaled = op.Mul(q, scale_of(op, node, q))
    scores = _shared(op, scaled, op.transposed(k), node.attribute("kv_num_heads"))
    scores = op.Reshape(scores, [0, node.attribute("num_heads"), -1, 0])
    cap = node.attribute("softcap", 0.0)
    scores = op.Mul(op.Tanh(op.Mul(scores, 1 / cap)), cap) if cap else scores
    return op.Add(scores, node.input(10)) if node.input(10) else scores


def _shared(op: Emitter, left: str, right: str, pairs: int) -> str:
    return op.MatMul(op.Reshape(left, [0, pairs, -1, 0]), right)


def _visible(op: Emitter, node: Node, scores: str, before: str) -> str:
    """(batch or 1, 1, queries, keys): keys that are there, not ahead of the query, and not behind its window."""
    rows, columns = op.dim(scores, 2), op.dim(scores, 3)
    stored = op.Sub(columns, rows)
    start = op.Unsqueeze(before, [1])
    queries = op.Unsqueeze(op.Add(start, counted(op, rows)), [2])
    places = counted(op, columns)
    is_new = op.GreaterOrEqual(places, stored)
    keys = op.Where(is_new, op.Add(start, op.Sub(places, stored)), places)
    visible = op.Unsqueeze(op.Or(is_new, op.Less(places, start)), [1])
    keys = op.Unsqueeze(keys, [1])
    if node.attribute("causal", 1):
        visible = op.And(visible, op.LessOrEqual(keys, queries))
    else:
        ends = op.Unsqueeze(op.Cast(node.inputs[5], to=TensorProto.INT64), [1, 2])
        visible = op.And(visible, op.LessOrEqual(keys, ends))
    window = node.attribute("local_window_size", -1)
    if window > 0:
        visible = op.And(visible, op.Less(op.Sub(queries, keys), [window]))
    return op.Unsqueeze(visible, [1])


def _probabilities(op: Emitter, node: Node, scores: str) -> str:
    """Softmax, where asked for with one more score per head, which takes its share and has no value."""
    sink = node.input(11)
    if not sink and node.attribute("smooth_softmax", -1) != 1:
        return op.Softmax(scores, axis=-1)
    extra = op.Reshape(sink, [1, -1, 1, 1]) if sink else np.zeros((1, 1, 1, 1), op.numpy_dtype(scores))
    column = op.Expand(extra, op.Concat(op.Slice(op.dims(scores), [0], [3]), [1], axis=0))
    wide = op.Softmax(op.Concat(scores, column, axis=3), axis=-1)
    return op.Slice(wide, [0], [-1], [3])
