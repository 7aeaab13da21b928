"""Rotary embeddings: pairs of channels turned by an angle that depends on the position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import composition
from explainserve.onnx_vjp.rules.indexing import counted
from explainserve.onnx_vjp.rules.microsoft.activations import DOMAIN
from explainserve.onnx_vjp.rules.microsoft.attention import merged_heads


def rotated(op: Emitter, x: str, cosines: str, sines: str, interleaved: int) -> str:
    """Heads (batch, heads, length, head size) turned; the tables are (batch, length, half of the rotated channels).

    Pairs are neighbours when interleaved, else the two halves; what the tables do not reach stays as it is.
    """
    half = op.dim(cosines, -1)
    turned, rest = _parts(op, x, op.Add(half, half))
    cosine, sine = op.Unsqueeze(cosines, [1]), op.Unsqueeze(sines, [1])
    if interleaved:
        pairs = op.Reshape(turned, op.Concat([0, 0, 0], half, [2], axis=0))
        first, second = (op.Squeeze(part, [4]) for part in op.emit("Split", pairs, outputs=2, axis=4, num_outputs=2))
        pair = [op.Unsqueeze(part, [4]) for part in _turned(op, first, second, cosine, sine)]
        result = op.Reshape(op.Concat(*pair, axis=4), [0, 0, 0, -1])
    else:
        first, second = op.emit("Split", turned, outputs=2, axis=3, num_outputs=2)
        result = op.Concat(*_turned(op, first, second, cosine, sine), axis=3)
    return op.Concat(result, rest, axis=3) if rest else result


def _turned(op: Emitter, first: str, second: str, cosine: str, sine: str) -> tuple[str, str]:
    return (
        op.Sub(op.Mul(first, cosine), op.Mul(second, sine)),
        op.Add(op.Mul(first, sine), op.Mul(second, cosine)),
    )


def _parts(op: Emitter, x: str, count: str) -> tuple[str, str]:
    """The first channels, and the rest where there is any."""
    size, turned = op.constant(op.dim(x, 3)), op.constant(count)
    if size is not None and turned is not None and size == turned:
        return x, ""
    return op.Slice(x, [0], count, [3]), op.Slice(x, count, op.dim(x, 3), [3])


@composition("MRotaryEmbedding", domain=DOMAIN)
def multimodal_rotary_embedding(op: Emitter, node: Node) -> Sequence[str]:
    """Each channel pair takes its angle from one of three positions of its token: time, height or width."""
    x, positions, cosines, sines = node.inputs[:4]
    heads = as_heads(op, node, x, cosines)
    chosen = _streams(node)
    cosines, sines = (_per_stream(op, table, positions, chosen) for table in (cosines, sines))
    y = rotated(op, heads, cosines, sines, node.attribute("interleaved", 0))
    return (y if op.rank(x) == 4 else merged_heads(op, y),)


def _streams(node: Node) -> np.ndarray:
    """Which of the three positions each channel pair reads: one section after the other, or in turns."""
    sections = list(node.attribute("mrope_section"))
    if not node.attribute("mrope_layout", 0):
        return np.repeat(np.arange(3), sections)
    turns = np.zeros(sum(sections), np.int64)
    for stream in (1, 2):
        turns[stream : 3 * sections[stream] : 3] = stream
    return turns


def _per_stream(op: Emitter, table: str, positions: str, streams: np.ndarray) -> str:
    """(batch, length, pairs): the rows at all three positions, and of each pair the one of its stream."""
    rows = op.Gather(table, positions, axis=0)
    masks = (streams == np.arange(3)[:, None]).astype(np.float32).reshape(3, 1, 1, -1)
    return op.ReduceSum(op.Mul(rows, masks), [0], keepdims=0)


@composition("GemmaRotaryEmbedding", domain=DOMAIN)
def gemma_rotary_embedding(op: Emitter, node: Node) -> Sequence[str]:
    """Queries and keys with the angles themselves given; their turned halves come as inputs of their own."""
    angles, q, q_turned, k, k_turned = node.inputs
    cosine, sine = (op.cast_like(op.Unsqueeze(table, [1]), q) for table in (op.Cos(angles), op.Sin(angles)))
    return tuple(op.Add(op.Mul(x, cosine), op.Mul(y, sine)) for x, y in ((q, q_turned), (k, k_turned)))


@composition("RotaryEmbedding", domain=DOMAIN)
def rotary_embedding(op: Emitter, node: Node) -> Sequence[str]:
    x, positions, cosines, sines = node.inputs[:4]
    heads = as_heads(op, node, x, cosines)
    places = positions if op.rank(positions) == 2 else _following(op, positions, op.dim(heads, 2))
    cosines, sines = (op.Gather(table, places, axis=0) for table in (cosines, sines))
    y = rotated(op, heads, cosines, sines, node.attribute("interleaved", 0))
    return (y if op.rank(x) == 4 else merged_heads(op, y),)


def as_heads(op: Emitter, node: Node, x: str, cosines: str) -> str:
    """(batch, length, hidden) as heads; their size is twice the tables' where the node does not tell their number."""
    if op.rank(x) == 4:
        return x
    heads = node.attribute("num_heads", 0)
    half = op.dim(cosines, 1)
    shape = [0, 0, heads, -1] if heads else op.Concat([0, 0, -1], op.Add(half, half), axis=0)
    return op.Transpose(op.Reshape(x, shape), perm=[0, 2, 1, 3])


def _following(op: Emitter, offset: str, length: str) -> str:
    """The positions from an offset on, for every row the same."""
    return op.Unsqueeze(op.Add(op.Cast(offset, to=TensorProto.INT64), counted(op, length)), [0])
