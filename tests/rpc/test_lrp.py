"""Layer-wise relevance propagation over a real connection: what the server adds to the rules."""

from __future__ import annotations

import numpy as np
import pytest

from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceStub
from rpc.folder import MEAN, STD, WEIGHTS
from rpc.loopback import Array, element, maps, normal, refusal, request

IMAGE = np.random.default_rng(7).uniform(-1.5, 1.5, (1, 3, 6, 8)).astype(np.float32)


def explain(stub: ExplainerServiceStub, model: str, rule: str) -> pb.ExplainResponse:
    targets = [element(2), element(0)]
    return stub.Explain(
        request(model, {"image": IMAGE}, targets=targets, methods=[{"lrp": {"rule": rule}}]), timeout=60
    )


def z_box(image: Array, index: int) -> Array:
    """Deep Taylor decomposition of `image` in float64: z+ behind the tanh, the box rule in front of it."""
    x, w = image.reshape(-1).astype(np.float64), WEIGHTS["image"].astype(np.float64)
    hidden = np.tanh(x @ w)
    kept = np.maximum(hidden * WEIGHTS["head"][:, index], 0)
    relevance = kept / kept.sum() * (hidden @ WEIGHTS["head"][:, index])
    low, high = (np.repeat((end - MEAN) / STD, 6 * 8)[:, None] for end in (0.0, 1.0))
    shares = x[:, None] * w - low * np.maximum(w, 0) - high * np.minimum(w, 0)
    return np.asarray((shares / shares.sum(0) * relevance).sum(1).reshape(3, 6, 8))


def test_the_box_is_the_value_range_that_the_model_states(stub: ExplainerServiceStub) -> None:
    for found, index in zip(maps(explain(stub, "image", "LRP_RULE_DEEP_TAYLOR")), (2, 0), strict=True):
        expected = z_box(IMAGE[0], index)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("rule", ["LRP_RULE_DEEP_TAYLOR", "LRP_RULE_EPSILON_GAMMA_BOX"])
def test_a_box_without_a_value_range_is_refused_by_name(stub: ExplainerServiceStub, rule: str) -> None:
    refused = refusal(lambda: explain(stub, "rectified", rule))
    assert refused.reason == "CAPABILITY_MISSING"
    assert refused.metadata["capability"] == rule.lower().replace("lrp_rule_", "rule:lrp_")
    assert "value_range" in refused.message


def test_a_probability_is_refused_with_the_operator_that_has_no_rule(stub: ExplainerServiceStub) -> None:
    asked = request(
        "rectified",
        {"image": normal(1, 3, 6, 8)},
        targets=[element(2, score="SCORE_PROBABILITY")],
        methods=[{"lrp": {}}],
    )
    refused = refusal(lambda: stub.Explain(asked, timeout=60))
    assert refused.reason == "NOT_DIFFERENTIABLE" and "Softmax" in refused.message


@pytest.mark.parametrize("method", ["pattern_net", "pattern_attribution"])
def test_a_model_without_patterns_says_what_to_supply(stub: ExplainerServiceStub, method: str) -> None:
    asked = request("image", {"image": IMAGE}, targets=[element(2)], methods=[{method: {}}])
    refused = refusal(lambda: stub.Explain(asked, timeout=60))
    assert (refused.reason, refused.metadata["capability"]) == ("CAPABILITY_MISSING", f"rule:{method}")
    assert "patterns.npz" in refused.message
