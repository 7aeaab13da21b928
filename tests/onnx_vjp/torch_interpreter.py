"""ONNX graphs run by torch, operator by operator: autograd of files that no torch network stands behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor
from torch.nn import functional

Attributes = Mapping[str, Any]
Operator = Callable[..., Tensor]


def run_by_torch(model: onnx.ModelProto, feeds: Mapping[str, Tensor], of: str) -> Tensor:
    """The tensor `of` of the graph, weights in the floating-point type of the feeds."""
    dtype = next(value.dtype for value in feeds.values())
    values: dict[str, Any] = {"": None, **feeds}
    for tensor in model.graph.initializer:
        value = torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
        values[tensor.name] = value.to(dtype) if value.is_floating_point() else value
    for node in model.graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        result = OPERATORS[node.op_type](attributes, *(values[name] for name in node.input))
        values[node.output[0]] = result
    result = values[of]
    assert isinstance(result, Tensor)
    return result


def _padding(attributes: Attributes, x: Tensor, kernel: list[int]) -> list[int]:
    """The margins as torch's pad has them: last axis first, before and after."""
    rank = len(kernel)
    strides, dilations = attributes.get("strides") or [1] * rank, attributes.get("dilations") or [1] * rank
    pads = list(attributes.get("pads") or [0] * 2 * rank)
    mode = attributes.get("auto_pad", b"NOTSET").decode()
    if mode.startswith("SAME"):
        spans = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
        totals = [
            max((-(-size // stride) - 1) * stride + span - size, 0)
            for size, stride, span in zip(x.shape[2:], strides, spans, strict=True)
        ]
        odd = [total % 2 for total in totals]
        before = [total // 2 + (extra if mode == "SAME_LOWER" else 0) for total, extra in zip(totals, odd, strict=True)]
        pads = before + [total - first for total, first in zip(totals, before, strict=True)]
    return [pads[axis + end * rank] for axis in reversed(range(rank)) for end in (0, 1)]


def conv(attributes: Attributes, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = kernel.ndim - 2
    padded = functional.pad(x, _padding(attributes, x, list(kernel.shape[2:])))
    strides, dilations = attributes.get("strides") or [1] * rank, attributes.get("dilations") or [1] * rank
    convolve = functional.conv2d if rank == 2 else functional.conv1d
    return convolve(padded, kernel, bias, strides, 0, dilations, attributes.get("group", 1))


def max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    kernel = list(attributes["kernel_shape"])
    padded = functional.pad(x, _padding(attributes, x, kernel), value=-torch.inf)
    return functional.max_pool2d(padded, kernel, list(attributes.get("strides") or [1] * len(kernel)))


def average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    """Sums over counts, which the margin takes part in or not."""
    kernel = list(attributes["kernel_shape"])
    margin, strides = _padding(attributes, x, kernel), list(attributes.get("strides") or [1] * len(kernel))
    counted = functional.pad(torch.ones_like(x), margin, value=float(attributes.get("count_include_pad", 0)))
    total = functional.avg_pool2d(functional.pad(x, margin), kernel, strides)
    return total / functional.avg_pool2d(counted, kernel, strides)


def batch_normalization(attributes: Attributes, x: Tensor, *statistics: Tensor) -> Tensor:
    scale, bias, mean, variance = statistics
    return functional.batch_norm(x, mean, variance, scale, bias, False, 0.0, attributes.get("epsilon", 1e-5))


def gemm(attributes: Attributes, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a @ (b.T if attributes.get("transB", 0) else b) + c


def local_response(attributes: Attributes, x: Tensor) -> Tensor:
    names = ("size", "alpha", "beta", "bias")
    return functional.local_response_norm(x, *(attributes[name] for name in names))


def flattened_softmax(attributes: Attributes, x: Tensor) -> Tensor:
    """As before operator set 13; for a matrix the same as since then."""
    axis = attributes.get("axis", 1)
    return torch.softmax(x.flatten(axis), -1).reshape(x.shape) if axis > 0 else torch.softmax(x, axis)


def reshape(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape.tolist())])


def pad(attributes: Attributes, x: Tensor, pads: Tensor) -> Tensor:
    amounts = pads.tolist()
    return functional.pad(x, [amounts[axis + end * x.ndim] for axis in reversed(range(x.ndim)) for end in (0, 1)])


def slice_(attributes: Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor) -> Tensor:
    for start, end, axis in zip(starts.tolist(), ends.tolist(), axes.tolist(), strict=True):
        x = x[(slice(None),) * (axis % x.ndim) + (slice(start, end),)]
    return x


def squeeze(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze(tuple(axes.tolist() if axes is not None else attributes["axes"]))


def unsqueeze(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    for axis in sorted(axes.tolist() if axes is not None else attributes["axes"]):
        x = x.unsqueeze(axis)
    return x


def hard_sigmoid(attributes: Attributes, x: Tensor) -> Tensor:
    return torch.clamp(x * attributes.get("alpha", 0.2) + attributes.get("beta", 0.5), 0.0, 1.0)


def resize(attributes: Attributes, x: Tensor, _: Any, __: Any, sizes: Tensor) -> Tensor:
    assert [attributes[name] for name in ("mode", "nearest_mode")] == [b"nearest", b"floor"]
    return functional.interpolate(x, sizes.tolist()[2:])


OPERATORS: dict[str, Operator] = {
    "Add": lambda _, a, b: a + b,
    "AveragePool": average_pool,
    "BatchNormalization": batch_normalization,
    "Clip": lambda _, x, low, high: torch.clamp(x, low, high),
    "Concat": lambda attributes, *parts: torch.cat(parts, attributes["axis"]),
    "Conv": conv,
    "Div": lambda _, a, b: a / b,
    "Dropout": lambda _, x, *__: x,
    "Gemm": gemm,
    "GlobalAveragePool": lambda _, x: x.mean((2, 3), keepdim=True),
    "HardSigmoid": hard_sigmoid,
    # Its function body stores the sixth in float32.
    "HardSwish": lambda _, x: x * hard_sigmoid({"alpha": float(np.float32(1 / 6))}, x),
    "LRN": local_response,
    "LeakyRelu": lambda attributes, x: functional.leaky_relu(x, attributes["alpha"]),
    "MatMul": lambda _, a, b: a @ b,
    "MaxPool": max_pool,
    "Mul": lambda _, a, b: a * b,
    "Pad": pad,
    "ReduceMean": lambda attributes, x: x.mean(tuple(attributes["axes"]), keepdim=bool(attributes.get("keepdims", 1))),
    "Relu": lambda _, x: torch.relu(x),
    "Reshape": reshape,
    "Resize": resize,
    "Shape": lambda _, x: torch.tensor(x.shape),
    "Slice": slice_,
    "Softmax": flattened_softmax,
    "Sqrt": lambda _, x: torch.sqrt(x),
    "Squeeze": squeeze,
    "Sub": lambda _, a, b: a - b,
    "Sum": lambda _, *parts: torch.stack(parts).sum(0),
    "Transpose": lambda attributes, x: x.permute(*attributes["perm"]),
    "Unsqueeze": unsqueeze,
}
