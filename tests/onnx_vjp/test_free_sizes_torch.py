"""Torch's exports with free sizes that are cut or padded: one file's gradient against autograd at several sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import pytest

from explainserve.onnx_vjp import GradientGraph, input_gradient
from onnx_vjp.vjp_oracle import run

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional

from onnx_vjp.exports import autograd, distance, exported, in_float64  # noqa: E402  (it needs torch)

pytestmark = pytest.mark.torch


class FirstTokens(nn.Module):
    """Of a longer text, only the first 77 tokens count."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(x[:, :77])).mean(1))


class Windows(nn.Module):
    """Attention in windows of 7, to which an image is padded and from which it is cut back, as in Swin and ViTDet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.values, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        rows, height, width, channels = x.shape
        below, right = (7 - height % 7) % 7, (7 - width % 7) % 7
        y = F.pad(x, (0, 0, 0, right, 0, below))
        down, across = (height + below) // 7, (width + right) // 7
        y = y.view(rows, down, 7, across, 7, channels).permute(0, 1, 3, 2, 4, 5).reshape(-1, 49, channels)
        y = torch.softmax(y @ y.transpose(1, 2) / 8, -1) @ self.values(y)
        y = y.view(rows, down, across, 7, 7, channels).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(rows, height + below, width + right, channels)[:, :height, :width]
        return self.head((x + y).mean((1, 2)))


class Halved(nn.Module):
    """Half the size, rounded up, and resized back."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.interpolate(torch.tanh(self.down(x)), size=x.shape[2:], mode="bilinear", align_corners=False)
        return (self.up(y) * x).mean((2, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[int, str]]] = {
    "first tokens": (FirstTokens, (2, 90, 4), {0: "batch", 1: "length"}),
    "windows": (Windows, (2, 3, 20, 24), {0: "batch", 2: "height", 3: "width"}),
    "halved": (Halved, (2, 3, 20, 24), {0: "batch", 2: "height", 3: "width"}),
}
SHAPES = [
    *(("first tokens", (2, length, 4)) for length in (2, 10, 77, 90)),
    *((name, (2, 3, *sides)) for name in ("windows", "halved") for sides in ((28, 21), (20, 24), (5, 13))),
]


@cache
def differentiated(name: str, exporter: str) -> tuple[nn.Module, onnx.ModelProto, GradientGraph]:
    """The network, its file and its gradient graph."""
    torch.manual_seed(0)
    network, shape, axes = NETWORKS[name]
    net = network().eval().requires_grad_(False)
    model = exported(net, {"x": torch.randn(shape)}, exporter, {"x": axes})
    return net, model, input_gradient(model, ["x"], "y")


@pytest.mark.parametrize("exporter", ["legacy17", pytest.param("dynamo18", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "shape"), SHAPES, ids=lambda value: str(value))
def test_one_file_is_right_at_any_size(name: str, shape: tuple[int, ...], exporter: str) -> None:
    net, model, gradient = differentiated(name, exporter)
    x, g = torch.randn(shape), torch.randn(2, 3)
    feeds = {"x": x.numpy(), gradient.cotangent: g.numpy()}
    y, dx = run(gradient.model, feeds, ["y", gradient.gradients["x"]])
    np.testing.assert_allclose(y, run(model, {"x": x.numpy()}, ["y"])[0], atol=1e-6)
    wide, inputs = in_float64(net, {"x": x})
    (expected,) = autograd(wide, inputs, g, ["x"], torch.contiguous_format)
    assert distance(dx, expected) < 1e-5
