"""What is left: older forms of standard operators, sums, moves of elements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Gradients, Refusal, composition, rule
from explainserve.onnx_vjp.rules.indexing import counted
from explainserve.onnx_vjp.rules.microsoft.activations import DOMAIN, silu
from explainserve.onnx_vjp.rules.microsoft.normalization import rms_normalized
from explainserve.onnx_vjp.shapes import Shape

_TRAINING = ("the operator is in training mode", "export the model in evaluation mode")

# -- the same as a standard operator
# -------------------------------------------------------------------------------------------------------------


@composition("SampleOp", domain=DOMAIN)
def sample_op(op: Emitter, node: Node) -> Sequence[str]:
    """An echo."""
    return (op.Identity(node.inputs[0]),)


@composition("Trilu", domain=DOMAIN)
def trilu(op: Emitter, node: Node) -> Sequence[str]:
    return (op.Trilu(*node.inputs, upper=node.attribute("upper", 1)),)


@composition("GatherND", domain=DOMAIN)
def gather_nd(op: Emitter, node: Node) -> Sequence[str]:
    x, indices = node.inputs
    return (op.GatherND(x, op.Cast(indices, to=TensorProto.INT64)),)


@composition("ExpandDims", domain=DOMAIN)
def expand_dims(op: Emitter, node: Node) -> Sequence[str]:
    x, axis = node.inputs
    return (op.Unsqueeze(x, op.Reshape(op.Cast(axis, to=TensorProto.INT64), [1])),)


@composition("Pad", domain=DOMAIN)
def pad(op: Emitter, node: Node) -> Sequence[str]:
    """The value may be a vector of one element."""
    x, pads, value = (node.input(index) for index in range(3))
    value = op.Reshape(value, np.empty(0, np.int64)) if value else ""
    return (op.Pad(x, op.Reshape(pads, [-1]), value, mode=node.attribute("mode", "constant")),)


@composition("GridSample", domain=DOMAIN)
def grid_sample(op: Emitter, node: Node) -> Sequence[str]:
    attributes = {name: node.attribute(name) for name in ("align_corners", "mode", "padding_mode")}
    return (op.GridSample(*node.inputs, **attributes),)


@composition("Range", domain=DOMAIN)
def range_(op: Emitter, node: Node) -> Sequence[str]:
    """Bounds may be vectors of one element; the step is one unless given."""
    start, limit, step = (op.Reshape(x, [1]) if x else "" for x in (node.input(index) for index in range(3)))
    step = step or op.array(np.ones(1, op.numpy_dtype(start)))
    count = op.Ceil(op.Div(op.Cast(op.Sub(limit, start), to=TensorProto.DOUBLE), op.Cast(step, to=TensorProto.DOUBLE)))
    places = counted(op, op.Max(op.Cast(count, to=TensorProto.INT64), [0]))
    return (op.Add(start, op.Mul(op.cast_like(places, start), step)),)


@composition("TorchEmbedding", domain=DOMAIN)
def torch_embedding(op: Emitter, node: Node) -> Sequence[str]:
    """The other inputs steer the training of the table only."""
    return (op.Gather(*node.inputs[:2], axis=0),)


@composition("ConvTransposeWithDynamicPads", domain=DOMAIN)
def conv_transpose_with_dynamic_pads(op: Emitter, node: Node) -> Sequence[str]:
    x, kernel, pads, bias = (node.input(index) for index in range(4))
    values = op.constant(pads)
    if values is None:
        raise Refusal("ConvTranspose crops by an amount that is computed from the input", "store the pads in the file")
    names = ("auto_pad", "dilations", "group", "kernel_shape", "output_padding", "strides")
    attributes = {name: node.attribute(name) for name in names}
    return (op.ConvTranspose(x, kernel, bias, pads=values.reshape(-1).tolist(), **attributes),)


# -- sums and products
# -------------------------------------------------------------------------------------------------------------


@composition("BiasAdd", domain=DOMAIN)
def bias_add(op: Emitter, node: Node) -> Sequence[str]:
    x, bias, skip = node.inputs
    return (op.Add(op.Add(x, bias), skip),)


@composition("BiasDropout", "BitmaskBiasDropout", domain=DOMAIN)
def bias_dropout(op: Emitter, node: Node) -> Sequence[str]:
    """x + bias + residual, except in training."""
    x, bias, residual, training = (node.input(index) for index in (0, 1, 2, 4))
    _refuse_training(op, training)
    total = op.Add(x, bias)
    return (op.Add(total, residual) if residual else total,)


@composition("BitmaskDropout", domain=DOMAIN)
def bitmask_dropout(op: Emitter, node: Node) -> Sequence[str]:
    """The identity, except in training."""
    _refuse_training(op, node.input(2))
    return (op.Identity(node.inputs[0]),)


def _refuse_training(op: Emitter, training: str) -> None:
    if training and ((constant := op.constant(training)) is None or constant.any()):
        raise Refusal(*_TRAINING)


@composition("BiasSoftmax", domain=DOMAIN)
def bias_softmax(op: Emitter, node: Node) -> Sequence[str]:
    """Softmax over all axes from `axis` on, of the input and a bias that is repeated over axes in front of it or over
    leading ones.
    """
    x, bias = node.inputs
    rank, axis = op.rank(x), node.attribute("axis", 1)
    axis %= rank
    if not node.attribute("is_inner_broadcast") or op.rank(bias) == rank:
        total = op.Add(x, bias)
    else:
        total = op.Add(x, op.Unsqueeze(bias, list(range(op.rank(bias) - (rank - axis), axis))))
    if axis == rank - 1:
        return (op.Softmax(total, axis=-1),)
    return (op.reshape_like(op.Softmax(op.Flatten(total, axis=axis), axis=1), x),)


@composition("GatedAdd", domain=DOMAIN)
def gated_add(op: Emitter, node: Node) -> Sequence[str]:
    x, y, gate = node.inputs
    return (op.Add(x, op.Mul(y, gate)),)


@composition("LinearAttentionGate", domain=DOMAIN)
def linear_attention_gate(op: Emitter, node: Node) -> Sequence[str | None]:
    """decay = scale softplus(a + bias), beta = sigmoid(b)."""
    a, bias, scale, b = (node.input(index) for index in range(4))
    decay = op.Mul(op.Softplus(op.Add(a, op.cast_like(bias, a))), op.cast_like(scale, a))
    return decay, op.Sigmoid(b) if b else None


@composition("EngramGate", domain=DOMAIN)
def engram_gate(op: Emitter, node: Node) -> Sequence[str | None]:
    """value sigmoid(sign(d) sqrt(max(|d|, 1e-6))) with d the scaled product of normalized key and query."""
    key, query, value, key_scale, query_scale, out_scale = (node.input(index) for index in range(6))
    epsilon = node.attribute("epsilon", 1e-5)
    (k, _), (q, _) = rms_normalized(op, key, key_scale, epsilon), rms_normalized(op, query, query_scale, epsilon)
    root = op.Sqrt(op.cast_like(op.dim(key, 3), key))
    product = op.Div(op.ReduceSum(op.Mul(k, q), [-1], keepdims=1), root)
    gate = op.Sigmoid(op.Mul(op.Sign(product), op.Sqrt(op.Max(op.Abs(product), 1e-6))))
    y = op.Mul(op.Unsqueeze(value, [2]), gate)
    return y, rms_normalized(op, y, out_scale, epsilon)[0] if out_scale else None


@composition("HyperConnectionPreMix", domain=DOMAIN)
def hyper_connection_pre_mix(op: Emitter, node: Node) -> Sequence[str]:
    """The sum over branches of streams times their gates."""
    streams, gates = node.inputs
    grouped = _branches(op, node, streams)
    mixed = op.Mul(grouped, _gates(op, op.cast_like(gates, streams), grouped))
    total = op.ReduceSum(mixed, [-2], keepdims=0)
    scale = node.attribute("reduction_scale", 1.0)
    return (total if scale == 1.0 else op.Mul(total, scale),)


@composition("HyperConnectionPostMix", domain=DOMAIN)
def hyper_connection_post_mix(op: Emitter, node: Node) -> Sequence[str]:
    """Streams mixed with each other, plus the block's output times the gate of each branch."""
    streams, block, gates, mix = (node.input(index) for index in range(4))
    grouped = _branches(op, node, streams)
    mixed = op.MatMul(op.transposed(op.cast_like(mix, streams)), grouped) if mix else grouped
    injected = op.Mul(op.Unsqueeze(block, [-2]), _gates(op, op.cast_like(gates, streams), grouped))
    return (op.reshape_like(op.Add(mixed, injected), streams),)


def _branches(op: Emitter, node: Node, streams: str) -> str:
    """(..., branches, features), which flat streams have in one axis."""
    count = node.attribute("num_branches", 0)
    return (
        op.Reshape(streams, op.Concat(op.Slice(op.dims(streams), [0], [-1]), [count, -1], axis=0)) if count else streams
    )


def _gates(op: Emitter, gates: str, grouped: str) -> str:
    """One per branch, or one per branch and feature, as (..., branches, 1 or features)."""
    if op.rank(gates) == op.rank(grouped):
        return gates
    dims = op.dims(grouped)
    lead = op.Slice(dims, [0], [-1])
    return op.Reshape(gates, op.Concat(lead, [-1], axis=0))


@composition("ComplexMul", "ComplexMulConj", domain=DOMAIN)
def complex_mul(op: Emitter, node: Node) -> Sequence[str]:
    """(a + bi)(c + di), or with the second factor conjugated; real and imaginary parts lie along the last axis."""
    (a, b), (c, d) = (op.emit("Split", x, outputs=2, axis=-1, num_outputs=2) for x in node.inputs)
    d = op.Neg(d) if node.proto.op_type == "ComplexMulConj" else d
    real = op.Sub(op.Mul(a, c), op.Mul(b, d))
    return (op.Concat(real, op.Add(op.Mul(a, d), op.Mul(b, c)), axis=-1),)


# -- matrices, distances, transforms
# -------------------------------------------------------------------------------------------------------------


@rule("Inverse", domain=DOMAIN)
def inverse(op: Emitter, node: Node, g: str) -> Gradients:
    """dX = -Y^T G Y^T."""
    turned = op.transposed(node.outputs[0])
    return (op.Neg(op.MatMul(op.MatMul(turned, g), turned)),)


@composition("CDist", domain=DOMAIN)
def cdist(op: Emitter, node: Node) -> Sequence[str]:
    """(rows of A, rows of B)."""
    a, b = node.inputs
    metric = node.attribute("metric", "sqeuclidean")
    if metric not in ("sqeuclidean", "euclidean"):
        raise Refusal(f"the metric '{metric}' is not known", "use 'euclidean' or 'sqeuclidean'")
    difference = op.Sub(op.Unsqueeze(a, [1]), op.Unsqueeze(b, [0]))
    norm = op.ReduceSumSquare if metric == "sqeuclidean" else op.ReduceL2
    return (norm(difference, [2], keepdims=0),)


@composition("Rfft", domain=DOMAIN)
def rfft(op: Emitter, node: Node) -> Sequence[str]:
    """Real and imaginary parts of half the spectrum, as a product with a constant matrix."""
    size = _signal_size(op, node, op.shape(node.inputs[0]), -1)
    spectrum = np.fft.rfft(np.eye(size))
    matrix = np.stack([spectrum.real, spectrum.imag], -1).reshape(size, -1)
    flat = op.MatMul(node.inputs[0], matrix.astype(op.numpy_dtype(node.inputs[0])))
    lead = op.Slice(op.dims(node.inputs[0]), [0], [-1])
    return (op.Reshape(flat, op.Concat(lead, [size // 2 + 1, 2], axis=0)),)


@composition("Irfft", domain=DOMAIN)
def irfft(op: Emitter, node: Node) -> Sequence[str]:
    """The signal that has the spectrum."""
    x = node.inputs[0]
    half = _signal_size(op, node, op.shape(x), -2)
    size = 2 * (half - 1)
    parts = np.eye(2 * half).reshape(2 * half, half, 2)
    matrix = np.fft.irfft(parts[..., 0] + 1j * parts[..., 1], size)
    flat = op.Reshape(x, op.Concat(op.Slice(op.dims(x), [0], [-2]), [2 * half], axis=0))
    return (op.MatMul(flat, matrix.astype(op.numpy_dtype(x))),)


def _signal_size(op: Emitter, node: Node, shape: Shape | None, axis: int) -> int:
    size = shape[axis] if shape is not None else None
    if node.attribute("signal_ndim", 1) != 1 or not isinstance(size, int):
        raise Refusal("a transform along several axes, or of unknown length", "fix the length of the signal")
    return size


# -- moves and samples
# -------------------------------------------------------------------------------------------------------------


@composition("UnfoldTensor", domain=DOMAIN)
def unfold_tensor(op: Emitter, node: Node) -> Sequence[str]:
    """All windows of one axis; what is inside a window comes last."""
    x, size, step = node.inputs[0], node.attribute("size"), node.attribute("step", 1)
    rank = op.rank(x)
    axis = node.attribute("dim", -1) % rank
    count = op.Add(op.Div(op.Sub(op.dim(x, axis), [size]), [step]), [1])
    starts = op.Unsqueeze(op.Mul(counted(op, count), [step]), [1])
    windows = op.Gather(x, op.Add(starts, np.arange(size)), axis=axis)
    return (op.Transpose(windows, perm=[*range(axis + 1), *range(axis + 2, rank + 1), axis + 1]),)


@composition("CropAndResize", domain=DOMAIN)
def crop_and_resize(op: Emitter, node: Node) -> Sequence[str]:
    """Corners of a box are corners of its crop; what lies outside of the image has a value of its own."""
    x, boxes, batches, sizes = node.inputs
    count = op.dim(boxes, 0)
    sizes = op.Cast(sizes, to=TensorProto.INT64)
    rows, columns = (_places(op, boxes, op.Slice(sizes, [axis], [axis + 1]), axis) for axis in range(2))
    shape = op.Concat(count, sizes, axis=0)
    rows, columns = op.Expand(op.Unsqueeze(rows, [2]), shape), op.Expand(op.Unsqueeze(columns, [1]), shape)
    grid = op.Concat(*(op.Unsqueeze(op.Sub(op.Mul(place, 2.0), 1.0), [3]) for place in (columns, rows)), axis=3)
    mode = node.attribute("mode", "bilinear")
    sampled = op.GridSample(op.Gather(x, batches, axis=0), grid, align_corners=1, mode=mode, padding_mode="border")
    inside = [op.And(op.GreaterOrEqual(place, 0.0), op.LessOrEqual(place, 1.0)) for place in (rows, columns)]
    return (op.Where(op.Unsqueeze(op.And(*inside), [1]), sampled, node.attribute("extrapolation_value", 0.0)),)


def _places(op: Emitter, boxes: str, size: str, axis: int) -> str:
    """Where the samples of each box (row) lie along an axis, from 0 to 1; the middle where there is but one."""
    low, high = (op.Slice(boxes, [index], [index + 1], [1]) for index in (axis, axis + 2))
    one = op.array(np.array([1], np.int64))
    last = op.cast_like(op.Max(op.Sub(size, one), one), boxes)
    steps = op.Div(op.cast_like(counted(op, size), boxes), last)
    steps = op.Where(op.Equal(size, one), 0.5, steps)
    return op.Add(low, op.Mul(op.Sub(high, low), op.Unsqueeze(steps, [0])))


@rule("NGramRepeatBlock", domain=DOMAIN)
def ngram_repeat_block(op: Emitter, node: Node, g: str) -> Gradients:
    """Scores pass as they are, except those that are set to minus infinity."""
    return None, op.Where(op.Equal(node.outputs[0], node.inputs[1]), g, 0)


@composition("CausalConvWithState", domain=DOMAIN)
def causal_conv_with_state(op: Emitter, node: Node) -> Sequence[str | None]:
    """A convolution of each channel over what came before, stored or zero."""
    x, kernel, bias, past = (node.input(index) for index in range(4))
    if node.attribute("ndim", 1) != 1 or node.attribute("state_window", 0) or node.attribute("channels_last", 0):
        raise Refusal("a causal convolution over several axes, or with a window of states", _WHOLE)
    shape, dilation = op.shape(kernel), node.attribute("dilation", 1)
    if shape is None or not isinstance(size := shape[2], int) or not isinstance(channels := shape[0], int):
        raise Refusal("the kernel's size is unknown", "store the kernel in the file")
    before = (size - 1) * dilation
    whole = op.Concat(past, x, axis=2) if past else op.Pad(x, [0, 0, before, 0, 0, 0])
    y = op.Conv(whole, kernel, bias, group=channels, dilations=[dilation], kernel_shape=[size])
    state = op.Slice(whole, op.Sub(op.dim(whole, 2), [before]), op.dim(whole, 2), [2])
    return silu(op, y) if node.attribute("activation", "none") in ("silu", "swish") else y, state


_WHOLE = "export the model with standard operators"
