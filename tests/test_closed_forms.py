"""Attributions whose exact values are known, through the client, in every format.

For f(x) = phi(w.x + b), attributions are w d / (w.d) (phi(z) - phi(z')), because the path crosses phi's argument at
constant speed; for the rest the integral is elementary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

from explainserve.methods.quadrature import RULES
from explainserve_client import Attribution, Client, GuidedIntegratedGradients, Idgi, IntegratedGradients, Margin
from models import MODELS, Port
from three_formats import FORMATS, Array, serving, tiny

SIGMOID = replace(
    MODELS["classifier"], name="sigmoid", outputs=(Port("y", (3,), extra='kind = "logits"\nactivation = "sigmoid"'),)
)
CASES = [MODELS[name] for name in ("linear", "product", "quadratic", "saturated_relu", "classifier")] + [SIGMOID]
X4, BASELINE4 = (np.random.default_rng([4, seed]).standard_normal(4).astype(np.float32) for seed in (1, 2))
ROUNDING = 2e-6
"""Relative to the largest attribution: float32 of a few operations."""

every_format = pytest.mark.parametrize("file_format", FORMATS)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(tmp_path_factory.mktemp("models"), {case.name: tiny(case) for case in CASES}) as client:
        yield client


def fixed(rule: str, step_count: int) -> IntegratedGradients:
    return IntegratedGradients(step_count=step_count, quadrature=rule)


def assert_equal(actual: Array, expected: Array) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


def assert_complete(attribution: Attribution) -> None:
    scale = max(abs(attribution.instance_output_value), abs(attribution.baseline_output_value), 1.0)
    assert abs(attribution.convergence_delta) < 5e-6 * scale


def weights() -> tuple[Array, Array]:
    """W of shape (4, 3) and b of shape (3,) of the linear layer, in float64."""
    module = MODELS["linear"].module()
    return module.w.double().numpy(), module.b.double().numpy()


@every_format
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("step_count", [2, 10])
def test_linear(client: Client, file_format: str, rule: str, step_count: int) -> None:
    """w d, whatever the rule and its steps."""
    w, _ = weights()
    method = fixed(rule, step_count)
    result = client.explain(f"linear-{file_format}", X4, targets=[0, 1, 2], baselines=BASELINE4, method=method)
    for target, attribution in enumerate(result.attributions):
        assert_equal(attribution.tensor, w[:, target] * (X4.astype(np.float64) - BASELINE4))
        assert_complete(attribution)


@every_format
def test_path_methods_of_a_linear_function(client: Client, file_format: str) -> None:
    """Guided Integrated Gradients gives w d as the straight path does; IDGI shares F(x) - F(x') by squared weights."""
    w, _ = weights()
    methods = [GuidedIntegratedGradients(step_count=12), Idgi(fixed("left", 3)), Idgi(GuidedIntegratedGradients(12))]
    result = client.explain(f"linear-{file_format}", X4, targets=[0, 2], baselines=BASELINE4, method=methods)
    for attribution in result.attributions:
        own = w[:, attribution.target.index[0]]
        exact = own * (X4.astype(np.float64) - BASELINE4)
        shared = exact.sum() * own**2 / (own @ own)
        assert_equal(attribution.tensor, shared if attribution.method_index else exact)
        assert_complete(attribution)


@every_format
@pytest.mark.parametrize("method", [fixed("midpoint", 1), fixed("trapezoid", 2), IntegratedGradients()], ids=str)
def test_product(client: Client, file_format: str, method: IntegratedGradients) -> None:
    """For x*y from (p, q) to (a, b): ((a - p)(b + q)/2, (b - q)(a + p)/2), summed over five pairs."""
    random = np.random.default_rng(5)
    a, b, p, q = random.standard_normal((4, 5)).astype(np.float32)
    model = f"product-{file_format}"
    result = client.explain(model, {"x": a, "y": b}, targets=0, baselines={"x": p, "y": q}, method=method)
    tensors = result.attributions[0].tensors
    a, b, p, q = (value.astype(np.float64) for value in (a, b, p, q))
    assert_equal(tensors["x"], (a - p) * (b + q) / 2)
    assert_equal(tensors["y"], (b - q) * (a + p) / 2)
    assert_complete(result.attributions[0])


@every_format
@pytest.mark.parametrize("method", [fixed("midpoint", 1), fixed("gauss_legendre", 3), IntegratedGradients()], ids=str)
def test_quadratic(client: Client, file_format: str, method: IntegratedGradients) -> None:
    """For (w.x)^2: d w (w.(x + x')), twice the half of A = 2 w w^T."""
    w, _ = weights()
    result = client.explain(f"quadratic-{file_format}", X4, targets=1, baselines=BASELINE4, method=method)
    x, start = X4.astype(np.float64), BASELINE4.astype(np.float64)
    assert_equal(result.attributions[0].tensor, (x - start) * w[:, 1] * (w[:, 1] @ (x + start)))
    assert_complete(result.attributions[0])


@every_format
@pytest.mark.parametrize(
    ("rule", "step_count", "expected"),
    [
        ("midpoint", 8, 1.0),
        ("midpoint", 5, 0.8),
        ("left", 8, 1.0),
        ("left", 5, 1.2),
        ("right", 8, 0.75),
        ("gauss_legendre", 5, 2 * (0.11846344 + 0.23931434)),
    ],
)
def test_saturated_relu(client: Client, file_format: str, rule: str, step_count: int, expected: float) -> None:
    """1 - relu(1 - x) from 0 to 2 has gradient 1 on the first half of the path and 0 after: each rule's sum is known.

    At the kink itself relu's derivative is 0, in torch and here. The second input stays below 1: its attribution is its
    displacement; the third does not move.
    """
    x = np.array([2, 0.5, 0], np.float32)
    result = client.explain(
        f"saturated_relu-{file_format}",
        x,
        targets=[0, 1, 2],
        baselines="zeros",
        method=fixed(rule, step_count),
    )
    np.testing.assert_allclose(
        [attribution.tensor for attribution in result.attributions], np.diag([expected, 0.5, 0]), rtol=1e-6
    )


@every_format
def test_saturated_relu_adaptively(client: Client, file_format: str) -> None:
    """The score is saturated at both ends, where a gradient alone says nothing; the map is 1 as F(x) - F(x') is."""
    x, method = np.array([2, 2, 2], np.float32), IntegratedGradients(tolerance=0.005, completeness_tolerance=0.005)
    (attribution,) = client.explain(
        f"saturated_relu-{file_format}", x, targets=1, baselines="zeros", method=method
    ).attributions
    np.testing.assert_allclose(attribution.tensor, [0, 1, 0], atol=0.005)
    assert (attribution.instance_output_value, attribution.baseline_output_value) == (1.0, 0.0)


@every_format
@pytest.mark.parametrize("target", [0, 2])
def test_sigmoid_ridge(client: Client, file_format: str, target: int) -> None:
    """w d / (w.d) (sigmoid(z) - sigmoid(z'))."""
    w, b = weights()
    method = fixed("gauss_legendre", 24)
    model = f"sigmoid-{file_format}"
    result = client.explain(model, X4, targets=target, baselines=BASELINE4, score="PROBABILITY", method=method)
    d = X4.astype(np.float64) - BASELINE4
    before, after = (1 / (1 + np.exp(-(x.astype(np.float64) @ w + b)[target])) for x in (BASELINE4, X4))
    assert_equal(result.attributions[0].tensor, w[:, target] * d / (w[:, target] @ d) * (after - before))
    assert_complete(result.attributions[0])


@every_format
def test_softmax(client: Client, file_format: str) -> None:
    """The gradient is W (e_t - p) p_t: its integral, by 64-point Gauss-Legendre of this formula in float64."""
    w, b = weights()
    method = fixed("gauss_legendre", 24)
    model = f"classifier-{file_format}"
    result = client.explain(model, X4, targets=[0, 1, 2], baselines=BASELINE4, score="PROBABILITY", method=method)
    d = X4.astype(np.float64) - BASELINE4
    nodes, node_weights = np.polynomial.legendre.leggauss(64)
    points = BASELINE4 + (nodes[:, None] + 1) / 2 * d
    shares = np.exp(points @ w + b)
    shares /= shares.sum(1, keepdims=True)
    for target, attribution in enumerate(result.attributions):
        towards = np.eye(3)[target] - shares
        integral = np.einsum("n,n,nk->k", node_weights / 2, shares[:, target], towards)
        assert_equal(attribution.tensor, d * (w @ integral))
        assert_complete(attribution)
    sums = np.sum([attribution.tensor for attribution in result.attributions], axis=0)
    np.testing.assert_allclose(sums, 0, atol=1e-6)  # probabilities sum to 1 everywhere


@every_format
def test_margin(client: Client, file_format: str) -> None:
    """The attribution of a difference of logits is the difference of the attributions: linear."""
    w, _ = weights()
    model = f"classifier-{file_format}"
    result = client.explain(
        model, X4, targets=Margin(2, 0), baselines=BASELINE4, score="LOGIT", method=fixed("left", 3)
    )
    assert_equal(result.attributions[0].tensor, (w[:, 2] - w[:, 0]) * (X4.astype(np.float64) - BASELINE4))
