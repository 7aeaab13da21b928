"""PatternNet and PatternAttribution: their formulas, and what they need."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from explainserve.onnx_vjp import GRADIENT_RULES, find_gaps, input_gradient
from onnx_vjp.test_walk import f32, model, node
from onnx_vjp.vjp_oracle import run

RANDOM = np.random.default_rng(1)
W = {name: RANDOM.standard_normal(shape).astype(np.float32) for name, shape in {"a": (3, 5), "b": (2, 5)}.items()}
PATTERNS = {"z": RANDOM.standard_normal((3, 5)), "y": RANDOM.standard_normal((2, 5))}
C = f32(0.5, -0.3, 0.2, -0.1, 0.4)
X = f32(0.5, -1.0, 2.0)[None]


def perceptron() -> onnx.ModelProto:
    nodes = [node("MatMul", "x a", "z"), node("Add", "z c", "s"), node("Relu", "s", "h")]
    gemm = node("Gemm", "h b", "y", transB=1)
    return model([*nodes, gemm], {"x": ["n", 3]}, ["y"], {**W, "c": C})


def propagated(graph: onnx.ModelProto, rule: str, patterns: dict[str, np.ndarray]) -> np.ndarray:
    """From the first element of y back to x."""
    result = input_gradient(graph, ["x"], "y", rules=GRADIENT_RULES[rule](patterns=patterns))
    (found,) = run(result.model, {"x": X, result.cotangent: f32(1, 0)[None]}, [result.gradients["x"]])
    return np.asarray(found)


@pytest.mark.parametrize("rule", ["pattern_net", "pattern_attribution"])
def test_a_rule_is_its_formula(rule: str) -> None:
    first, second = PATTERNS["z"], PATTERNS["y"]
    if rule == "pattern_attribution":
        first, second = first * W["a"], second * W["b"]
    hidden = X[0] @ W["a"] + C
    y = np.maximum(hidden, 0) @ W["b"][0]
    expected = first @ (second[0] * y * (hidden > 0))
    np.testing.assert_allclose(propagated(perceptron(), rule, PATTERNS)[0], expected, rtol=1e-4, atol=1e-6)


def test_the_weights_themselves_are_patterns_of_the_gradient_and_ones_of_it_too() -> None:
    """PatternNet with the weights, and PatternAttribution with ones, are the gradient times the output."""
    result = input_gradient(perceptron(), ["x"], "y")
    given = {"x": X, result.cotangent: f32(1, 0)[None]}
    gradient, y = run(result.model, given, [result.gradients["x"], "y"])
    ones = {name: np.ones_like(value) for name, value in PATTERNS.items()}
    for rule, patterns in (("pattern_net", {"z": W["a"], "y": W["b"]}), ("pattern_attribution", ones)):
        np.testing.assert_allclose(propagated(perceptron(), rule, patterns), gradient * y[0, 0], rtol=1e-4, atol=1e-6)


def test_the_signal_of_a_linear_layer_is_recovered() -> None:
    """Signal a s and distractor d with w d = 0: the estimated signal has no distractor (section 3)."""
    signal, distractor = f32(1, 0), f32(1, 1)
    graph = model([node("Gemm", "x w", "y", transB=1)], {"x": ["n", 2]}, ["y"], {"w": f32(1, -1)[None]})
    result = input_gradient(graph, ["x"], "y", rules=GRADIENT_RULES["pattern_net"](patterns={"y": signal[None]}))
    x = (2 * signal + 7 * distractor)[None]
    (found,) = run(result.model, {"x": x, result.cotangent: f32(1)[None]}, [result.gradients["x"]])
    np.testing.assert_allclose(found[0], 2 * signal, atol=1e-5)


@pytest.mark.parametrize(
    ("patterns", "reason"),
    [
        ({"z": PATTERNS["z"]}, "no pattern for layer 'y'"),
        ({**PATTERNS, "z": PATTERNS["z"].T}, "has shape (5, 3), its weights (3, 5)"),
    ],
)
def test_a_pattern_that_is_missing_or_does_not_fit_is_refused(patterns: dict[str, np.ndarray], reason: str) -> None:
    (gap,) = find_gaps(perceptron(), ["x"], "y", rules=GRADIENT_RULES["pattern_net"](patterns=patterns))
    assert reason in gap.reason


def test_what_patterns_are_not_defined_on_is_refused() -> None:
    for last in (node("Sigmoid", "x", "y"), node("Mul", "x x", "y")):
        graph = model([last], {"x": ["n", 3]}, ["y"])
        (gap,) = find_gaps(graph, ["x"], "y", rules=GRADIENT_RULES["pattern_net"](patterns={}))
        assert "patterns are not defined on" in gap.reason
