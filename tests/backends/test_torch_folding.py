"""Folding batch normalization changes the graph, and nothing that it computes."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

from explainserve.backends.torch_folding import fold_batch_norm  # noqa: E402


def unlifted(module: Any) -> Any:
    program = torch.export.export(module.double().eval(), (torch.randn(2, 3, 7, 7, dtype=torch.float64),))
    return program.module(check_guards=False)


def norms(module: Any) -> int:
    return sum(node.target is torch.ops.aten.batch_norm.default for node in module.graph.nodes)


def trained_norm(channels: int, **options: Any) -> Any:
    norm = nn.BatchNorm2d(channels, **options)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.3, 2.0)
    return norm


class Shared(nn.Module):
    """Its convolution is also used without the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), trained_norm(4)

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        return y + self.norm(y)


CASES = {
    "with bias": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), trained_norm(4), nn.ReLU()), 0),
    "without bias": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), trained_norm(4)), 0),
    "without scale": (lambda: nn.Sequential(nn.Conv2d(3, 6, 1, groups=3), trained_norm(6, affine=False)), 0),
    "two": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), trained_norm(4), nn.Conv2d(4, 2, 3), trained_norm(2)), 0),
    "norm first": (lambda: nn.Sequential(trained_norm(3), nn.Conv2d(3, 4, 3)), 1),
    "shared": (Shared, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_stay(name: str) -> None:
    torch.manual_seed(3)
    make, left = CASES[name]
    module = make()
    before = unlifted(module)
    after = fold_batch_norm(unlifted(module))
    assert norms(after) == left
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(before(x))
    torch.testing.assert_close(after(x), before(x), rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(run(x), x, cotangent)[0] for run in (after, before)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
