"""The model-zoo graphs inside the onnx package, with random weights, against autograd of the same graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, numpy_helper

from explainserve.onnx_vjp import GradientGraph, input_gradient
from onnx_vjp.vjp_oracle import run

torch = pytest.importorskip("torch")

from onnx_vjp.exports import distance  # noqa: E402  (they need torch)
from onnx_vjp.torch_interpreter import run_by_torch  # noqa: E402

pytestmark = pytest.mark.torch

FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
NAMES = sorted(path.stem.removeprefix("light_") for path in FOLDER.glob("light_*.onnx"))
QUICK = ("squeezenet",)


def test_there_are_nine() -> None:
    assert len(NAMES) == 9


def with_weights(name: str) -> onnx.ModelProto:
    """The graph with random numbers in place of the constants that stand for its weights."""
    model = onnx.load(FOLDER / f"light_{name}.onnx")
    graph, generator = model.graph, np.random.default_rng(11)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers = {name: (node, place) for node in graph.node for place, name in enumerate(node.input)}
    kept = []
    for node in graph.node:
        if node.op_type == "ConstantOfShape":
            value = _weights(generator, shapes[node.input[0]], *readers[node.output[0]])
            graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), node.output[0]))
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    return model


def _weights(generator: np.random.Generator, shape: np.ndarray, reader: NodeProto, place: int) -> np.ndarray:
    """Kernels that keep the variance, scales and variances near 1, all else near 0."""
    if len(shape) > 1:
        return generator.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    near_one = place in (1, 4) if reader.op_type == "BatchNormalization" else reader.op_type in ("Mul", "Unsqueeze")
    return generator.uniform(0.5, 1.5, shape) if near_one else 0.1 * generator.standard_normal(shape)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_a_graph_of_the_model_zoo_has_the_gradient_of_autograd(name: str) -> None:
    model = with_weights(name)
    weights = {tensor.name for tensor in model.graph.initializer}
    (source,) = [value.name for value in model.graph.input if value.name not in weights]
    last = model.graph.node[-1]
    of = last.input[0] if last.op_type == "Softmax" else last.output[0]  # probabilities of noise are 0 or 1
    gradient = input_gradient(model, [source], of)
    # A unit within rounding of its kink falls on either side of it by chance: one of a few images has to agree.
    assert any(agrees(model, gradient, source, of, seed) for seed in range(4))


def agrees(model: onnx.ModelProto, gradient: GradientGraph, source: str, of: str, seed: int) -> bool:
    """Whether the gradient at one image is as exact as that of torch in float32."""
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((1, 3, 224, 224)).astype(np.float32))
    wide, narrow = x.double().requires_grad_(True), x.clone().requires_grad_(True)
    scores = run_by_torch(model, {source: wide}, of)
    g = torch.randn(scores.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (expected,) = torch.autograd.grad(scores, wide, g)
    (theirs,) = torch.autograd.grad(run_by_torch(model, {source: narrow}, of), narrow, g.float())
    feeds = {source: x.numpy(), gradient.cotangent: g.float().numpy()}
    (dx,) = run(gradient.model, feeds, [gradient.gradients[source]])
    return distance(dx, expected.numpy()) <= max(2 * distance(theirs.numpy(), expected.numpy()), 1e-4)


def test_a_graph_of_the_model_zoo_is_differentiated_as_it_is() -> None:
    model = onnx.load(FOLDER / "light_squeezenet.onnx")
    gradient = input_gradient(model, ["data_0"], model.graph.output[0].name)
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in gradient.model.graph.input
    }
    feeds = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    (dx,) = run(gradient.model, feeds, [gradient.gradients["data_0"]])
    assert dx.shape == (1, 3, 224, 224)
    assert np.isfinite(dx).all()
