"""Small networks exported by torch: our float32 gradient against autograd in float64."""

from __future__ import annotations

import copy
import warnings
from io import BytesIO

import numpy as np
import onnx
import pytest

from explainserve.onnx_vjp import input_gradient
from onnx_vjp.vjp_oracle import run

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional

pytestmark = pytest.mark.torch


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
        self.down = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(), nn.AvgPool2d(2, 2, ceil_mode=True))
        self.skip = nn.Conv2d(8, 12, 1, 4)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = F.relu(x + self.body(x))
        return self.head(F.adaptive_avg_pool2d(self.down(x) + self.skip(x), 1).flatten(1))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 5, 2, 2, groups=8)
        self.squeeze, self.excite, self.head = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.hardswish(self.depth(F.relu6(self.expand(x))))
        x = x * F.hardsigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(F.interpolate(x, scale_factor=2.0, mode="bilinear")).mean((2, 3))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 8, 8)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 12)), nn.Parameter(torch.randn(1, 17, 12))
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(3))
        self.attention, self.up, self.down, self.head = (
            Attention(12, 3),
            nn.Linear(12, 24),
            nn.Linear(24, 12),
            nn.Linear(12, 5),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.attention(self.norms[0](x))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x)[:, 0])


class ShiftedWindows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 12, 4, 4), nn.LayerNorm(12)
        self.attention, self.merge, self.head = Attention(12, 2), nn.Linear(48, 16, bias=False), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        shifted = torch.roll(self.norm(x), (-2, -2), (1, 2))
        rows = shifted.reshape(-1, 2, 4, 2, 4, 12).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 12)
        back = self.attention(rows).reshape(-1, 2, 2, 4, 4, 12).permute(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, 12)
        x = x + torch.roll(back, (2, 2), (1, 2))
        merged = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.merge(merged).mean((1, 2)))


class LargeKernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth, self.norm = (
            nn.Conv2d(3, 8, 4, 4),
            nn.Conv2d(8, 8, 7, padding=3, groups=8),
            nn.LayerNorm(8),
        )
        self.up, self.down, self.scale = nn.Linear(8, 32), nn.Linear(32, 8), nn.Parameter(torch.full((8,), 0.3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.down(F.gelu(self.up(self.norm(self.depth(x).permute(0, 2, 3, 1))), approximate="tanh"))
        x = x + (y * self.scale).permute(0, 3, 1, 2)
        return self.head(x.amax((2, 3)))


NETWORKS = [Residual, SqueezeExcite, Transformer, ShiftedWindows, LargeKernel]


def exported(network: nn.Module, exporter: str) -> onnx.ModelProto:
    """The network as ONNX with a dynamic batch, input `x` and output `y`."""
    x, names = torch.randn(2, 3, 32, 32), {"input_names": ["x"], "output_names": ["y"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
            program = torch.onnx.export(network, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
            return program.model_proto
        buffer, axes = BytesIO(), {"x": {0: "batch"}, "y": {0: "batch"}}
        version = int(exporter.removeprefix("legacy"))
        torch.onnx.export(network, (x,), buffer, dynamo=False, opset_version=version, dynamic_axes=axes, **names)
        return onnx.load_from_string(buffer.getvalue())


# The newer exporter takes seconds per network.
EXPORTS = [
    pytest.param(kind, exporter, marks=pytest.mark.slow if exporter == "dynamo" and kind is not NETWORKS[0] else ())
    for kind in NETWORKS
    for exporter in ("dynamo", "legacy14", "legacy17")
]


@pytest.mark.parametrize(("kind", "exporter"), EXPORTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_torch_network_has_the_gradient_of_autograd(kind: type[nn.Module], exporter: str) -> None:
    torch.manual_seed(1)
    network = kind().eval()
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    model = exported(network, exporter)
    gradient = input_gradient(model, ["x"], "y")
    onnx.checker.check_model(gradient.model)
    for batch in (1, 3):
        x, cotangent = torch.randn(batch, 3, 32, 32), torch.randn(batch, 5)
        wide = x.double().requires_grad_(True)
        scores = copy.deepcopy(network).double()(wide)
        (expected,) = torch.autograd.grad((scores * cotangent).sum(), wide)
        feeds = {"x": x.numpy(), gradient.cotangent: cotangent.numpy()}
        y, dx = run(gradient.model, feeds, ["y", gradient.gradients["x"]])
        np.testing.assert_allclose(y, scores.detach().numpy(), rtol=1e-3, atol=1e-5)
        distance = np.linalg.norm(dx - expected.numpy()) / np.linalg.norm(expected.numpy())
        assert distance < 1e-4, f"batch of {batch}"


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_has_the_gradient_of_autograd(groups: int) -> None:
    torch.manual_seed(2)
    network = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=groups)
    x, holder = torch.randn(2, 4, 5, 6, requires_grad=True), nn.Sequential(network)
    y = network(x)
    cotangent = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, cotangent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = BytesIO()
        torch.onnx.export(holder, (x,), buffer, dynamo=False, opset_version=17, input_names=["x"], output_names=["y"])
    gradient = input_gradient(onnx.load_from_string(buffer.getvalue()), ["x"], "y")
    feeds = {"x": x.detach().numpy(), gradient.cotangent: cotangent.numpy()}
    (dx,) = run(gradient.model, feeds, [gradient.gradients["x"]])
    np.testing.assert_allclose(dx, expected.numpy(), rtol=1e-4, atol=1e-5)
