"""Ties, zeros and duplicates, where central differences say nothing: the gradient is torch's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx.parser
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


def test_exponents_of_zero() -> None:
    x, p = np.array([0.0, 0.0, 2.0], np.float32), np.array([0.0, 2.0, 0.0], np.float32)
    compare(gradients("Pow", {"x": x, "p": p}), expected(torch.pow, x, p))


@pytest.mark.parametrize("p", [1, 2])
def test_a_row_of_zeros_has_no_direction(p: int) -> None:
    x = np.array([[0, 0, 0], [1, -2, 2]], np.float32)
    wanted = expected(lambda x: torch.nn.functional.normalize(x, p=p, dim=1, eps=1e-30), x)
    compare({"x": gradients("LpNormalization", {"x": x}, p=p)["x"][1:]}, [wanted[0][1:]])
    assert not gradients("LpNormalization", {"x": x}, p=p)["x"][0].any()


def test_three_ties_share_alike() -> None:
    a, b, c = np.array([[1.0], [2.0]], np.float32), np.ones(2, np.float32), np.array(1.0, np.float32)
    each, alone = 2 * (1 - 0.25) / 3, 2 * (2 - 0.25)
    found = gradients("Max", {"a": a, "b": b, "c": c})
    compare(found, [np.array([[2 * each], [2 * alone]]), np.array([each, each]), np.array(2 * each)])


def test_a_tied_window_gives_all_to_its_first_maximum() -> None:
    x = np.array([1, 1, 0, 2, 2, 2, 0, 0, 0, 3, 3, 1], np.float32).reshape(1, 1, 2, 6)
    wanted = expected(lambda x: torch.nn.functional.max_pool2d(x, 2), x)
    compare(gradients("MaxPool", {"x": x}, kernel_shape=[2, 2], strides=[2, 2]), wanted)
    wanted = expected(lambda x: torch.nn.functional.adaptive_max_pool2d(x, 1), x)
    compare(gradients("GlobalMaxPool", {"x": x}), wanted)


def test_a_tie_in_top_k_goes_to_what_was_returned() -> None:
    x = np.array([[3, 1, 3, 3, 2]], np.float32)
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18]> g (float[1, 5] x) => (float[1, 2] y, int64[1, 2] i) {
            k = Constant <value_ints = [2]> ()
            y, i = TopK (x, k)
        }"""
    )
    gradient = input_gradient(model, ["x"], "y")
    g = np.array([[1, 10]], np.float32)
    dx, indices = run(gradient.model, {"x": x, gradient.cotangent: g}, [gradient.gradients["x"], "i"])
    np.testing.assert_array_equal(indices, [[0, 2]])
    np.testing.assert_array_equal(dx, [[1, 0, 10, 0, 0]])


def test_rows_masked_as_a_whole() -> None:
    """As exporters write attention: what is NaN behind the softmax is replaced by zero."""
    text = """<ir_version: 8, opset_import: ["" : 18]> g (float[2, 3] x, float[2, 3] bias) => (float[2, 3] y) {
        s = Add (x, bias)
        p = Softmax (s)
        bad = IsNaN (p)
        zero = Constant <value_float = 0.0> ()
        y = Where (bad, zero, p)
    }"""
    gradient = input_gradient(onnx.parser.parse_model(text), ["x"], "y")
    x = np.array([[1, 2, 3], [0.5, 1, 2]], np.float32)
    bias = np.array([[-np.inf] * 3, [0, -np.inf, 0]], np.float32)
    g = np.array([[1, 2, 3], [1, 5, 3]], np.float32)
    (dx,) = run(gradient.model, {"x": x, "bias": bias, gradient.cotangent: g}, [gradient.gradients["x"]])
    p = 1 / (1 + np.exp(-1.5))
    np.testing.assert_allclose(dx, [[0, 0, 0], [-2 * p * (1 - p), 0, 2 * p * (1 - p)]], rtol=1e-5)


def test_corners_of_hard_swish() -> None:
    x = np.array([-3, 3], np.float32)
    compare(gradients("HardSwish", {"x": x}), expected(torch.nn.functional.hardswish, x))


@pytest.mark.parametrize("p", [1, 2, 3])
def test_a_window_of_zeros_has_no_direction(p: int) -> None:
    x = np.array([[0, 0, 1, 2], [0, 0, 2, 1]], np.float32).reshape(1, 1, 2, 4)
    wanted = expected(lambda x: torch.nn.functional.lp_pool2d(x, p, 2), x)
    compare(gradients("LpPool", {"x": x}, kernel_shape=[2, 2], strides=[2, 2], p=p), wanted)
    assert not gradients("GlobalLpPool", {"x": np.zeros_like(x)}, p=p)["x"].any()


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align_corners", [0, 1])
def test_samples_at_the_border_and_beyond(padding: str, align_corners: int) -> None:
    x = np.arange(1, 10, dtype=np.float32).reshape(1, 1, 3, 3)
    grid = np.array([[[[across, 0.1] for across in (-2.5, -1.5, -1, 1, 1.5, 2.5)]]], np.float32)
    wanted = expected(
        lambda x, grid: torch.nn.functional.grid_sample(x, grid, "bilinear", padding, bool(align_corners)), x, grid
    )
    attributes = {"mode": "linear", "padding_mode": padding, "align_corners": align_corners}
    found = gradients("GridSample", {"x": x, "grid": grid}, **attributes)
    for (name, value), other in zip(found.items(), wanted, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-4, atol=1e-4, err_msg=name)


def test_powers_of_what_is_not_positive_by_the_exponent() -> None:
    x, p = np.array([-2, 0, 0], np.float32), np.array([2, 2, -1], np.float32)
    assert not gradients("Pow", {"x": x, "p": p})["p"][:2].any()


@pytest.mark.parametrize(("operator", "slope"), [("LeakyRelu", 0.01), ("PRelu", 0.25)])
def test_leaky_rectifiers_take_nan_for_negative(operator: str, slope: float) -> None:
    constants = "s = Constant <value_floats = [0.25]> ()" if operator == "PRelu" else ""
    text = f"""<ir_version: 8, opset_import: ["" : 18]> g (float[1] x) => (float[1] y) {{
        {constants}
        y = {operator} (x{", s" if constants else ""})
    }}"""
    gradient = input_gradient(onnx.parser.parse_model(text), ["x"], "y")
    feeds = {"x": np.array([np.nan], np.float32), gradient.cotangent: np.ones(1, np.float32)}
    np.testing.assert_allclose(run(gradient.model, feeds, [gradient.gradients["x"]])[0], slope, rtol=1e-5)


def test_a_point_at_no_distance_pulls_nowhere() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1]> g (float[2, 3] a, float[2, 3] b) => (y) {
        y = com.microsoft.CDist <metric = "euclidean"> (a, b)
    }"""
    a, b = np.array([[1, 2, 3], [1, 1, 1]], np.float32), np.array([[1, 2, 3], [0, 0, 0]], np.float32)
    gradient = input_gradient(onnx.parser.parse_model(text), ["a", "b"], "y")
    feeds = {"a": a, "b": b, gradient.cotangent: np.ones((2, 2), np.float32)}
    found = dict(zip("ab", run(gradient.model, feeds, list(gradient.gradients.values())), strict=True))
    ta, tb = (torch.tensor(value, requires_grad=True) for value in (a, b))
    torch.cdist(ta, tb).sum().backward()
    compare(found, [ta.grad.numpy(), tb.grad.numpy()])


def test_statistics_of_another_type() -> None:
    """Batch normalization of half precision with statistics in single."""
    text = """<ir_version: 8, opset_import: ["" : 15]>
    g (float16[2, 3, 4] x, float16[3] s, float16[3] b, float[3] m, float[3] v) => (float16[2, 3, 4] y) {
        y = BatchNormalization (x, s, b, m, v)
    }"""
    generator = np.random.default_rng(0)
    half = {"x": generator.standard_normal((2, 3, 4)), "s": np.array([1.0, 2, 3]), "b": np.array([0.0, 1, 2])}
    feeds = {name: value.astype(np.float16) for name, value in half.items()}
    feeds |= {"m": np.array([0.1, 0.2, 0.3], np.float32), "v": np.array([1.0, 2, 4], np.float32)}
    gradient = input_gradient(onnx.parser.parse_model(text), list(feeds), "y")
    ones = np.ones((2, 3, 4), np.float16)
    names = list(gradient.gradients.values())
    found = dict(zip(feeds, run(gradient.model, {**feeds, gradient.cotangent: ones}, names), strict=True))
    assert {name: value.dtype for name, value in found.items()} == {name: value.dtype for name, value in feeds.items()}
    slope = feeds["s"] / np.sqrt(feeds["v"] + 1e-5)
    np.testing.assert_allclose(found["x"], ones * slope[:, None], rtol=1e-2)
    np.testing.assert_allclose(found["m"], -8 * slope, rtol=1e-2)
    np.testing.assert_allclose(found["b"], [8, 8, 8])
