"""Matrix products and convolutions with what onnxruntime fused into them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, Refusal, composition, rule
from explainserve.onnx_vjp.rules.microsoft.activations import DOMAIN, activated

CONV_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


@composition("FusedConv", domain=DOMAIN)
def fused_conv(op: Emitter, node: Node) -> Sequence[str]:
    """activation(Conv(x, w, b) + z)."""
    return (conv_sum_activation(op, node, *(node.input(index) for index in range(4))),)


def conv_sum_activation(op: Emitter, node: Node, x: str, kernel: str, bias: str, addend: str) -> str:
    """A convolution with the node's attributes, plus what is added to it, under the node's activation."""
    y = op.Conv(x, kernel, bias, **{name: node.attribute(name) for name in CONV_ATTRIBUTES})
    y = op.Add(y, addend) if addend else y
    return activated(op, y, node.attribute("activation", ""), node.attribute("activation_params") or [])


@composition("FusedGemm", domain=DOMAIN)
def fused_gemm(op: Emitter, node: Node) -> Sequence[str]:
    attributes = {name: node.attribute(name) for name in ("alpha", "beta", "transA", "transB")}
    return (_activated(op, node, op.Gemm(*node.inputs, **attributes)),)


def _activated(op: Emitter, node: Node, y: str) -> str:
    """Parameters are attributes of their own here."""
    parameters = [node.attribute(f"activation_{name}") for name in ("alpha", "beta", "gamma")]
    return activated(op, y, node.attribute("activation", ""), [value for value in parameters if value is not None])


@composition("FusedMatMul", "TransposeMatMul", domain=DOMAIN)
def fused_matmul(op: Emitter, node: Node) -> Sequence[str]:
    return (_product(op, node),)


def _product(op: Emitter, node: Node) -> str:
    """alpha A' B', with A' and B' transposed as the attributes say."""
    product = op.MatMul(_operand(op, node, 0, "A"), _operand(op, node, 1, "B"))
    alpha = node.attribute("alpha", 1.0)
    return product if alpha == 1.0 else op.Mul(product, alpha)


@composition("FusedMatMulActivation", domain=DOMAIN)
def fused_matmul_activation(op: Emitter, node: Node) -> Sequence[str]:
    product = _product(op, node)
    if node.attribute("activation") == "Softmax":
        return (op.Softmax(product, axis=node.attribute("activation_axis", -1)),)
    return (_activated(op, node, product),)


def _operand(op: Emitter, node: Node, index: int, letter: str) -> str:
    """`transBatch` moves the first axis behind the batch axes, `trans` exchanges the last two."""
    x = node.inputs[index]
    batches, rows = node.attribute(f"transBatch{letter}", 0), node.attribute(f"trans{letter}", 0)
    if not (batches or rows) or (rank := op.rank(x)) < 2:
        return x
    perm = [*range(1, rank - 1), 0, rank - 1] if batches else list(range(rank))
    return op.Transpose(x, perm=[*perm[:-2], perm[-1], perm[-2]] if rows else perm)


@rule("MatMulNBits", domain=DOMAIN)
def matmul_nbits(op: Emitter, node: Node, g: str) -> Gradients:
    """y = x W^T + b with constant weights W (N, K), stored in few bits."""
    rest: list[str | None] = [None] * (len(node.inputs) - 1)
    if node.differentiates(5):
        rest[4] = op.sum_to(g, node.inputs[5])
    if any(node.differentiates(index) for index in range(1, 5)):
        raise Refusal("the scales of the weights depend on a differentiated tensor", "store the weights in the file")
    return op.MatMul(g, _weights(op, node)), *rest


def _weights(op: Emitter, node: Node) -> np.ndarray:
    """(stored - zero point) * scale, of shape (N, K)."""
    stored, scales, zeros = (op.constant(node.input(index)) for index in (1, 2, 3))
    if stored is None or scales is None or (node.input(3) and zeros is None) or node.attribute("weight_prepacked", 0):
        raise Refusal("the weights are not stored as plain constants", "store the weights in the file, not prepacked")
    if node.input(4):
        raise Refusal("the weights are stored in another order (g_idx)", "quantize without reordering")
    bits, rows, block = node.attribute("bits", 4), node.attribute("N"), node.attribute("block_size")
    values = _unpacked(stored.reshape(rows, -1), bits).reshape(rows, -1, block).astype(scales.dtype)
    blocks = (rows, values.shape[1], 1)
    weights = (values - _zero_points(zeros, bits, blocks).astype(scales.dtype)) * scales.reshape(blocks)
    return np.ascontiguousarray(weights.reshape(rows, -1)[:, : node.attribute("K")])


def _zero_points(zeros: np.ndarray | None, bits: int, blocks: tuple[int, int, int]) -> np.ndarray:
    """Per block; the middle of the range unless they are stored, in bits too or as they are."""
    if zeros is None:
        return np.array(2 ** (bits - 1), np.float32)
    if zeros.dtype == np.uint8:
        zeros = _unpacked(zeros.reshape(blocks[0], -1), bits)[:, : blocks[1]].astype(np.float32)
    return zeros.reshape(blocks)


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers of `bits` bits from bytes, along the last axis, the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return parts.reshape(*packed.shape[:-1], -1)
