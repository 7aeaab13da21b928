"""The functions of the golden cases as networks: a name for each output, in every format that is served.

Networks are grouped by what an altered backward pass has rules for: rectifiers stand by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from models import Array, ModelCase, Port

Value = Callable[[torch.Tensor], torch.Tensor]
"""Rows of shape (n, elements) to values of shape (n,)."""

WEIGHTS = ((2.0, -3.0), (1.0, 2.0))
BIASES = (5.0, 0.0)
RIDGE, RIDGE_BIAS = (1.0, 2.0, -1.5), 0.3
_HALF = np.random.default_rng(31).standard_normal((3, 3)) / 2
MATRIX = np.float32(_HALF + _HALF.T)
VECTOR = np.float32([0.5, -1.0, 0.25])
SHIFT = np.float32([0.5, -1.0, 2.0, 0.125])
STEEP = ((200, 0.37), (200, 0.0371), (2000, 0.37), (20_000, 0.61803), (200_000, 0.61803))
"""Steepness and center of the transitions."""

BUMP_CENTER, BUMP_WIDTH = 0.3, 1e-3
IMAGE = (2, 4, 6)
IMAGE_WEIGHTS = np.random.default_rng(32).standard_normal(IMAGE).astype(np.float32)


class Outputs(nn.Module):
    """Values of one tensor, each an output of its own."""

    def __init__(self, values: dict[str, Value]) -> None:
        super().__init__()
        self._values = tuple(values.values())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(value(x) for value in self._values)


class Filters(nn.Module):
    """Three rectified filters over an image, their means, and a linear layer on these."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(33)
        self.filters = nn.Conv2d(IMAGE[0], 3, 3, padding=1)
        self.head = nn.Linear(3, 2)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.filters(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


def rectifiers(*, bias: bool) -> nn.Module:
    """Two hidden layers with random weights."""
    torch.manual_seed(34)
    layers = [nn.Linear(m, n, bias=bias) for m, n in ((8, 32), (32, 32), (32, 3))]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).requires_grad_(False)


def _functions() -> dict[str, Value]:
    """Of three elements; where a function has two, the third is a dummy."""
    matrix, vector = torch.from_numpy(MATRIX), torch.from_numpy(VECTOR)
    return {
        "product": lambda x: x[:, 0] * x[:, 1],
        "quadratic": lambda x: ((x @ matrix) * x).sum(1) / 2 + x @ vector,
        "monomial": lambda x: x[:, 0] * x[:, 0] * x[:, 1] * x[:, 1] * x[:, 1],
        "triple": lambda x: x[:, 0] * x[:, 1] * x[:, 2],
        "square_product": lambda x: x[:, 0] * x[:, 0] * x[:, 1],
        "minimum": lambda x: torch.minimum(x[:, 0], x[:, 1]),
        "maximum": lambda x: torch.maximum(x[:, 0], x[:, 1]),
        "exponential": lambda x: torch.exp(x[:, 0] + x[:, 1]),
        "sigmoid": lambda x: torch.sigmoid(x @ torch.tensor(RIDGE) + RIDGE_BIAS),
        "separable": lambda x: torch.sin(x[:, 0]) + torch.exp(x[:, 1]) + x[:, 2] * x[:, 2] * x[:, 2] / 3,
    }


def _rectified() -> dict[str, Value]:
    """Of two elements."""
    relu = torch.relu
    return {
        "saturated": lambda x: 1 - relu(1 - x[:, 0]),
        "capped": lambda x: 1 - relu(1 - x[:, 0] - x[:, 1]),
        "flat": lambda x: relu(relu(x[:, 0]) - 1 - relu(x[:, 1])),
        "nested": lambda x: relu(relu(x[:, 0] - 1) - relu(x[:, 1])),
    }


def _bump(x: torch.Tensor) -> torch.Tensor:
    """Along the diagonal x1 = x2 the gradient is (1 + s, -s), where s is a narrow triangle of area 1."""
    distance = (x[:, 0] - BUMP_CENTER).abs()
    height = torch.relu(1 - distance / BUMP_WIDTH) / BUMP_WIDTH
    return x[:, 0] + height * (x[:, 0] - x[:, 1])


def _axioms() -> dict[str, Value]:
    """Two outputs of one network of rectifiers with biases, and what is made of them."""
    net = rectifiers(bias=True)
    return {
        "first": lambda x: net(x)[:, 0],
        "second": lambda x: net(x)[:, 1],
        "mixed": lambda x: 2 * net(x)[:, 0] - 3 * net(x)[:, 1],
        "scaled": lambda x: 7 * net(x)[:, 0],
        "raised": lambda x: net(x)[:, 0] + 3,
        "reordered": lambda x: net(x.flip(1))[:, 0],
    }


def _shifted() -> dict[str, Value]:
    """Functions of x, and of x - SHIFT: the second is the first for inputs that have been shifted."""
    shift, weights = torch.from_numpy(SHIFT), torch.from_numpy(MATRIX[0, [0, 1, 2, 2]])

    def bent(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ weights) * x[:, 0]

    def straight(x: torch.Tensor) -> torch.Tensor:
        return x @ weights

    return {
        "bent": bent,
        "bent_shifted": lambda x: bent(x - shift),
        "straight": straight,
        "straight_shifted": lambda x: straight(x - shift),
    }


def _steep() -> dict[str, Value]:
    return {
        f"k{k}_c{center}": lambda x, k=k, center=center: torch.sigmoid(k * (x[:, 0] - center))  # type: ignore[misc]
        for k, center in STEEP
    }


def _image() -> dict[str, Value]:
    weights = torch.from_numpy(IMAGE_WEIGHTS)
    return {
        "straight": lambda x: (x * weights).sum((1, 2, 3)),
        "separable": lambda x: (x * x * x / 3 + x).sum((1, 2, 3)),
    }


def _of_outputs(name: str, size: int, values: Callable[[], dict[str, Value]]) -> ModelCase:
    outputs = tuple(Port(output, ()) for output in values())
    return ModelCase(name, (Port("x", (size,)),), outputs, lambda: Outputs(values()))


def _with_weights(layer: nn.Linear, weights: Any, biases: Any = 0.0) -> nn.Linear:
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weights))
        layer.bias.copy_(torch.as_tensor(biases))
    return layer


def _total(x: torch.Tensor) -> torch.Tensor:
    return x.sum(1)


def _image_port(layout: str = "NCHW") -> Port:
    return Port("x", IMAGE, extra=f'layout = "{layout}"')


_CASES = (
    ModelCase(
        "linear", (Port("x", (2,)),), (Port("y", (2,)),), lambda: _with_weights(nn.Linear(2, 2), WEIGHTS, BIASES)
    ),
    ModelCase(
        "ridge",
        (Port("x", (3,)),),
        (Port("y", (1,), extra='kind = "logits"\nactivation = "sigmoid"'),),
        lambda: _with_weights(nn.Linear(3, 1), [RIDGE], [RIDGE_BIAS]),
    ),
    _of_outputs("functions", 3, _functions),
    _of_outputs("rectified", 2, _rectified),
    _of_outputs("steep", 1, _steep),
    _of_outputs("bump", 2, lambda: {"y": _bump, "sum": _total}),
    _of_outputs("stairs", 1, lambda: {"step": lambda x: torch.floor(x[:, 0] + 0.5), "sum": _total}),
    _of_outputs("axioms", 8, _axioms),
    _of_outputs("shifted", 4, _shifted),
    ModelCase("relu", (Port("x", (5,)),), (Port("y", (5,)),), nn.ReLU),
    ModelCase("unbiased", (Port("x", (8,)),), (Port("y", (3,)),), lambda: rectifiers(bias=False)),
    _of_outputs("five", 5, lambda: {"total": _total, "square": lambda x: (x * x).sum(1)}),
    _of_outputs("hundred", 100, lambda: {"total": _total, "square": lambda x: (x * x).sum(1)}),
    replace(_of_outputs("image", 0, _image), inputs=(_image_port(),)),
    ModelCase("filters", (_image_port(),), (Port("y", (2,)),), Filters),
)

NETWORKS: dict[str, ModelCase] = {case.name: replace(case, traced=True) for case in _CASES}


def feature_maps(x: Array) -> Array:
    """The rectified filters of `filters` over one image, float64, shape (3, H, W)."""
    net = Filters().double()
    with torch.no_grad():
        return np.asarray(net.features(torch.from_numpy(x).double()[None])[0])


def head_weights() -> Array:
    """Of the linear layer of `filters`, float64, shape (outputs, 3)."""
    return np.asarray(Filters().head.weight.detach().double())
