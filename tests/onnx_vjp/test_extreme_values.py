"""Large, small and cancelling values: a gradient is as near to the one in float64 as its type allows."""

from __future__ import annotations

from math import erf, pi, sqrt

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from explainserve.onnx_vjp import input_gradient
from onnx_graphs import model
from onnx_vjp.vjp_oracle import Feeds, run, run_reference

MAGNITUDES = np.array(
    [1e-30, 1e-20, 1e-10, 1e-6, 1e-4, 0.1, 0.45, 0.98, 1.02, 2.5, 3.1, 5, 7, 12, 17, 30, 80, 300, 6e4, 1e10, 1e20, 1e30]
)
DOMAINS = {"Acos": (-1, 1), "Asin": (-1, 1), "Atanh": (-1, 1), "Acosh": (1, 1e30), "Log": (0, 1e30), "Sqrt": (0, 1e30)}
OPERATORS = (
    *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cosh", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid"),
    *("HardSwish", "LeakyRelu", "Log", "Mish", "Reciprocal", "Relu", "Selu", "Shrink", "Sigmoid", "Sinh", "Softplus"),
    *("Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu"),
)


def of_one_node(operator: str, feeds: Feeds, version: int, attributes: dict[str, object]) -> onnx.ModelProto:
    node = helper.make_node(operator, list(feeds), ["y"], **attributes)
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    output = helper.make_tensor_value_info("y", inputs[0].type.tensor_type.elem_type, None)
    graph = helper.make_graph([node], operator, inputs, [output])
    plain = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=10)
    return onnx.shape_inference.infer_shapes(plain)


def gradient(
    operator: str, feeds: Feeds, g: np.ndarray, *, version: int = 22, native: bool = False, **attributes: object
) -> np.ndarray:
    """The gradient of the first input; `native` has every step computed in the model's own types."""
    wrt = next(iter(feeds))
    found = input_gradient(of_one_node(operator, feeds, version, attributes), [wrt], "y")
    evaluate = run_reference if native else run
    return evaluate(found.model, {**feeds, found.cotangent: g}, [found.gradients[wrt]])[0]


def slopes(operator: str, x: np.ndarray, **attributes: object) -> np.ndarray:
    version = 24 if operator == "Swish" else 22
    native = x.dtype != np.float32
    return gradient(operator, {"x": x}, np.ones_like(x), version=version, native=native, **attributes)


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("operator", OPERATORS)
def test_slopes_from_tiny_to_huge_values(operator: str, kind: type[np.floating]) -> None:
    low, high = DOMAINS.get(operator, (-1e30, 1e30))
    points = np.concatenate([-MAGNITUDES, MAGNITUDES])
    with np.errstate(over="ignore"):
        x = points[(points > low) & (points < high)].astype(kind)
    x = x[np.isfinite(x) & (x != 0)]
    found, exact = slopes(operator, x), slopes(operator, x.astype(np.float64))
    with np.errstate(over="ignore"):
        exact = exact.astype(kind)
    digits = 1e-4 if kind == np.float32 else 1e-2
    # What is left of a saturated slope is a difference of numbers near 1, and onnxruntime rounds its sigmoid further.
    np.testing.assert_allclose(found, exact, rtol=digits, atol=10 * np.finfo(kind).eps)


@pytest.mark.parametrize("points", [[-30.0, -20.0, -17.0, -14.0, -5.0], [0.5, 3.0]])
@pytest.mark.parametrize("operator", ["Elu", "Selu"])
def test_exponential_units_keep_their_slope_far_below_zero(operator: str, points: list[float]) -> None:
    x = np.array(points, np.float32)
    np.testing.assert_allclose(slopes(operator, x), slopes(operator, x.astype(np.float64)), rtol=1e-5)


@pytest.mark.parametrize(
    ("operator", "point"), [("Acosh", 1 + 3e-6), ("Atanh", 1 - 3e-6), ("Asin", 1 - 3e-6), ("Acos", 1 - 3e-6)]
)
def test_slopes_beside_a_pole(operator: str, point: float) -> None:
    x = np.array([point], np.float32)
    np.testing.assert_allclose(slopes(operator, x), slopes(operator, x.astype(np.float64)), rtol=1e-6)


@pytest.mark.parametrize(
    ("operator", "kind", "points"),
    [
        ("Asinh", np.float32, [1e20, -1e30]),
        ("Asinh", np.float16, [300, -6e4]),
        ("Atan", np.float16, [300, -400]),
        ("Softsign", np.float16, [300, -400]),
    ],
)
def test_squares_that_are_too_large_leave_the_slope(
    operator: str, kind: type[np.floating], points: list[float]
) -> None:
    x = np.array(points, kind)
    np.testing.assert_allclose(slopes(operator, x), slopes(operator, x.astype(np.float64)), rtol=1e-2)


@pytest.mark.parametrize(("kind", "digits"), [(np.float64, 6e-8), (np.float32, 4e-7), (np.float16, 2e-3)])
def test_gelu_has_the_slope_of_its_closed_form(kind: type[np.floating], digits: float) -> None:
    """The reference evaluator rounds Erf to float32, of float64 too."""
    x = np.linspace(-14, 14, 561).astype(kind)
    distribution = np.array([(1 + erf(value / sqrt(2))) / 2 for value in x])
    density = np.exp(-(x.astype(np.float64) ** 2) / 2) / sqrt(2 * pi)
    np.testing.assert_allclose(slopes("Gelu", x), distribution + x * density, rtol=0, atol=digits)


@pytest.mark.parametrize(
    ("kind", "huge"), [(np.float64, 1e300), (np.float32, 14), (np.float32, 1e38), (np.float16, 300), (np.float16, 6e4)]
)
def test_gelu_is_a_rectifier_far_out(kind: type[np.floating], huge: float) -> None:
    """The square that its slope is divided by the exponential of is too large a number there, or that is."""
    x = np.array([-huge, huge], kind)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(slopes("Gelu", x), [0, 1], rtol=0, atol=1e-40)


@pytest.mark.parametrize(("kind", "huge"), [(np.float32, 1e30), (np.float16, 300), (np.float16, 6e4)])
def test_gelu_by_tanh_is_a_rectifier_far_out(kind: type[np.floating], huge: float) -> None:
    x = np.array([-huge, huge], kind)
    np.testing.assert_array_equal(slopes("Gelu", x, approximate="tanh"), [0, 1])


def test_swish_is_a_rectifier_far_out() -> None:
    np.testing.assert_array_equal(slopes("Swish", np.array([-4e4, 4e4], np.float16), alpha=1.702), [0, 1])


COUNT = 70_000
"""More elements than float16 counts."""


@pytest.mark.parametrize("shape", [[COUNT], ["n"]])
@pytest.mark.parametrize("operator", ["ReduceMean", "GlobalAveragePool", "AveragePool"])
def test_a_mean_over_more_elements_than_the_type_can_count(operator: str, shape: list[int | str]) -> None:
    x = np.ones((1, 1, COUNT), np.float16)
    attributes = {"AveragePool": {"kernel_shape": [COUNT], "pads": [1, 0]}}.get(operator, {})
    plain = of_one_node(operator, {"x": x}, 18, attributes)
    plain.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT16, [1, 1, *shape]))
    del plain.graph.value_info[:]
    found = input_gradient(plain, ["x"], "y")
    feeds = {"x": x, found.cotangent: np.full((1, 1, 2 if operator == "AveragePool" else 1), 100, np.float16)}
    (dx,) = run_reference(found.model, feeds, [found.gradients["x"]])
    wanted = 100 / (COUNT - 1) + 100 / COUNT if operator == "AveragePool" else 100 / COUNT
    np.testing.assert_allclose(dx[0, 0, 1:-1], wanted, rtol=5e-3)


def test_the_mean_that_layer_normalization_returns() -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
    g (float16[1, {COUNT}] x, float16[{COUNT}] s) => (float[1, 1] mean) {{
        y, mean = LayerNormalization (x, s)
    }}"""
    found = input_gradient(onnx.parser.parse_model(text), ["x"], "mean")
    x = np.linspace(-1, 1, COUNT).astype(np.float16)
    feeds = {"x": x[None], "s": np.ones_like(x), found.cotangent: np.full((1, 1), 100, np.float32)}
    (dx,) = run_reference(found.model, feeds, [found.gradients["x"]])
    np.testing.assert_allclose(dx, 100 / COUNT, rtol=5e-3)


def standardized(x: np.ndarray, g: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The gradient through (x - mean) / deviation, in float64."""
    x, g = x.astype(np.float64), g.astype(np.float64)
    deviation = x.std(axes, keepdims=True)
    normal = (x - x.mean(axes, keepdims=True)) / deviation
    centred = g - g.mean(axes, keepdims=True) - normal * (g * normal).mean(axes, keepdims=True)
    return np.asarray(centred / deviation)


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_a_mean_far_from_zero_does_not_hide_the_variance() -> None:
    generator = np.random.default_rng(0)
    x = (1000 + 0.1 * generator.standard_normal((1, 2, 8, 8))).astype(np.float32)
    g = generator.standard_normal(x.shape).astype(np.float32)
    assert difference(gradient("MeanVarianceNormalization", {"x": x}, g), standardized(x, g, (0, 2, 3))) < 1e-3


@pytest.mark.parametrize("operator", ["InstanceNormalization", "GroupNormalization", "MeanVarianceNormalization"])
def test_half_precision_holds_the_variance_of_large_activations(operator: str) -> None:
    generator = np.random.default_rng(0)
    x = (2000 * generator.standard_normal((1, 2, 16, 16))).astype(np.float16)
    g = (100 * generator.standard_normal(x.shape)).astype(np.float16)
    affine = {"s": np.ones(2, np.float16), "b": np.zeros(2, np.float16)} if operator[0] in "IG" else {}
    attributes = {"num_groups": 2} if operator == "GroupNormalization" else {}
    found = gradient(operator, {"x": x, **affine}, g, native=True, **attributes)
    assert difference(found, standardized(x, g, (2, 3) if affine else (0, 2, 3))) < 5e-3


def test_half_precision_does_not_round_the_mean_of_a_layer() -> None:
    """It may lie between two numbers that float16 has, and is subtracted in float32. (onnxruntime's CPU provider would
    do so anyway: it has hardly an operator in float16.)
    """
    feeds = {"x": np.ones((4, 64), np.float16), "s": np.ones(64, np.float16)}
    found = input_gradient(of_one_node("LayerNormalization", feeds, 22, {}), ["x"], "y")
    nodes = found.model.graph.node
    (layer,) = (node for node in nodes if node.op_type == "LayerNormalization")
    assert {node.op_type for node in nodes if layer.output[1] in node.input} == {"Sub"}


def test_more_ties_than_the_type_can_count() -> None:
    x = np.ones((1, COUNT), np.float16)
    found = gradient("ReduceMax", {"x": x}, np.full((1, 1), 100, np.float16), native=True)
    np.testing.assert_allclose(found, 100 / COUNT, rtol=5e-3)


def test_a_divisor_whose_reciprocal_is_too_large_a_number() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]> g (float16[1] x) => (float16[1] y)
    <float16[1] tiny = {168}> { y = Div (x, tiny) }"""
    plain = onnx.parser.parse_model(text)
    (tiny,) = numpy_helper.to_array(plain.graph.initializer[0])
    found = input_gradient(plain, ["x"], "y")
    feeds = {"x": np.zeros(1, np.float16), found.cotangent: np.array([1e-3], np.float16)}
    (dx,) = run_reference(found.model, feeds, [found.gradients["x"]])
    np.testing.assert_allclose(dx, 1e-3 / float(tiny), rtol=1e-2)


def test_half_precision_holds_the_squares_of_a_local_response() -> None:
    """y = x s^-3/4 with s = 1 + x^2 / 1000, a channel by itself."""
    x = np.array([-3000, 300, 1000, 2000], np.float16).reshape(1, 4, 1, 1)
    found = gradient("LRN", {"x": x}, np.full_like(x, 100), native=True, size=1, alpha=1e-3)
    wide = x.astype(np.float64)
    s = 1 + 1e-3 * wide**2
    np.testing.assert_allclose(found, 100 * (s**-0.75 - 1.5e-3 * wide**2 * s**-1.75), rtol=1e-2)


def test_features_far_from_zero_do_not_hide_the_distance_to_support_vectors() -> None:
    generator = np.random.default_rng(0)
    vectors, x = (1000 + generator.standard_normal((count, 4)).astype(np.float32) for count in (20, 3))
    coefficients = generator.standard_normal(20).astype(np.float32)
    machine = helper.make_node(
        "SVMRegressor",
        ["x"],
        ["y"],
        domain="ai.onnx.ml",
        kernel_type="RBF",
        kernel_params=[0.3, 0.0, 3.0],
        support_vectors=vectors.ravel().tolist(),
        coefficients=coefficients.tolist(),
        n_supports=20,
        rho=[0.0],
    )
    plain = model([machine], [("x", [3, 4])], [("y", [3, 1])], domains=["ai.onnx.ml"])
    found = input_gradient(plain, ["x"], "y")
    feeds = {"x": x, found.cotangent: np.ones((3, 1), np.float32)}
    (dx,) = run(found.model, feeds, [found.gradients["x"]])
    apart = x.astype(np.float64)[:, None] - vectors
    kernel = np.exp(-0.3 * (apart**2).sum(-1))
    assert difference(dx, (-0.6 * (coefficients * kernel)[..., None] * apart).sum(1)) < 1e-5


def test_the_value_of_a_padding_is_not_a_difference_of_sums() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]> g (float[1000] x, float value) => (float[1002] y) {
        pads = Constant <value_ints = [1, 1]> ()
        y = Pad (x, pads, value)
    }"""
    found = input_gradient(onnx.parser.parse_model(text), ["value"], "y")
    g = np.full(1002, 123456.7, np.float32)
    g[[0, -1]] = 0.25, 0.5
    feeds = {"x": np.zeros(1000, np.float32), "value": np.zeros((), np.float32), found.cotangent: g}
    assert run(found.model, feeds, [found.gradients["value"]])[0] == 0.75
