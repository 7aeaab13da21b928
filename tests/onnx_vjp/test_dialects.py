"""Graphs as TensorFlow, PaddlePaddle and scikit-learn converters write them, against autograd of the same graphs."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from explainserve.onnx_vjp import input_gradient
from onnx_vjp import dialect_graphs
from onnx_vjp.dialect_graphs import graph
from onnx_vjp.precision import in_type
from onnx_vjp.reference import Reference
from onnx_vjp.vjp_oracle import run

torch = pytest.importorskip("torch")

from onnx_vjp.exports import distance  # noqa: E402  (they need torch)
from onnx_vjp.torch_interpreter import run_by_torch  # noqa: E402

pytestmark = pytest.mark.torch

PADDLE = (dialect_graphs.PADDLE, dialect_graphs.PADDLE_WEIGHTS, dialect_graphs.PADDLE_INTEGERS)
TENSORFLOW = (dialect_graphs.TENSORFLOW, dialect_graphs.TENSORFLOW_WEIGHTS, dialect_graphs.TENSORFLOW_INTEGERS)
SCIKIT_LEARN = (dialect_graphs.SCIKIT_LEARN, dialect_graphs.SCIKIT_LEARN_WEIGHTS, {})
# What is written, its shape at two sizes, and the operator sets in which the graph means the same.
DIALECTS = {
    "paddle": (PADDLE, ((2, 3, 20, 24), (3, 3, 33, 18)), (14, 17)),
    "tensorflow": (TENSORFLOW, ((2, 29, 32, 3), (3, 40, 31, 3)), (13, 17)),
    "scikit-learn": (SCIKIT_LEARN, ((2, 6), (5, 6)), (9, 17)),
}


@pytest.mark.parametrize(("name", "version"), [(name, v) for name, known in DIALECTS.items() for v in known[2]])
def test_a_dialect_has_the_gradient_of_autograd(name: str, version: int) -> None:
    written, shapes, _ = DIALECTS[name]
    model = graph(*written, version)
    gradient = input_gradient(model, ["image"], "scores")
    for shape in shapes:
        image = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        wide = image.double().requires_grad_(True)
        scores = run_by_torch(model, {"image": wide}, "scores")
        g = torch.randn(scores.shape, generator=torch.Generator().manual_seed(3))
        (expected,) = torch.autograd.grad(scores, wide, g.double())
        feeds = {"image": image.numpy(), gradient.cotangent: g.numpy()}
        names = ["scores", gradient.gradients["image"]]
        y, dx = run(gradient.model, feeds, names)
        assert distance(y, scores.detach().numpy()) < 1e-5
        assert distance(dx, expected.numpy()) < 1e-4
        double = input_gradient(in_type(model, TensorProto.DOUBLE), ["image"], "scores").model
        y, dx = Reference(double).run(names, {key: value.astype(np.float64) for key, value in feeds.items()})
        assert distance(dx, expected.numpy()) < 1e-9
