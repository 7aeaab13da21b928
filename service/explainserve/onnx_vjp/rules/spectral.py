"""Fourier transforms: linear maps whose transpose is the transform in the other direction.

Complex numbers are pairs of a real and an imaginary part along the last axis; a last axis of size 1 is real.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, composition, rule
from explainserve.onnx_vjp.rules.indexing import counted


@rule("DFT", since=17)
def dft_17(op: Emitter, node: Node, g: str) -> Gradients:
    axis = op.array(np.array([node.attribute("axis", 1)], np.int64))
    return _transposed(op, node, g, axis), None


@rule("DFT", since=20)
def dft_20(op: Emitter, node: Node, g: str) -> Gradients:
    """The axis is an input."""
    axis = op.Cast(node.inputs[2], to=TensorProto.INT64) if node.input(2) else op.array(np.array(-2, np.int64))
    return _transposed(op, node, g, op.Reshape(axis, [1])), None, None


def _transposed(op: Emitter, node: Node, g: str, axis: str) -> str:
    """X_k = sum_n x_n e^(-2 pi i k n / N), so dx_n = sum_k g_k e^(2 pi i k n / N), cut or padded to the length of x.

    The other direction divides by N. A one-sided spectrum stands for its mirror image too: given, all but its real
    ends count twice; asked for, what was not returned has no cotangent.
    """
    x = node.inputs[0]
    inverse, onesided = node.attribute("inverse", 0), node.attribute("onesided", 0)
    completed = inverse and onesided
    length = op.Cast(node.inputs[1], to=TensorProto.INT64) if node.input(1) else _size(op, g if completed else x, axis)
    value = _dft(op, g, op.Reshape(length, []), axis, 1 - inverse, completed)
    if completed:
        value = op.Mul(value, _multiplicity(op, length, axis, x))
    size = op.cast_like(length, g)
    return _fitted(op, op.Div(value, size) if inverse else op.Mul(value, size), x, axis)


def _size(op: Emitter, x: str, axis: str) -> str:
    known = op.constant(axis)
    return op.Gather(op.Shape(x), axis) if known is None else op.dim(x, int(known.item()))


def _dft(op: Emitter, value: str, length: str, axis: str, inverse: int, onesided: int) -> str:
    """A transform as the graph's operator set writes it."""
    attributes = {"inverse": inverse, "onesided": onesided}
    if op.graph.opsets[""] >= 20:
        return op.DFT(value, length, op.Reshape(axis, []), **attributes)
    known = op.constant(axis)
    return op.DFT(value, length, axis=None if known is None else int(known.item()), **attributes)


def _multiplicity(op: Emitter, length: str, axis: str, like: str) -> str:
    """How often each of the N // 2 + 1 frequencies stands in the whole spectrum: the first once, the last once where
    N is even, all others twice.
    """
    minus_one, one, two = (op.array(np.array(value, np.int64)) for value in (-1, 1, 2))
    axes = np.arange(op.rank(like))
    k = counted(op, op.Reshape(op.Add(op.Div(length, two), one), [1]))
    times = op.Add(op.mask(op.Not(op.Equal(op.Mod(op.Sub(length, k), length), k)), like), 1)
    return op.Reshape(times, op.Where(op.Equal(axes, op.Mod(axis, np.array(axes.size, np.int64))), minus_one, one))


def _fitted(op: Emitter, value: str, x: str, axis: str) -> str:
    """`value` cut or padded with zeros to the size of x along an axis, and its real part where x is real."""
    missing = op.Sub(_size(op, x, axis), _size(op, value, axis))
    if (known := op.constant(missing)) is None or known.any():
        value = op.Pad(value, op.Concat(np.zeros(1, np.int64), missing, axis=0), None, axis)
    return op.Slice(value, [0], op.dim(x, -1), [-1])


@composition("STFT", since=17)
def stft(op: Emitter, node: Node) -> Sequence[str | None]:
    """Frames of the signal, windowed and transformed."""
    signal, step, window = node.inputs[0], node.inputs[1], node.input(2)
    zero, one = (op.array(np.array(value, np.int64)) for value in (0, 1))
    length = op.Cast(node.input(3), to=TensorProto.INT64) if node.input(3) else op.Squeeze(op.dim(window, 0), [0])
    last = op.Add(op.Sub(op.Squeeze(op.dim(signal, 1), [0]), length), one)
    starts = op.Range(zero, last, op.Cast(step, to=TensorProto.INT64))
    positions = op.Add(op.Unsqueeze(starts, [1]), op.Range(zero, length, one))
    if op.rank(signal) == 2:
        signal = op.Unsqueeze(signal, [2])
    frames = op.Gather(signal, positions, axis=1)
    if window:
        frames = op.Mul(frames, op.Unsqueeze(window, [1]))
    return (_dft(op, frames, length, op.array(np.array([2], np.int64)), 0, node.attribute("onesided", 1)),)
