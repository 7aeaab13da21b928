"""Matrix products and convolutions with what onnxruntime fused into them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, Refusal, composition, rule
from explainserve.onnx_vjp.rules.microsoft.activations import DOMAIN, activated, silu
from explainserve.onnx_vjp.rules.microsoft.normalization import rms_normalized

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


@composition("MatMulNBitsMlp", domain=DOMAIN)
def matmul_nbits_mlp(op: Emitter, node: Node) -> Sequence[str | None]:
    """activation(gate) * up, both projections of the same normalized input."""
    normal, total = _normalized_input(op, node)
    gate = _few_bits(op, node, normal, 3, node.attribute("N"))
    up = _few_bits(op, node, normal, 6, node.attribute("N"))
    name = node.attribute("activation")
    return op.Mul(silu(op, gate) if name in ("silu", "swish") else _activated(op, node, gate), up), total


@composition("MatMulNBitsQkv", domain=DOMAIN)
def matmul_nbits_qkv(op: Emitter, node: Node) -> Sequence[str | None]:
    """Three projections of the same normalized input."""
    normal, total = _normalized_input(op, node)
    sizes = (node.attribute("Nq"), node.attribute("Nkv"), node.attribute("Nkv"))
    return *(_few_bits(op, node, normal, 3 + 3 * index, size) for index, size in enumerate(sizes)), total


def _normalized_input(op: Emitter, node: Node) -> tuple[str, str | None]:
    """The input as the projections read it, and its sum with the skip where there is one."""
    x, skip, scale = (node.input(index) for index in range(3))
    total = op.Add(x, skip) if skip else x
    epsilon = node.attribute("epsilon", 1e-5 if node.proto.op_type == "MatMulNBitsMlp" else 1e-6)
    return rms_normalized(op, total, scale, epsilon)[0] if scale else total, total if skip else None


def _few_bits(op: Emitter, node: Node, x: str, first: int, outputs: int) -> str:
    weights, scales, bias = (node.input(first + index) for index in range(3))
    attributes = {name: node.attribute(name) for name in ("K", "bits", "block_size", "accuracy_level")}
    operands = (x, weights, scales, None, None, bias or None)
    return op.emit("MatMulNBits", *operands, domain=DOMAIN, N=outputs, **attributes)[0]


# The sixteen values that four bits stand for, as multiples of the largest of their block.
_MAGNITUDES = (0.0, 0.00520833333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
_NORMAL_BELOW = (-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.091050036)
_NORMAL_ABOVE = (0.0, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)
_FOUR_BITS = {0: (*_MAGNITUDES, *(-value for value in _MAGNITUDES)), 1: (*_NORMAL_BELOW, *_NORMAL_ABOVE)}


@composition("MatMulBnb4", domain=DOMAIN)
def matmul_bnb4(op: Emitter, node: Node) -> Sequence[str]:
    """x W^T with constant weights W (N, K), or x W with the attribute transB off."""
    stored, largest = op.constant(node.inputs[1]), op.constant(node.inputs[2])
    if stored is None or largest is None:
        raise Refusal("the weights are not stored as plain constants", "store the weights in the file")
    block, shape = node.attribute("block_size"), (node.attribute("N"), node.attribute("K"))
    digits = np.stack([stored >> 4, stored & 15], -1).reshape(-1)[: shape[0] * shape[1]]
    values = np.array(_FOUR_BITS[node.attribute("quant_type")], largest.dtype)[digits]
    weights = (values * np.repeat(largest, block)[: len(values)]).reshape(shape)
    return (op.MatMul(node.inputs[0], np.ascontiguousarray(weights.T) if node.attribute("transB", 1) else weights),)
