"""Matrix products and determinants."""

from __future__ import annotations

import numpy as np

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, Refusal, rule


@rule("MatMul", broadcasts=True)
def matmul(op: Emitter, node: Node, g: str) -> Gradients:
    """dA = g B^T, dB = A^T g. A vector is a row on the left and a column on the right, as MatMul itself reads it."""
    a, b = node.inputs
    if _is_matrix(op, b):
        return _rows_times_matrix(op, a, b, g)
    if op.shape(b) is None and (stored := op.constant(a)) is not None and stored.ndim == 2:
        # Only of a stored A: onnxruntime fuses a Transpose into a product with a vector, and gets it wrong.
        return None, op.MatMul(stored.T, g)
    rank_a, rank_b = op.rank(a), op.rank(b)
    if rank_a == 1 and rank_b == 1:
        return op.Mul(g, b), op.Mul(g, a)
    g = op.Unsqueeze(g, [-2]) if rank_a == 1 else op.Unsqueeze(g, [-1]) if rank_b == 1 else g
    da = db = None
    if node.differentiates(0):
        row = op.MatMul(g, op.Unsqueeze(b, [0]) if rank_b == 1 else op.transposed(b))
        da = op.Squeeze(row, [-2]) if rank_a == 1 else row
    if node.differentiates(1):
        column = op.MatMul(op.Unsqueeze(a, [1]) if rank_a == 1 else op.transposed(a), g)
        db = op.Squeeze(column, [-1]) if rank_b == 1 else column
    return da, db


def _is_matrix(op: Emitter, value: str) -> bool:
    shape = op.shape(value)
    return shape is not None and len(shape) == 2


def _rows_times_matrix(op: Emitter, a: str, b: str, g: str) -> Gradients:
    """A is rows, whatever its rank. Gemm reads a stored B as it is, where MatMul would need a transposed copy of it."""
    a_rows, g_rows = (op.Reshape(value, op.Concat([-1], op.dim(b, axis), axis=0)) for value, axis in ((a, 0), (g, 1)))
    return op.reshape_like(op.Gemm(g_rows, b, transB=1), a), op.Gemm(a_rows, g_rows, transA=1)


@rule("Gemm", broadcasts=True)
def gemm(op: Emitter, node: Node, g: str) -> Gradients:
    """Y = alpha A' B' + beta C, with A' and B' transposed as the attributes say."""
    a, b = node.inputs[:2]
    trans_a, trans_b = node.attribute("transA", 0), node.attribute("transB", 0)
    alpha, beta = node.attribute("alpha", 1.0), node.attribute("beta", 1.0)
    da = (
        op.Gemm(b, g, alpha=alpha, transA=trans_b, transB=1)
        if trans_a
        else op.Gemm(g, b, alpha=alpha, transB=1 - trans_b)
    )
    db = (
        op.Gemm(g, a, alpha=alpha, transA=1, transB=trans_a)
        if trans_b
        else op.Gemm(a, g, alpha=alpha, transA=1 - trans_a)
    )
    return da, db, g if beta == 1.0 else op.Mul(g, beta)


# The cofactors of one n by n matrix are n^4 elements before their determinants are taken.
_LARGEST_DETERMINANT = 32


@rule("Det", since=11)
def det(op: Emitter, node: Node, g: str) -> Gradients:
    """The derivative of a determinant is the matrix of cofactors, itself made of determinants: right for singular
    matrices too.
    """
    x = node.inputs[0]
    shape = op.shape(x)
    if shape is None or not isinstance(size := shape[-1], int) or size > _LARGEST_DETERMINANT:
        raise Refusal(
            f"Det of matrices whose size is not known or above {_LARGEST_DETERMINANT}", "fix the size of the matrices"
        )
    g = op.Unsqueeze(g, [-2, -1])
    if size == 1:
        return (g,)
    others = np.array([[other for other in range(size) if other != index] for index in range(size)])
    flat = op.Reshape(x, op.Concat(op.Slice(op.dims(x), [0], [-2]), [size * size], axis=0))
    minors = op.Gather(flat, others[:, None, :, None] * size + others[None, :, None, :], axis=-1)
    signs = np.fromfunction(lambda row, column: (-1.0) ** (row + column), (size, size))
    return (op.Mul(g, op.Mul(op.Det(minors), signs)),)
