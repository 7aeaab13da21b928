"""Integrated Gradients beside Captum's, with the same rule and steps, in every format and over a real connection.

Captum's nodes are those of the contract for every rule: left k/n, right (k+1)/n, middle (k+.5)/n, trapezoid k/(n-1).
Its weights are ours too, except that those of its trapezoid sum to (n-1)/n: its maps are multiplied by n/(n-1) here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")
pytest.importorskip("captum")

import captum.attr
import torch
from captum.attr._utils.approximation_methods import approximation_parameters

from explainserve.methods.quadrature import RULES
from explainserve_client import Client, IntegratedGradients
from three_formats import FORMATS, WRITERS, Array, module_and_input, relative, serving

CAPTUM_RULES = {
    "left": "riemann_left",
    "right": "riemann_right",
    "midpoint": "riemann_middle",
    "trapezoid": "riemann_trapezoid",
    "gauss_legendre": "gausslegendre",
}
STEP_COUNT = 12
TOLERANCE = 1e-4
TARGET = 3


def captum_map(module: Any, x: Array, baseline: Array, rule: str, target: int = TARGET) -> Array:
    """Captum's map, with weights that sum to 1."""
    method = captum.attr.IntegratedGradients(module)
    rows = (torch.from_numpy(array[None]) for array in (x, baseline))
    found = method.attribute(*rows, target=target, n_steps=STEP_COUNT, method=CAPTUM_RULES[rule]).detach()[0].numpy()
    return found * (STEP_COUNT / (STEP_COUNT - 1)) if rule == "trapezoid" else found


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(tmp_path_factory.mktemp("models"), WRITERS) as client:
        yield client


def test_every_fixed_rule_has_its_peer() -> None:
    assert set(CAPTUM_RULES) == set(RULES)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", [2, 5, 32])
def test_the_points_are_captums(rule: str, n: int) -> None:
    weights, nodes = (part(n) for part in approximation_parameters(CAPTUM_RULES[rule]))
    ours, our_weights = RULES[rule].nodes_and_weights(n)
    np.testing.assert_allclose(ours, nodes, rtol=0, atol=2e-7)  # torch.linspace rounds to float32
    np.testing.assert_allclose(our_weights, np.array(weights) / sum(weights), rtol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("file_format", FORMATS)
def test_the_map_is_captums(client: Client, file_format: str, name: str, rule: str) -> None:
    module, x = module_and_input(name)
    baseline = np.random.default_rng(8).normal(0, 0.5, x.shape).astype(np.float32)
    method = IntegratedGradients(step_count=STEP_COUNT, quadrature=rule)
    result = client.explain(f"{name}-{file_format}", x, targets=TARGET, baselines=baseline, method=method)
    assert relative(result.attributions[0].tensor, captum_map(module, x, baseline, rule)) < TOLERANCE


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("file_format", FORMATS)
def test_the_map_of_probabilities_is_captums(client: Client, file_format: str, name: str) -> None:
    """Against a softmax at the end of the module, for two targets that share one request."""
    module, x = module_and_input(name)
    method = IntegratedGradients(step_count=STEP_COUNT, quadrature="gauss_legendre")
    result = client.explain(
        f"{name}-{file_format}", x, targets=[1, TARGET], baselines="zeros", score="PROBABILITY", method=method
    )
    headed = torch.nn.Sequential(module, torch.nn.Softmax(1))
    for attribution, target in zip(result.attributions, (1, TARGET), strict=True):
        expected = captum_map(headed, x, np.zeros_like(x), "gauss_legendre", target)
        assert relative(attribution.tensor, expected) < TOLERANCE


def test_a_batch_is_captums_row_by_row(client: Client) -> None:
    """Instances and baselines of one request share micro-batches."""
    module, _ = module_and_input("transformer")
    random = np.random.default_rng(9)
    x, (first, second) = (random.standard_normal((count, 6, 8)).astype(np.float32) for count in (3, 2))
    method = IntegratedGradients(step_count=STEP_COUNT)
    result = client.explain("transformer-onnx", x, targets=TARGET, baselines=[first, second], method=method)
    pairs = [(row, baseline) for row in x for baseline in (first, second)]
    for attribution, (row, baseline) in zip(result.attributions, pairs, strict=True):
        assert relative(attribution.tensor, captum_map(module, row, baseline, "midpoint")) < TOLERANCE
