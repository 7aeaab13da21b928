"""Layer-wise relevance propagation: its formulas on small networks, what it conserves, and what it equals."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import onnx
import pytest

from explainserve.onnx_vjp import GRADIENT_RULES, LRP_RULES, find_gaps, input_gradient
from onnx_vjp.test_walk import f32, model, node
from onnx_vjp.vjp_oracle import run

EPSILON = 1e-6
LOW, HIGH = -2.0, 3.0
BOUNDS = {"x": [LOW, HIGH]}

A = np.random.default_rng(1).standard_normal((3, 5)).astype(np.float32)
X = f32(0.5, -1.0, 2.0)[None]
W = {"a": A, "b": np.random.default_rng(2).standard_normal((5, 2)).astype(np.float32)}


def relevance(
    graph: onnx.ModelProto, rule: str, x: np.ndarray, index: int = 0, axis: int = 1, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Relevance of x for the elements of y at `index` of an axis, and these."""
    if rule in ("lrp_deep_taylor", "lrp_epsilon_gamma_box"):
        options["bounds"] = BOUNDS
    result = input_gradient(graph, ["x"], "y", rules=GRADIENT_RULES[rule](**options))
    onnx.checker.check_model(result.model)
    (y,) = run(graph, {"x": x}, ["y"])
    cotangent = np.zeros_like(y)
    cotangent.swapaxes(1, axis)[:, index] = 1
    found, again = run(result.model, {"x": x, result.cotangent: cotangent}, [result.gradients["x"], "y"])
    np.testing.assert_allclose(again, y, rtol=1e-5, atol=1e-6)
    return found, y.swapaxes(1, axis)[:, index]


def gradient_x_input(graph: onnx.ModelProto, x: np.ndarray, index: int = 0) -> np.ndarray:
    result = input_gradient(graph, ["x"], "y")
    (y,) = run(graph, {"x": x}, ["y"])
    cotangent = np.zeros_like(y)
    cotangent[:, index] = 1
    (found,) = run(result.model, {"x": x, result.cotangent: cotangent}, [result.gradients["x"]])
    return np.asarray(found * x)


def perceptron(bias: np.ndarray | None = None) -> onnx.ModelProto:
    """Two dense layers with a ReLU between."""
    nodes = [node("MatMul", "x a", "z"), node("Add", "z c", "s"), node("Relu", "s", "h"), node("MatMul", "h b", "y")]
    return model(nodes, {"x": ["n", 3]}, ["y"], {**W, "c": np.zeros(5, np.float32) if bias is None else bias})


def convolutional() -> onnx.ModelProto:
    """Two convolutions without a bias, a residual connection, both kinds of pools and a dense layer."""
    random = np.random.default_rng(3)
    kernels = {"k": (4, 2, 3, 3), "l": (4, 4, 3, 3), "d": (4 * 2 * 2, 3)}
    stored = {name: random.standard_normal(shape).astype(np.float32) for name, shape in kernels.items()}
    nodes = [
        *(node("Conv", "x k", "p", pads=[1] * 4), node("Relu", "p", "q")),
        *(node("Conv", "q l", "r", pads=[1] * 4), node("Add", "q r", "t"), node("Relu", "t", "u")),
        node("MaxPool", "u", "m", kernel_shape=[2, 2], strides=[2, 2]),
        node("AveragePool", "m", "v", kernel_shape=[2, 2], strides=[2, 2]),
        *(node("Flatten", "v", "f"), node("Gemm", "f d", "y")),
    ]
    return model(nodes, {"x": ["n", 2, 8, 8]}, ["y"], stored)


IMAGE = np.random.default_rng(4).uniform(LOW, HIGH, (2, 2, 8, 8)).astype(np.float32)


def shared(contributions: np.ndarray, bias: np.ndarray | float, out: np.ndarray) -> np.ndarray:
    """Contributions (inputs, outputs) of each output over their sum, times its relevance."""
    total = contributions.sum(0) + bias
    return np.asarray((contributions / (total + EPSILON * np.where(total < 0, -1, 1)) * out).sum(1))


def modified(rule: str, a: np.ndarray, w: np.ndarray, c: np.ndarray, out: np.ndarray) -> np.ndarray:
    """A dense layer's shares by the formula of a rule, in float64."""
    z = a[:, None] * w
    if rule == "flat":
        return shared(np.ones_like(z), 0, out)
    if rule == "box":
        return shared(z - LOW * np.maximum(w, 0) - HIGH * np.minimum(w, 0), 0, out)
    if rule == "epsilon":
        return shared(z, c, out)
    if rule == "gamma":
        up, down = z + 0.25 * np.maximum(z, 0), z + 0.25 * np.minimum(z, 0)
        is_up = z.sum(0) + c > 0
        rising = shared(up, c + 0.25 * np.maximum(c, 0), np.where(is_up, out, 0))
        return rising + shared(down, c + 0.25 * np.minimum(c, 0), np.where(is_up, 0, out))
    alpha = {"plus": 1, "alpha_beta": 2}[rule]
    positive = shared(np.maximum(z, 0), np.maximum(c, 0), out)
    return alpha * positive - (alpha - 1) * shared(np.minimum(z, 0), np.minimum(c, 0), out)


@pytest.mark.parametrize(
    ("rule", "first", "second"),
    [
        ("lrp_epsilon", "epsilon", "epsilon"),
        ("lrp_gamma", "gamma", "gamma"),
        ("lrp_alpha_beta", "alpha_beta", "alpha_beta"),
        ("lrp_composite", "flat", "epsilon"),
        ("lrp_deep_taylor", "box", "plus"),
        ("lrp_epsilon_gamma_box", "box", "epsilon"),
    ],
)
def test_a_rule_is_its_formula(rule: str, first: str, second: str) -> None:
    """On a network with biases, inputs of both signs and a zero."""
    c = f32(0.5, -0.3, 0.2, -0.1, 0.4)
    x = np.concatenate([X, f32(0.0, 1.5, -0.5)[None]])
    found, _ = relevance(perceptron(c), rule, x)

    for own, instance in zip(found, x.astype(np.float64), strict=True):
        hidden = np.maximum(instance @ W["a"] + c, 0)
        out = hidden @ W["b"] * np.array([1, 0])
        expected = modified(first, instance, W["a"], c, modified(second, hidden, W["b"], np.zeros(2), out))
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [None, f32(0.5, -0.3, 0.2, -0.1, 0.4)])
def test_epsilon_is_gradient_times_input_of_rectifiers(bias: np.ndarray | None) -> None:
    """In the limit of a small epsilon; biases absorb their share (Ancona et al. 2018, proposition 1)."""
    graph = perceptron(bias)
    found, _ = relevance(graph, "lrp_epsilon", X, epsilon=1e-12)
    np.testing.assert_allclose(found, gradient_x_input(graph, X), rtol=1e-4, atol=1e-5)


def test_epsilon_is_gradient_times_input_of_a_convolutional_network_without_biases() -> None:
    graph = convolutional()
    found, y = relevance(graph, "lrp_epsilon", IMAGE, epsilon=1e-12)
    np.testing.assert_allclose(found, gradient_x_input(graph, IMAGE), rtol=1e-3, atol=1e-4 * np.abs(found).max())
    np.testing.assert_allclose(found.sum((1, 2, 3)), y, rtol=1e-3)


@pytest.mark.parametrize("rule", sorted(LRP_RULES - {"lrp_gamma", "lrp_epsilon_gamma_box"}))
def test_relevance_is_conserved_without_biases(rule: str) -> None:
    found, y = relevance(convolutional(), rule, IMAGE, index=1)
    np.testing.assert_allclose(found.sum((1, 2, 3)), y, rtol=2e-3)


def test_a_large_epsilon_absorbs() -> None:
    found, y = relevance(perceptron(), "lrp_epsilon", X, epsilon=10.0)
    assert abs(found.sum()) < 0.5 * abs(y.item())


def test_relevance_is_linear_in_the_explained_combination() -> None:
    first, second = (relevance(perceptron(), "lrp_composite", X, index=index)[0] for index in (0, 1))
    result = input_gradient(perceptron(), ["x"], "y", rules=GRADIENT_RULES["lrp_composite"]())
    (both,) = run(result.model, {"x": X, result.cotangent: f32(2, -3)[None]}, [result.gradients["x"]])
    np.testing.assert_allclose(both, 2 * first - 3 * second, rtol=1e-5, atol=1e-6)


STATISTICS = {
    "scale": f32(1.5, -0.5, 0.7, 1.0),
    "shift": f32(0.1, 0.2, -0.3, 0.4),
    "mean": f32(0.3, -0.1, 0.2, 0.0),
    "variance": f32(0.5, 1.0, 2.0, 1.5),
}
KERNEL = np.random.default_rng(5).standard_normal((4, 2, 3, 3)).astype(np.float32)
DENSE = np.random.default_rng(6).standard_normal((4, 3)).astype(np.float32)


def headed(nodes: list[onnx.NodeProto], stored: dict[str, np.ndarray]) -> onnx.ModelProto:
    """What is behind: from z over a ReLU and the mean of each channel to y."""
    behind = [node("Relu", "z", "h"), node("GlobalAveragePool", "h", "g"), node("Flatten", "g", "f")]
    constants = {**stored, "k": KERNEL, "d": DENSE}
    return model([*nodes, *behind, node("Gemm", "f d", "y")], {"x": ["n", 2, 8, 8]}, ["y"], constants)


@pytest.mark.parametrize("rule", sorted(LRP_RULES))
def test_a_normalization_is_merged_with_the_convolution_before_it(rule: str) -> None:
    slope = STATISTICS["scale"] / np.sqrt(STATISTICS["variance"] + 1e-5)
    merged = {"km": KERNEL * slope[:, None, None, None], "c": STATISTICS["shift"] - STATISTICS["mean"] * slope}
    apart = [node("Conv", "x k", "p"), node("BatchNormalization", "p scale shift mean variance", "z")]
    column = {name: value[:, None, None] for name, value in (("mean", STATISTICS["mean"]), ("slope", slope))}
    spelled = [node("Conv", "x k", "p"), node("Sub", "p mean", "s"), node("Mul", "slope s", "t")]
    column["c"] = STATISTICS["shift"][None, :, None, None]
    expected, _ = relevance(headed([node("Conv", "x km c", "z")], merged), rule, IMAGE)

    for graph in (headed(apart, STATISTICS), headed([*spelled, node("Add", "t c", "z")], column)):
        found, _ = relevance(graph, rule, IMAGE)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("rule", sorted(LRP_RULES))
@pytest.mark.parametrize("shape", [["n", 4, 3], ["n", "places", 3], ["n", "heads", 2, 3]])
def test_a_bias_is_merged_with_a_dense_layer_of_any_number_of_axes(rule: str, shape: list[Any]) -> None:
    """Each place has the relevance that it would have as a row of two axes."""
    stored = {**W, "c": f32(0.5, -0.3, 0.2, 1.0, -0.7), "s": f32(2.0), "d": 2 * A}
    nodes = [node("MatMul", "x a", "z"), node("Mul", "z s", "t"), node("Add", "c t", "u"), node("Relu", "u", "h")]
    places = (2, 4, 2)[: len(shape) - 1]
    x = np.random.default_rng(7).uniform(LOW, HIGH, (*places, 3)).astype(np.float32)
    found, _ = relevance(model([*nodes, node("MatMul", "h b", "y")], {"x": shape}, ["y"], stored), rule, x, axis=-1)
    rows = [node("Gemm", "x d c", "u"), node("Relu", "u", "h"), node("MatMul", "h b", "y")]
    expected, _ = relevance(model(rows, {"x": ["n", 3]}, ["y"], stored), rule, x.reshape(-1, 3))

    np.testing.assert_allclose(found.reshape(-1, 3), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_constant_that_adds_an_axis_is_not_merged() -> None:
    stored = {**W, "c": f32(0.5, -0.3, 0.2, 1.0, -0.7)[None, None]}
    nodes = [node("MatMul", "x a", "z"), node("Add", "z c", "u"), node("Relu", "u", "h"), node("MatMul", "h b", "y")]
    found, y = relevance(model(nodes, {"x": ["n", 3]}, ["y"], stored), "lrp_epsilon", X, axis=-1)

    assert (found.shape, y.shape) == ((1, 3), (1, 1))


@pytest.mark.parametrize("rule", ["lrp_composite", "lrp_deep_taylor"])
def test_preprocessing_in_front_of_a_first_layer_passes_relevance(rule: str) -> None:
    """The range of the input becomes that of the layer's."""
    mean, std = f32(0.5, -0.2)[:, None, None], f32(2.0, 0.5)[:, None, None]
    inside = [node("Sub", "x mean", "c"), node("Div", "c std", "n"), node("Conv", "n k", "z")]
    found, _ = relevance(headed(inside, {"mean": mean, "std": std}), rule, IMAGE)

    options = {"bounds": {"x": [(LOW - mean) / std, (HIGH - mean) / std]}} if rule == "lrp_deep_taylor" else {}
    outside = input_gradient(headed([node("Conv", "x k", "z")], {}), ["x"], "y", rules=GRADIENT_RULES[rule](**options))
    cotangent = np.zeros((2, 3), np.float32)
    cotangent[:, 0] = 1
    feeds = {"x": (IMAGE - mean) / std, outside.cotangent: cotangent}
    (expected,) = run(outside.model, feeds, [outside.gradients["x"]])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_relevance_of_a_layer_stays_apart_from_what_is_behind_it() -> None:
    """A convolution is not merged where its own output is what is explained."""
    graph = headed(
        [node("Conv", "x k", "p"), node("BatchNormalization", "p scale shift mean variance", "z")], STATISTICS
    )
    result = input_gradient(graph, ["p"], "y", rules=GRADIENT_RULES["lrp_epsilon"]())
    cotangent = np.ones((2, 3), np.float32)
    (found,) = run(result.model, {"x": IMAGE, result.cotangent: cotangent}, [result.gradients["p"]])
    assert found.any()


def test_a_dense_layer_with_scaled_parts_has_the_weights_that_it_applies() -> None:
    c = f32(0.5, -0.3)
    plain = model([node("Gemm", "x a c", "y")], {"x": ["n", 3]}, ["y"], {"a": -2 * A[:, :2], "c": 3 * c})
    scaled = model(
        [node("Gemm", "x a c", "y", alpha=-2.0, beta=3.0, transB=1)],
        {"x": ["n", 3]},
        ["y"],
        {"a": np.ascontiguousarray(A[:, :2].T), "c": c},
    )
    for rule in sorted(LRP_RULES):
        np.testing.assert_allclose(relevance(scaled, rule, X)[0], relevance(plain, rule, X)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([node("Softmax", "x", "y", axis=1)], "no rule for it"),
        ([node("Sigmoid", "x", "y")], "no rule for it"),
        ([node("MatMul", "x a", "h"), node("Transpose", "h", "t", perm=[1, 0]), node("MatMul", "h t", "y")], "product"),
        ([node("Mul", "x x", "y")], "product of several tensors|Mul of several tensors"),
        ([node("Clip", "x one", "y")], "zero at zero"),
    ],
)
def test_what_has_no_rule_is_refused(nodes: list[onnx.NodeProto], reason: str) -> None:
    graph = model(nodes, {"x": ["n", 3]}, ["y"], {"a": A, "one": np.array(1, np.float32)})
    for rule in sorted(LRP_RULES):
        options = {"bounds": BOUNDS} if "box" in rule or "taylor" in rule else {}
        (gap, *_) = find_gaps(graph, ["x"], "y", rules=GRADIENT_RULES[rule](**options))
        assert any(part in gap.reason for part in reason.split("|"))


@pytest.mark.torch
def test_a_convolutional_network_has_the_relevance_of_captum() -> None:
    torch = pytest.importorskip("torch")
    captum = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Conv2d(4, 6, 3)]
    network = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.AvgPool2d(2), torch.nn.Conv2d(6, 5, 1)).eval()
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (torch.from_numpy(IMAGE),), buffer, dynamo=False, input_names=["x"], output_names=["y"]
        )
        expected = captum.LRP(network).attribute(torch.from_numpy(IMAGE), target=(3, 0, 0)).detach().numpy()
    found, _ = relevance(onnx.load_from_string(buffer.getvalue()), "lrp_epsilon", IMAGE, index=3, epsilon=1e-9)
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
