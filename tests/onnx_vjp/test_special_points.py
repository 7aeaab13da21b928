"""Ties, zeros and duplicates, where central differences say nothing: the gradient is torch's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from explainserve.onnx_vjp import input_gradient
from onnx_vjp.vjp_oracle import Feeds, run


def gradients(operator: str, feeds: Feeds, version: int = 21, **attributes: object) -> dict[str, np.ndarray]:
    """The gradient of the sum of squared differences of a single node's output from 0.25, by input."""
    nodes = [
        helper.make_node(operator, list(feeds), ["y"], **attributes),
        helper.make_node("Sub", ["y", "quarter"], ["z"]),
        helper.make_node("ReduceSumSquare", ["z"], ["loss"], keepdims=0),
    ]
    kinds = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in feeds.items()}
    floats = [name for name, value in feeds.items() if value.dtype.kind == "f"]
    inputs = [helper.make_tensor_value_info(name, kinds[name], feeds[name].shape) for name in floats]
    constants = [numpy_helper.from_array(value, name) for name, value in feeds.items() if name not in floats]
    constants.append(numpy_helper.from_array(np.array(0.25, np.float32), "quarter"))
    loss = helper.make_tensor_value_info("loss", TensorProto.FLOAT, [])
    model = helper.make_model(
        helper.make_graph(nodes, operator, inputs, [loss], constants),
        opset_imports=[helper.make_opsetid("", version)],
        ir_version=10,
    )
    gradient = input_gradient(model, floats, "loss")
    given = {name: feeds[name] for name in floats} | {gradient.cotangent: np.ones((), np.float32)}
    return dict(zip(floats, run(gradient.model, given, list(gradient.gradients.values())), strict=True))


def expected(function: Callable[..., torch.Tensor], *operands: np.ndarray) -> list[np.ndarray]:
    """The same by torch."""
    tensors = [torch.tensor(operand, requires_grad=True) for operand in operands]
    (function(*tensors) - 0.25).square().sum().backward()
    return [np.zeros_like(t.detach().numpy()) if t.grad is None else t.grad.numpy() for t in tensors]


def compare(actual: dict[str, np.ndarray], wanted: list[np.ndarray]) -> None:
    for (name, value), other in zip(actual.items(), wanted, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6, err_msg=name)


WITH_ZEROS = np.array([[0.0, 2.0, 0.0, 3.0], [1.5, 0.0, 2.0, 0.0], [2.0, 2.0, 0.0, -1.0]], np.float32)
INDICES = np.array([[0, 0, 1, 2], [0, 2, 1, 2], [1, 2, 1, 0]])


@pytest.mark.parametrize(("reduction", "torch_name"), [("mul", "prod"), ("max", "amax"), ("min", "amin")])
def test_scattered_zeros_and_ties(reduction: str, torch_name: str) -> None:
    updates = np.array([[0.0, 2.0, 0.0, 3.0], [2.0, 0.0, 0.0, 3.0], [1.5, 2.0, 1.0, -1.0]], np.float32)
    wanted = expected(
        lambda x, u: x.scatter_reduce(0, torch.tensor(INDICES), u, torch_name, include_self=True), WITH_ZEROS, updates
    )
    feeds = {"x": WITH_ZEROS, "i": INDICES, "u": updates}
    compare(gradients("ScatterElements", feeds, axis=0, reduction=reduction), wanted)


@pytest.mark.parametrize("axis", [0, 1])
def test_products_of_zeros(axis: int) -> None:
    wanted = expected(lambda x: torch.cumprod(x, axis), WITH_ZEROS)
    compare(gradients("CumProd", {"x": WITH_ZEROS, "a": np.array(axis)}, version=26), wanted)
    wanted = expected(lambda x: torch.prod(x, axis), WITH_ZEROS)
    compare(gradients("ReduceProd", {"x": WITH_ZEROS, "a": np.array([axis])}, keepdims=0), wanted)


def test_singular_matrices() -> None:
    rank_one = np.outer([1.0, 2.0, 3.0], [2.0, -1.0, 1.0]).astype(np.float32)
    rank_two = np.array([[1, 2, 3], [4, 5, 6], [5, 7, 9]], np.float32)
    both = np.stack([rank_one, rank_two])
    cofactors = np.stack([np.zeros((3, 3)), [[3, -6, 3], [3, -6, 3], [-3, 6, -3]]])
    (actual,) = gradients("Det", {"x": both}).values()
    np.testing.assert_allclose(actual, 2 * (0 - 0.25) * cofactors, atol=1e-4)
