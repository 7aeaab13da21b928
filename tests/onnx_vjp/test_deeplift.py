"""DeepLIFT's rescale rule: multipliers whose sum is exact, and Captum's where Captum has the same rule."""

from __future__ import annotations

import io
import warnings

import numpy as np
import onnx
import pytest

from explainserve.onnx_vjp import GRADIENT_RULES, GradientGraph, find_gaps, input_gradient
from onnx_vjp.test_walk import f32, model, node
from onnx_vjp.vjp_oracle import run

RESCALE = GRADIENT_RULES["deeplift_rescale"]()


def contributions(
    graph: onnx.ModelProto, feeds: dict[str, np.ndarray], baselines: dict[str, np.ndarray], cotangent: np.ndarray
) -> tuple[GradientGraph, dict[str, np.ndarray], float]:
    """Multiplier times difference per input, and the difference of the selected output."""
    result = input_gradient(graph, list(feeds), "y", rules=RESCALE)
    given = {result.baselines[name]: value for name, value in baselines.items()}
    outputs = ["y", result.baseline_values["y"], *result.gradients.values()]
    y, y_twin, *multipliers = run(result.model, {**feeds, **given, result.cotangent: cotangent}, outputs)
    parts = {name: m * (feeds[name] - baselines[name]) for name, m in zip(result.gradients, multipliers, strict=True)}
    return result, parts, float(((y - y_twin) * cotangent).sum())


def check_sum(graph: onnx.ModelProto, shapes: dict[str, tuple[int, ...]], output: tuple[int, ...]) -> None:
    generator = np.random.default_rng(5)
    feeds, baselines = (
        {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(2)
    )
    cotangent = generator.standard_normal(output).astype(np.float32)
    _, parts, difference = contributions(graph, feeds, baselines, cotangent)
    total, size = (sum(float(reduced(p)) for p in parts.values()) for reduced in (np.sum, lambda p: np.abs(p).sum()))
    assert size > 0
    assert abs(total - difference) < 1e-4 * size


@pytest.mark.parametrize("operator", ["Relu", "LeakyRelu", "Sigmoid", "Tanh", "Gelu", "Elu", "Softplus", "Abs", "Exp"])
def test_functions_of_one_tensor_are_complete(operator: str) -> None:
    graph = model([node("Mul", "x w", "h"), node(operator, "h", "y")], {"x": ["n", 3]}, ["y"], {"w": f32(1, -2, 3)})
    check_sum(graph, {"x": (4, 3)}, (4, 3))


def test_a_type_that_is_read_from_the_input_differs_from_nothing() -> None:
    """Bounds of Clip that were attributes once are constants of the input's type."""
    nodes = [node("CastLike", "low x", "bound"), node("Clip", "x bound", "y")]
    check_sum(model(nodes, {"x": ["n", 3]}, ["y"], {"low": np.array(-0.2, np.float16)}), {"x": (4, 3)}, (4, 3))


@pytest.mark.parametrize("operator", ["Softmax", "LogSoftmax"])
def test_softmax_is_complete(operator: str) -> None:
    graph = model([node(operator, "x", "y", axis=1)], {"x": ["n", 5]}, ["y"])
    check_sum(graph, {"x": (3, 5)}, (3, 5))


@pytest.mark.parametrize("operator", ["Mul", "Add", "Sub"])
def test_products_and_sums_of_two_tensors_are_complete(operator: str) -> None:
    graph = model([node(operator, "a b", "y")], {"a": [2, 3], "b": [3]}, ["y"])
    check_sum(graph, {"a": (2, 3), "b": (3,)}, (2, 3))


def test_matrix_products_and_quotients_of_two_tensors_are_complete() -> None:
    nodes = [node("MatMul", "a b", "p"), node("Exp", "a", "e"), node("Div", "p e", "y")]
    check_sum(model(nodes, {"a": [3, 3], "b": [3, 3]}, ["y"]), {"a": (3, 3), "b": (3, 3)}, (3, 3))


@pytest.mark.parametrize(
    ("operator", "a", "b", "y"),
    [
        ("Gemm", (2, 3), (3, 4), (2, 4)),
        ("Conv", (2, 3, 5), (4, 3, 2), (2, 4, 4)),
        ("ConvTranspose", (2, 3, 5), (3, 4, 2), (2, 4, 6)),
    ],
)
def test_a_bias_that_varies_is_added_to_the_product(
    operator: str, a: tuple[int, ...], b: tuple[int, ...], y: tuple[int, ...]
) -> None:
    shapes = {"a": a, "b": b, "c": (4,)}
    graph = model([node(operator, "a b c", "y")], {name: list(shape) for name, shape in shapes.items()}, ["y"])
    check_sum(graph, shapes, y)


def test_batch_normalization_is_complete_where_all_but_the_variance_vary() -> None:
    shapes = {"x": (2, 3, 4), "s": (3,), "b": (3,)}
    inputs = {name: list(shape) for name, shape in shapes.items()}
    normalized = node("BatchNormalization", "x s b m v", "y")
    check_sum(model([normalized], inputs, ["y"], {"m": f32(1, -1, 0), "v": f32(1, 2, 3)}), shapes, (2, 3, 4))
    inputs["v"] = [3]
    (gap,) = find_gaps(model([normalized], inputs, ["y"], {"m": f32(1, -1, 0)}), ["x", "v"], "y", rules=RESCALE)
    assert "variance" in gap.reason


def test_a_product_of_three_is_refused() -> None:
    graph = model([node("Einsum", "a b c", "y", equation="i,i,i->i")], {name: [3] for name in "abc"}, ["y"])
    (gap,) = find_gaps(graph, ["a", "b", "c"], "y", rules=RESCALE)
    assert "three" in gap.reason


def test_attention_and_normalization_are_complete() -> None:
    nodes = [
        node("LayerNormalization", "x s", "n"),
        node("Transpose", "n", "t", perm=[0, 2, 1]),
        node("MatMul", "n t", "scores"),
        node("Softmax", "scores", "p", axis=-1),
        node("MatMul", "p n", "y"),
    ]
    graph = model(nodes, {"x": ["batch", 4, 3]}, ["y"], {"s": f32(1, 2, 0.5)})
    check_sum(graph, {"x": (2, 4, 3)}, (2, 4, 3))


def test_max_pooling_is_complete_where_windows_overlap() -> None:
    graph = model([node("MaxPool", "x", "y", kernel_shape=[3, 3], strides=[2, 2])], {"x": [1, 2, 7, 7]}, ["y"])
    check_sum(graph, {"x": (1, 2, 7, 7)}, (1, 2, 3, 3))


def test_maxima_of_the_whole_plane_are_complete() -> None:
    pooled = model([node("GlobalMaxPool", "x", "y")], {"x": ["n", 2, 5, 4]}, ["y"])
    check_sum(pooled, {"x": (3, 2, 5, 4)}, (3, 2, 1, 1))
    axes = {"axes": np.array([2, 3])}
    reduced = model([node("ReduceMax", "x axes", "y", keepdims=0)], {"x": ["n", 2, 5, 4]}, ["y"], axes)
    check_sum(reduced, {"x": (3, 2, 5, 4)}, (3, 2))


def test_equal_inputs_have_the_gradient_as_multiplier() -> None:
    graph = model([node("Sigmoid", "x", "s"), node("Mul", "s s", "y")], {"x": [3]}, ["y"])
    result = input_gradient(graph, ["x"], "y", rules=RESCALE)
    x, ones = f32(-1, 0, 2), f32(1, 1, 1)
    (m,) = run(result.model, {"x": x, result.baselines["x"]: x, result.cotangent: ones}, [result.gradients["x"]])
    s = 1 / (1 + np.exp(-x))
    np.testing.assert_allclose(m, 2 * s * s * (1 - s), rtol=1e-5)


def test_what_has_no_rule_is_a_gap_and_not_a_derivative() -> None:
    graph = model([node("ReduceMin", "x", "y", keepdims=0)], {"x": [3]}, ["y"])
    assert find_gaps(graph, ["x"], "y") == []
    (gap,) = find_gaps(graph, ["x"], "y", rules=RESCALE)
    assert (gap.operator, "DeepLIFT" in gap.reason) == ("ReduceMin", True)


def test_true_gradients_ask_for_no_baseline() -> None:
    result = input_gradient(model([node("Relu", "x", "y")], {"x": [2]}, ["y"]), ["x"], "y")
    assert (result.baselines, result.baseline_values) == ({}, {})
    assert [value.name for value in result.model.graph.input] == ["x", result.cotangent]


def test_max_pooling_charges_the_maximum_of_the_side_that_is_larger() -> None:
    """By hand: 3 exceeds the other maximum 2 by one where it stands; a larger baseline takes the loss."""
    graph = model([node("MaxPool", "x", "y", kernel_shape=[2], strides=[2])], {"x": [1, 1, 4]}, ["y"])
    x, baseline = f32(3, 1, 0, -1).reshape(1, 1, 4), f32(1, 2, 4, -3).reshape(1, 1, 4)
    _, parts, difference = contributions(graph, {"x": x}, {"x": baseline}, f32(1, 1).reshape(1, 1, 2))
    np.testing.assert_allclose(parts["x"].ravel(), [1, 0, -4, 0])
    assert difference == -3


@pytest.mark.torch
def test_a_convolutional_network_has_the_multipliers_of_captum() -> None:
    """Without max pooling, where the maps of Captum 0.9 do not add up to the difference of the output."""
    torch = pytest.importorskip("torch")
    captum = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AvgPool2d(2),
        torch.nn.Conv2d(4, 6, 3),
        torch.nn.Sigmoid(),
        torch.nn.Flatten(),
        torch.nn.Linear(96, 5),
    ).eval()
    x, baseline = torch.randn(2, 3, 12, 12), torch.randn(2, 3, 12, 12)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (x,), buffer, dynamo=False, input_names=["x"], output_names=["y"])
        expected = captum.DeepLift(network).attribute(x, baseline, target=3).detach().numpy()
    cotangent = np.zeros((2, 5), np.float32)
    cotangent[:, 3] = 1
    graph = onnx.load_from_string(buffer.getvalue())
    _, parts, difference = contributions(graph, {"x": x.numpy()}, {"x": baseline.numpy()}, cotangent)
    distance = np.linalg.norm(parts["x"] - expected) / np.linalg.norm(expected)
    assert distance < 1e-4
    assert abs(float(parts["x"].sum()) - difference) < 1e-4 * np.abs(expected).sum()
