"""Networks as torch writes them to ONNX, and torch's own gradient of the same weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO

import numpy as np
import onnx
import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Axes = Mapping[str, Mapping[int, str]]
"""The dynamic axes of each input, with their names."""


def exported(net: nn.Module, inputs: Inputs, exporter: str, dynamic: Axes) -> onnx.ModelProto:
    """The network as ONNX, its inputs named as in `inputs` and its output `y`.

    `exporter` is "legacy" or "dynamo" with the operator set behind: "legacy11".
    """
    names = {"input_names": list(inputs), "output_names": ["y"]}
    version = int(exporter.lstrip("legacydnmo"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter.startswith("dynamo"):
            free = torch.export.Dim.DYNAMIC
            shapes = tuple(dict.fromkeys(dynamic.get(name, ()), free) for name in inputs)
            options = {"dynamo": True, "verbose": False, "opset_version": version, "dynamic_shapes": shapes}
            program = torch.onnx.export(net, tuple(inputs.values()), **options, **names)
            assert program is not None
            return program.model_proto
        buffer = BytesIO()
        options = {"dynamo": False, "opset_version": version, "dynamic_axes": {k: dict(v) for k, v in dynamic.items()}}
        torch.onnx.export(net, tuple(inputs.values()), buffer, **options, **names)
        return onnx.load_from_string(buffer.getvalue())


def in_float64(net: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """A copy of the network and its inputs in float64."""
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    return copy.deepcopy(net).double(), wide


def _hard_sigmoid(x: Tensor) -> Tensor:
    return torch.clamp(x * float(np.float32(1 / 6)) + 0.5, 0, 1)


def _selu(x: Tensor) -> Tensor:
    alpha, gamma = float(np.float32(1.6732632423543772)), float(np.float32(1.0507009873554805))
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(torch.clamp(x, max=0)))


_STORED: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Hardsigmoid: _hard_sigmoid,
    nn.Hardswish: lambda x: x * _hard_sigmoid(x),
    nn.SELU: _selu,
}


def as_stored(net: nn.Module) -> nn.Module:
    """The network with the constants that its file holds: attributes are float32, and round the sixth of hard sigmoid
    and the slopes of SELU.
    """
    stored = copy.deepcopy(net)
    for module in stored.modules():
        if type(module) in _STORED:
            module.forward = _STORED[type(module)]  # type: ignore[assignment]
    return stored


def autograd(
    net: nn.Module, inputs: Inputs, cotangent: Tensor, wrt: Sequence[str], layout: torch.memory_format
) -> list[np.ndarray]:
    """The vector-Jacobian product of each input of `wrt`, images and kernels in the given layout."""
    net = copy.deepcopy(net)
    for weight in net.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=layout)
    leaves = {name: value.clone() for name, value in inputs.items()}
    for name in wrt:
        leaf = leaves[name]
        leaves[name] = (leaf.contiguous(memory_format=layout) if leaf.ndim == 4 else leaf).requires_grad_(True)
    scores = net(*leaves.values())
    return [g.numpy() for g in torch.autograd.grad(scores, [leaves[name] for name in wrt], cotangent.to(scores))]


def calibrated(net: nn.Module, inputs: Inputs) -> nn.Module:
    """The network in evaluation mode, with batch statistics of its inputs and affine maps that are not the identity."""
    generator = torch.Generator().manual_seed(9)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None  # the plain mean of what it sees
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.uniform_(-0.3, 0.3, generator=generator)
    with torch.no_grad():
        net.train()(*inputs.values())
    return net.eval().requires_grad_(False)


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """|actual - expected| / |expected|."""
    return float(np.linalg.norm(np.ravel(actual - expected)) / np.linalg.norm(np.ravel(expected)))
