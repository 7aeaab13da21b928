"""Architectures as torch exports them, in old and new operator sets: our gradient against autograd of the same weights.

In float32 the distance to torch in float64 is at most twice that of torch in float32; in float64 there is none, where
torch computes with the constants that the file holds.
"""

from __future__ import annotations

import copy

import onnx
import pytest

from explainserve.onnx_vjp import GradientGraph, input_gradient
from onnx_vjp.vjp_oracle import run

torch = pytest.importorskip("torch")

from onnx_vjp.architectures import ARCHITECTURES, Architecture, Size  # noqa: E402  (they need torch)
from onnx_vjp.exports import as_stored, autograd, calibrated, distance, exported, in_float64  # noqa: E402
from onnx_vjp.reference import Reference  # noqa: E402

nn = torch.nn
pytestmark = pytest.mark.torch

NEWEST = {name: f"legacy{known.legacy[-1]}" for name, known in ARCHITECTURES.items() if known.legacy}
LEGACY = [
    pytest.param(name, exporter, marks=() if exporter == NEWEST[name] and name != "swin" else pytest.mark.slow)
    for name, known in ARCHITECTURES.items()
    for exporter in (f"legacy{version}" for version in known.legacy)
]
# The newer exporter takes seconds per network.
QUICK = ("graph_convolution",)
DYNAMO = [
    pytest.param(name, f"dynamo{18 if index % 2 else 23}", marks=() if name in QUICK else pytest.mark.slow)
    for index, (name, known) in enumerate(ARCHITECTURES.items())
    if known.dynamo
]
# Of each kind of network one that is small enough for the reference evaluator.
WIDE = ("unet_bilinear", "detector", "volume_unet", "vgg", "mixer", "decoder", "lstm", "tabular", "wavenet")


def network(architecture: Architecture) -> nn.Module:
    torch.manual_seed(1)
    return calibrated(architecture.build(), architecture.inputs(architecture.sizes[0]))


def cotangent(scores: torch.Tensor) -> torch.Tensor:
    return torch.randn(scores.shape, generator=torch.Generator().manual_seed(3))


def differentiated(model: onnx.ModelProto) -> GradientGraph:
    gradient = input_gradient(model, ["x"], "y")
    onnx.checker.check_model(gradient.model)
    return gradient


def check_size(net: nn.Module, gradient: GradientGraph, architecture: Architecture, size: Size) -> None:
    """The gradient graph at one size, in float32, against torch in float64 and in float32."""
    inputs = architecture.inputs(size)
    g = cotangent(net(*inputs.values()))
    wide_net, wide_inputs = in_float64(net, inputs)
    (expected,) = autograd(wide_net, wide_inputs, g, ["x"], torch.contiguous_format)
    theirs = [
        distance(autograd(net, inputs, g, ["x"], layout)[0], expected)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    feeds = {name: value.numpy() for name, value in inputs.items()} | {gradient.cotangent: g.numpy()}
    y, dx = run(gradient.model, feeds, ["y", gradient.gradients["x"]])
    assert distance(y, wide_net(*wide_inputs.values()).numpy()) < 1e-4, "the exported file is another function"
    assert dx.shape == expected.shape
    assert distance(dx, expected) <= max(2 * max(theirs), 1e-4), f"torch in float32: {theirs}"


@pytest.mark.parametrize(("name", "exporter"), [*LEGACY, *DYNAMO])
def test_a_gradient_is_as_exact_as_that_of_torch(name: str, exporter: str) -> None:
    architecture = ARCHITECTURES[name]
    net = network(architecture)
    first, second = architecture.sizes
    gradient = differentiated(exported(net, architecture.inputs(first), exporter, architecture.dynamic))
    check_size(net, gradient, architecture, first)
    check_size(net, gradient, architecture, second)


@pytest.mark.parametrize(
    ("name", "exporter"),
    [pytest.param(*own, marks=() if own[0] in WIDE else pytest.mark.slow) for own in NEWEST.items()]
    + [pytest.param(name, "dynamo18", marks=pytest.mark.slow) for name in ("maxvit", "detector", "graph_convolution")],
)
def test_a_gradient_in_float64_is_that_of_torch(name: str, exporter: str) -> None:
    architecture = ARCHITECTURES[name]
    inputs = architecture.inputs(architecture.sizes[1])
    net, wide = in_float64(network(architecture), inputs)
    example = in_float64(net, architecture.inputs(architecture.sizes[0]))[1]
    gradient = differentiated(exported(copy.deepcopy(net), example, exporter, architecture.dynamic))
    scores = as_stored(net)(*wide.values())
    g = cotangent(scores).double()
    (expected,) = autograd(as_stored(net), wide, g, ["x"], torch.contiguous_format)
    feeds = {key: value.numpy() for key, value in wide.items()} | {gradient.cotangent: g.numpy()}
    y, dx = Reference(gradient.model).run(["y", gradient.gradients["x"]], feeds)
    assert distance(y, scores.numpy()) < 1e-9
    assert distance(dx, expected) < 1e-9
