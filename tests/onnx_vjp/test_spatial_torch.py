"""Spatial operators beside torch, corners and ties included."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from explainserve.onnx_vjp import input_gradient
from onnx_vjp.operator_cases import single
from onnx_vjp.vjp_oracle import run

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.torch

_rng = np.random.default_rng(11)


def _x(*shape: int) -> np.ndarray:
    return _rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("mode", "padding", "aligned"),
    [*product(("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection"), (False, True))],
)
def test_grid_sample_agrees_with_torch(mode: str, padding: str, aligned: bool) -> None:
    x, grid = _x(2, 3, 4, 5), _x(2, 6, 4, 2)
    grid[0, 0] = [[-1, -1], [1, 1], [-1, 1], [0, 0]]
    case = single(
        "GridSample", {"x": x, "g": grid}, mode=mode, padding_mode=padding, align_corners=int(aligned), version=16
    )
    image, points = (torch.tensor(value, requires_grad=True) for value in (x, grid))
    y = torch.nn.functional.grid_sample(image, points, mode, padding, aligned)
    cotangent = _x(*y.shape)
    y.backward(torch.tensor(cotangent))
    gradient = input_gradient(case.model, ["x", "g"], "y0")
    feeds = {**case.feeds, gradient.cotangents["y0"]: cotangent}
    dx, dgrid = run(gradient.model, feeds, [gradient.gradients[name] for name in ("x", "g")])
    np.testing.assert_allclose(dx, image.grad.numpy(), atol=1e-4)
    np.testing.assert_allclose(dgrid, points.grad.numpy(), atol=1e-4)
