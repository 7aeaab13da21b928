"""Networks of the sizes that people serve, at 224 pixels: our float32 gradient against that of torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from explainserve.onnx_vjp import GradientGraph, input_gradient
from onnx_vjp.vjp_oracle import run

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from networks import resnet50, vit_small  # noqa: E402  (they need torch)
from onnx_vjp.exports import autograd, calibrated, distance, exported, in_float64  # noqa: E402
from onnx_vjp.networks import attention, convolutional  # noqa: E402

nn = torch.nn
pytestmark = [pytest.mark.torch, pytest.mark.slow]

FULL: dict[str, Callable[[], nn.Module]] = {
    "convnext": lambda: convolutional.convnext(96, (3, 3, 9), 1000),
    "densenet": lambda: convolutional.densenet((6, 12), 32, 64, 1000),
    "efficientnet": lambda: convolutional.efficientnet(32, 1000),
    "mobilenet_v3": convolutional.mobilenet_v3_large,
    "resnet50": resnet50,
    "swin": lambda: attention.Swin(96, (3, 6), 7, (2, 2), 1000),
    "unet": lambda: convolutional.UNet(16),
    "vgg": lambda: convolutional.vgg((64, 128, 256, 512, 512), 1000, 224),
    "vit": vit_small,
}


def image(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, 3, 224, 224, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "exporter"), [*((name, "legacy17") for name in FULL), ("mobilenet_v3", "dynamo18")])
def test_a_network_of_full_size_has_the_gradient_of_autograd(name: str, exporter: str) -> None:
    torch.manual_seed(1)
    net = calibrated(FULL[name](), {"x": image(7, 2)})
    gradient = input_gradient(exported(net, {"x": image(0)}, exporter, {"x": {0: "rows"}}), ["x"], "y")
    # A unit within rounding of its kink falls on either side of it by chance: one of a few images has to agree.
    assert any(agrees(net, gradient, seed) for seed in range(3))


def agrees(net: nn.Module, gradient: GradientGraph, seed: int) -> bool:
    """Whether the gradient at one image is as exact as that of torch in float32."""
    inputs = {"x": image(seed)}
    scores = net(inputs["x"])
    g = torch.randn(scores.shape, generator=torch.Generator().manual_seed(3))
    (expected,) = autograd(*in_float64(net, inputs), g, ["x"], torch.contiguous_format)
    feeds = {"x": inputs["x"].numpy(), gradient.cotangent: g.numpy()}
    (dx,) = run(gradient.model, feeds, [gradient.gradients["x"]])
    theirs = [
        distance(autograd(net, inputs, g, ["x"], layout)[0], expected)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    return distance(dx, expected) <= max(2 * max(theirs), 1e-4)
