"""Loops and branches exported by torch: our gradient against autograd."""

from __future__ import annotations

import warnings
from io import BytesIO
from typing import Any

import numpy as np
import onnx
import pytest

from explainserve.onnx_vjp import input_gradient
from onnx_vjp.vjp_oracle import run

torch = pytest.importorskip("torch")

from onnx_vjp.exports import exported  # noqa: E402  (it needs torch)

pytestmark = pytest.mark.torch


class Recurrence(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    """A choice in every step of a loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other = torch.nn.Parameter(torch.randn(4, 4) / 2), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(x.shape[1], 4)
        for step in range(x.shape[0]):
            h = torch.tanh(x[step].sum(1, keepdim=True) + h @ self.weight)
            if bool(h.sum() > 0):
                h = h * 2
            else:
                h = self.other(h)
        return h


class Growth(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    """How often it loops depends on the values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = 0
        while bool((x * x).sum() < 500.0):
            x, count = x * 1.5 + 0.1, count + 1
        return x * count


class Lists(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    """Every step appends to one list that is stacked and one that is concatenated."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, rows = [], []
        h = x[0]
        for step in range(x.shape[0]):
            h = torch.tanh(x[step] + h * 0.5)
            states.append(h)
            rows.append(h * x[step])
        return torch.stack(states).sum(0) * torch.cat(rows).exp().sum()


class Choice(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    def forward(self, x: Any) -> Any:
        return torch.cond(x.sum() > 0, lambda x: torch.tanh(self.first(x)), lambda x: self.second(x) ** 2, (x,))


def scripted(network: torch.nn.Module) -> onnx.ModelProto:
    buffer, x, names = BytesIO(), torch.randn(5, 2, 3), {"input_names": ["x"], "output_names": ["y"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"x": {0: "steps", 1: "rows"}}
        script = torch.jit.script(network)
        torch.onnx.export(script, (x,), buffer, dynamo=False, opset_version=17, dynamic_axes=axes, **names)
    return onnx.load_from_string(buffer.getvalue())


def check(network: torch.nn.Module, model: onnx.ModelProto, x: torch.Tensor) -> None:
    """The gradient of the exported file for a random cotangent is that of autograd."""
    x = x.requires_grad_(True)
    y = network(x)
    g = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, g)
    gradient = input_gradient(model, ["x"], "y")
    feeds = {"x": x.detach().numpy(), gradient.cotangent: g.numpy()}
    actual, dx = run(gradient.model, feeds, ["y", gradient.gradients["x"]])
    np.testing.assert_allclose(actual, y.detach().numpy(), 1e-5, 1e-5)
    np.testing.assert_allclose(dx, expected.numpy(), 1e-4, 1e-5)


@pytest.mark.parametrize("kind", [Recurrence, Growth, Lists], ids=lambda kind: kind.__name__)
def test_a_scripted_network_has_the_gradient_of_autograd(kind: type[torch.nn.Module]) -> None:
    torch.manual_seed(4)
    network = kind().eval()
    model = scripted(network)
    assert "Loop" in {node.op_type for node in model.graph.node}
    for sizes in ((5, 2, 3), (7, 3, 3)):
        check(network, model, torch.randn(sizes))


@pytest.mark.slow
def test_a_condition_on_values_has_the_gradient_of_autograd() -> None:
    torch.manual_seed(5)
    network, rows = Choice().eval(), torch.export.Dim("rows", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"input_names": ["x"], "output_names": ["y"]}
        program = torch.onnx.export(
            network, (torch.randn(5, 3),), dynamo=True, dynamic_shapes=({0: rows},), verbose=False, **names
        )
    assert "If" in {node.op_type for node in program.model_proto.graph.node}
    for sign in (1, -1):
        check(network, program.model_proto, sign * torch.rand(4, 3))


class Bags(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    """Weighted sums of embeddings. The newer exporter joins them in a Loop behind which no rank is known."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = torch.nn.EmbeddingBag(10, 4, mode="sum")
        self.head = torch.nn.Linear(4, 3, bias=False)
        self.ids, self.offsets = torch.tensor([1, 7, 7, 2, 9, 0, 4]), torch.tensor([0, 2, 5])

    def forward(self, x: torch.Tensor) -> Any:
        return torch.tanh(self.head(self.bags(self.ids, self.offsets, per_sample_weights=x).unsqueeze(1)))


def test_a_product_of_an_unknown_rank_has_the_gradient_of_autograd() -> None:
    torch.manual_seed(6)
    network, x = Bags().eval(), torch.randn(7)
    model = exported(network, {"x": x}, "dynamo18", {})
    assert "Loop" in {node.op_type for node in model.graph.node}
    check(network, model, x)
