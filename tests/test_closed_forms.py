"""Attributions of scores of a linear classifier, whose exact values are known, through the client, in every format."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

from explainserve_client import Attribution, Client, IntegratedGradients, Margin
from models import MODELS
from three_formats import FORMATS, Array, serving, tiny

X4, BASELINE4 = (np.random.default_rng([4, seed]).standard_normal(4).astype(np.float32) for seed in (1, 2))
ROUNDING = 2e-6
"""Relative to the largest attribution: float32 of a few operations."""

every_format = pytest.mark.parametrize("file_format", FORMATS)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(tmp_path_factory.mktemp("models"), {"classifier": tiny(MODELS["classifier"])}) as client:
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
    module = MODELS["classifier"].module()
    return module.w.double().numpy(), module.b.double().numpy()


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
