"""Summing the cotangents of a tensor that is used several times.

Slices of one tensor (a query-key-value split, the halves of a roll) each return a cotangent padded with zeros. Where
such pieces lie side by side along one axis, they are concatenated instead of padded and added: the same values,
without passes over zeros.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from explainserve.onnx_vjp.emitter import Emitter


@dataclass(frozen=True)
class _Piece:
    """A cotangent that covers [start, stop) of one axis of a tensor of the given size there."""

    value: str
    axis: int
    start: int
    stop: int
    size: int


def summed(op: Emitter, parts: Sequence[str]) -> str:
    """The sum of cotangents of equal shape."""
    pieces: dict[tuple[int, int], list[_Piece]] = defaultdict(list)
    whole: list[str] = []
    for part in parts:
        piece = _piece(op, part) if len(parts) > 1 else None
        if piece is None:
            whole.append(part)
        else:
            pieces[piece.axis, piece.size].append(piece)
    for group in pieces.values():
        whole += _joined(op, sorted(group, key=lambda piece: piece.start))
    return whole[0] if len(whole) == 1 else op.Add(*whole) if len(whole) == 2 else op.Sum(*whole)


def _piece(op: Emitter, part: str) -> _Piece | None:
    """The piece that a constant zero padding along a single axis places, else None."""
    node = op.graph.producers.get(part)
    if node is None or node.op_type != "Pad" or len(node.input) != 2 or node.attribute:
        return None
    pads, shape = op.constant(node.input[1]), op.shape(node.input[0])
    if pads is None or shape is None or np.any(pads < 0):
        return None
    before, after = pads[: len(shape)], pads[len(shape) :]
    axes = np.flatnonzero(before + after)
    if len(axes) != 1 or not isinstance(length := shape[axis := int(axes[0])], int):
        return None
    start = int(before[axis])
    return _Piece(node.input[0], axis, start, start + length, start + length + int(after[axis]))


def _joined(op: Emitter, pieces: Sequence[_Piece]) -> list[str]:
    """Disjoint pieces concatenated and padded once; pieces that overlap start a new row."""
    rows: list[list[_Piece]] = []
    for piece in pieces:
        row = next((row for row in rows if row[-1].stop == piece.start), None)
        if row is None:
            rows.append([piece])
        else:
            row.append(piece)
    return [_row(op, row) for row in rows]


def _row(op: Emitter, row: Sequence[_Piece]) -> str:
    axis, first, last = row[0].axis, row[0], row[-1]
    value = op.Concat(*(piece.value for piece in row), axis=axis) if len(row) > 1 else first.value
    if first.start == 0 and last.stop == last.size:
        return value
    rank = op.rank(value)
    pads = np.zeros(2 * rank, np.int64)
    pads[axis], pads[rank + axis] = first.start, last.size - last.stop
    return op.Pad(value, pads)
