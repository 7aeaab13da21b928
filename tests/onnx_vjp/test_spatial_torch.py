"""Spatial operators beside torch, corners and ties included."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from explainserve.onnx_vjp import input_gradient
from onnx_vjp.vjp_oracle import Case, run, single

torch = pytest.importorskip("torch")
F = torch.nn.functional

pytestmark = pytest.mark.torch

_rng = np.random.default_rng(11)


def _x(*shape: int) -> np.ndarray:
    return _rng.standard_normal(shape).astype(np.float32)


def _agree(case: Case, function: Callable[..., Any], tolerance: float = 1e-4) -> None:
    """The gradient of every float input, for one cotangent."""
    tensors = {name: torch.tensor(case.feeds[name], requires_grad=True) for name in case.wrt}
    y = function(*tensors.values())
    cotangent = _x(*y.shape)
    y.backward(torch.tensor(cotangent))
    gradient = input_gradient(case.model, case.wrt, "y0")
    feeds = {**case.feeds, gradient.cotangent: cotangent}
    values = run(gradient.model, feeds, [gradient.gradients[name] for name in case.wrt])
    for name, value in zip(case.wrt, values, strict=True):
        np.testing.assert_allclose(value, tensors[name].grad.numpy(), atol=tolerance, err_msg=name)


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
    _agree(case, lambda x, g: F.grid_sample(x, g, mode, padding, aligned))


@pytest.mark.parametrize("dynamic", [None, ()], ids=["static", "dynamic"])
def test_transposed_convolutions_agree_with_torch(dynamic: tuple[str, ...] | None) -> None:
    feeds = {"x": _x(2, 4, 5, 6), "w": _x(4, 3, 3, 2), "b": _x(6)}
    shape = {"strides": [2, 3], "pads": [1, 0, 1, 0], "output_padding": [1, 2], "dilations": [2, 1], "group": 2}
    case = single("ConvTranspose", feeds, kernel_shape=[3, 2], dynamic=dynamic, **shape)
    _agree(case, lambda x, w, b: F.conv_transpose2d(x, w, b, (2, 3), (1, 0), (1, 2), 2, (2, 1)), 1e-3)


@pytest.mark.parametrize("dynamic", [None, ()], ids=["static", "dynamic"])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), [(3, 2, 1, 1), (2, 2, 0, 1), (3, 1, 1, 2)])
def test_pooling_agrees_with_torch_at_ties(
    kernel: int, stride: int, padding: int, dilation: int, dynamic: tuple[str, ...] | None
) -> None:
    x = np.round(_x(2, 3, 9, 8))
    pads = [padding] * 4
    shape = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": pads, "dynamic": dynamic}
    pooled = single("MaxPool", {"x": x}, dilations=[dilation] * 2, **shape)
    _agree(pooled, lambda x: F.max_pool2d(x, kernel, stride, padding, dilation))
    for counted in (0, 1):
        averaged = single("AveragePool", {"x": x}, count_include_pad=counted, **shape)
        _agree(averaged, lambda x, c=counted: F.avg_pool2d(x, kernel, stride, padding, count_include_pad=bool(c)))


@pytest.mark.parametrize("version", [18, 21, 22])
@pytest.mark.parametrize(("kernel", "stride"), [((1, 1), (2, 3)), ((3, 1), (2, 2)), ((2, 2), (3, 5)), ((3, 3), (2, 2))])
@pytest.mark.parametrize("side", [7, 8])
def test_windows_that_would_start_behind_the_input_are_left_out(
    kernel: tuple[int, int], stride: tuple[int, int], side: int, version: int
) -> None:
    """ONNX's inference counts them below operator set 22."""
    x, shape = _x(2, 3, side, side), {"kernel_shape": list(kernel), "strides": list(stride), "ceil_mode": 1}
    pooled = single("MaxPool", {"x": x}, version=version, **shape)
    _agree(pooled, lambda x: F.max_pool2d(x, kernel, stride, ceil_mode=True))
    if version >= 19:
        averaged = single("AveragePool", {"x": x}, version=version, **shape)
        _agree(averaged, lambda x: F.avg_pool2d(x, kernel, stride, ceil_mode=True))


def test_unpooling_takes_the_indices_of_a_pooling() -> None:
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p", "i"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Mul", ["p", "p"], ["q"]),
        helper.make_node("MaxUnpool", ["q", "i", "shape"], ["y0"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    x = _x(2, 3, 7, 6)
    shape = numpy_helper.from_array(np.array(x.shape), "shape")
    declared = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * 4)
    result = helper.make_tensor_value_info("y0", TensorProto.FLOAT, [None] * 4)
    graph = helper.make_graph(nodes, "unpool", [declared], [result], [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    def unpooled(x: Any) -> Any:
        pooled, indices = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(pooled * pooled, indices, 2, output_size=x.shape)

    _agree(Case("unpool", model, {"x": x}), unpooled)
