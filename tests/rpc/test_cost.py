"""Estimates of cost against what a request then really takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from explainserve.rpc.tensors import encode
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1 import statistics_pb2
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceStub
from rpc.loopback import Loopback, adaptive, element, every, label, maps, normal, relative_distance, request, steps

IMAGES = normal(2, 3, 6, 8)
X = normal(3, 4)
NOISE = every(gaussian_noise={"std": 1.0, "count": 3})
BOX = {"name": "r" * 200, "box": {"width": 2, "height": 2}}


def margin(positive: int, negative: int) -> dict[str, Any]:
    return {"margin": {"positive": element(positive)["element"], "negative": element(negative)["element"]}}


REQUESTS: dict[str, pb.ExplainRequest] = {
    "one": request("plain", {"x": X[:1]}, targets=[element(0)], methods=steps(5)),
    "cross product": request(
        "plain", {"x": X}, targets=[element(0), element(1)], baselines=[every(zeros={}), NOISE], methods=steps(6)
    ),
    "repeated end points": request(
        "plain",
        {"x": np.repeat(X[:1], 3, axis=0)},
        targets=[element(0)],
        baselines=[every(zeros={}), every(constant={"values": [0.0]})],
        methods=steps(2, quadrature="QUADRATURE_TRAPEZOID"),
    ),
    "top k": request("image", {"image": IMAGES}, targets=[{"top_k": {"count": 3}}], methods=steps(4)),
    "several scores": request(
        "image", {"image": IMAGES}, targets=[label("ant"), label("bee", score="SCORE_PROBABILITY")], methods=steps(4)
    ),
    "per instance": request(
        "plain",
        {"x": X},
        targets=[element(0), element(1, instance_index=2)],
        baselines=[every(zeros={}), {"every_input": {"constant": {"values": [1.0]}}, "instance_index": 1}],
        methods=steps(3, quadrature="QUADRATURE_GAUSS_LEGENDRE"),
    ),
    "mean over baselines": request(
        "plain",
        {"x": X},
        targets=[element(0)],
        baselines=[NOISE],
        baseline_reduction="BASELINE_REDUCTION_MEAN",
        methods=steps(4),
    ),
    "everything": request(
        "image",
        {"image": IMAGES},
        targets=[label("ant"), label("bee", score="SCORE_PROBABILITY")],
        baselines=[every(gray={}), every(uniform_noise={"count": 2})],
        regions=[BOX, {"name": "mask", "mask": encode(np.ones((6, 8), np.bool_))}],
        groups=[{"name": "first", "selectors": [{"target_index": 0}], "pairwise": True}],
        response_options={"views": [1, 2, 3, 4], "include_baseline_tensors": True},
        methods=steps(40),
    ),
    "pairs": request(
        "image",
        {"image": IMAGES},
        targets=[{"top_k": {"count": 4}}],
        baselines=[every(uniform_noise={"count": 10})],
        groups=[{"name": "n" * 300, "selectors": [{}], "pairwise": True}],
        response_options={"views": [1, 2, 3, 4], "omit_tensors": True, "omit_statistics": True},
        methods=steps(1),
    ),
    "draws of long constants": request(
        "image",
        {"image": IMAGES[:1]},
        baselines=[every(gaussian_noise={"std": 1.0, "count": 200}), every(constant={"values": [1.5] * 3})],
        baseline_reduction="BASELINE_REDUCTION_MEAN",
        response_options={"include_baseline_tensors": True},
        methods=steps(1),
    ),
    "regions and points": request(
        "image",
        {"image": IMAGES},
        regions=[{**BOX, "name": f"{k}" * 50} for k in range(200)],
        methods=steps(512),
        response_options={"omit_tensors": True},
    ),
    "many groups": request(
        "plain",
        {"x": X},
        targets=[element(0), element(1)],
        baselines=[every(gaussian_noise={"std": 1.0, "count": 40})],
        groups=[{"name": f"g{k}", "selectors": [{"baseline_index": k % 40}, {"target_index": 0}]} for k in range(60)],
        methods=steps(1),
        response_options={"omit_tensors": True, "omit_statistics": True, "omit_score_path": True},
    ),
    "little": request(
        "image",
        {"image": IMAGES},
        methods=steps(4),
        response_options={
            "omit_tensors": True,
            "omit_statistics": True,
            "omit_joint_statistics": True,
            "omit_score_path": True,
        },
    ),
    "two inputs": request("product", {"x": normal(2, 5), "y": normal(2, 5)}, methods=steps(4)),
    "margins": request("image", {"image": IMAGES}, targets=[margin(0, 1), margin(0, 2)], methods=steps(4)),
    "repeated targets": request(
        "image", {"image": IMAGES}, targets=[element(k % 4) for k in range(20)], methods=steps(4)
    ),
    "perhaps the same target": request("plain", {"x": X}, targets=[element(0), {"argmax": {}}], methods=steps(4)),
    "adaptive": request("image", {"image": IMAGES}, methods=adaptive(max_step_count=64)),
    "adaptive targets": request(
        "image", {"image": IMAGES}, targets=[{"top_k": {"count": 3}}], methods=adaptive(max_step_count=64)
    ),
}
REPEATED = {"repeated targets", "perhaps the same target"}
UNCERTAIN = REPEATED | {"adaptive", "adaptive targets"}
"""What they take is known only once they have taken it."""


def estimate(stub: ExplainerServiceStub, explain: pb.ExplainRequest) -> pb.EstimateCostResponse:
    return stub.EstimateCost(pb.EstimateCostRequest(explain=explain), timeout=60)


@pytest.mark.parametrize("name", REQUESTS)
def test_estimate_is_what_it_takes(stub: ExplainerServiceStub, name: str) -> None:
    """Fixed rules exactly, the adaptive one between its bounds."""
    expected, answer = estimate(stub, REQUESTS[name]), stub.Explain(REQUESTS[name], timeout=60)
    own = answer.provenance

    for low, used, high in (
        (expected.min_row_count, own.row_count, expected.max_row_count),
        (expected.min_forward_count, own.forward_count, expected.max_forward_count),
        (expected.min_backward_count, own.backward_count, expected.max_backward_count),
    ):
        assert low <= used <= high
        assert low == high or name in UNCERTAIN
    assert expected.attribution_count == len(answer.attributions)
    assert own.row_count == own.forward_count
    assert name in REPEATED or own.backward_count == sum(a.step_count for a in answer.attributions)


@pytest.mark.parametrize("name", REQUESTS)
def test_reply_is_no_larger_than_estimated(stub: ExplainerServiceStub, name: str) -> None:
    expected, answer = estimate(stub, REQUESTS[name]), stub.Explain(REQUESTS[name], timeout=60)

    assert answer.ByteSize() <= expected.reply_bytes


@pytest.mark.parametrize("name", REQUESTS)
def test_memory_is_stated_with_its_limit(stub: ExplainerServiceStub, name: str) -> None:
    """At least the inputs and the maps, and three copies of the reply."""
    message = REQUESTS[name]
    expected, answer = estimate(stub, message), stub.Explain(message, timeout=60)
    tensors = sum(len(tensor.data) for tensor in message.inputs.values())
    maps = sum(len(own.tensor.data) for attribution in answer.attributions for own in attribution.inputs)

    assert tensors + maps <= expected.held_bytes <= expected.held_bytes_limit == 16 * expected.reply_bytes_limit
    assert expected.held_bytes + 3 * answer.ByteSize() < expected.max_host_bytes


def test_pairs_are_those_of_the_maps_that_a_group_selects(stub: ExplainerServiceStub) -> None:
    """Of 80 maps in one instance pair and in all of them."""
    pairs = REQUESTS["pairs"]
    none, few = pb.ExplainRequest(), pb.ExplainRequest()
    none.CopyFrom(pairs)
    few.CopyFrom(pairs)
    none.ClearField("groups")
    few.groups[0].selectors[0].MergeFrom(statistics_pb2.AttributionSelector(target_index=0, baseline_index=0))
    answer = stub.Explain(pairs, timeout=60)
    size = sum(pair.ByteSize() for pair in answer.joint[1].pairs)

    least = estimate(stub, none).reply_bytes
    assert len(answer.joint[1].pairs) == 4 * 80 * 79 // 2
    assert estimate(stub, few).reply_bytes - least < size / 10
    assert size < estimate(stub, pairs).reply_bytes - least < 3 * size


def test_end_points_are_shared(stub: ExplainerServiceStub) -> None:
    """Two targets of one score need the instance and the baseline once; equal rows are evaluated once."""
    two = request("plain", {"x": X[:1]}, targets=[element(0), element(1)], methods=steps(4))
    own = stub.Explain(two, timeout=60).provenance
    repeated = stub.Explain(REQUESTS["repeated end points"], timeout=60).provenance

    assert (own.row_count, own.backward_count, own.saved_row_count) == (2 + 4, 2 * 4, 2 + 4)
    assert repeated.row_count - repeated.backward_count == 2


def test_targets_of_one_instance_share_the_forward_pass(service: Loopback) -> None:
    """Five targets cost the forward passes of one, and their maps are those of each asked alone."""
    targets = [*(element(k) for k in range(4)), margin(0, 1)]
    five = request("image", {"image": IMAGES[:1]}, targets=targets, methods=steps(7))
    before = [service.metric(name) for name in ROW_METRICS]
    answer = service.stub.Explain(five, timeout=60)
    own, spent = answer.provenance, [service.metric(name) - b for name, b in zip(ROW_METRICS, before, strict=True)]

    assert (own.row_count, own.forward_count, own.backward_count) == (7 + 2, 7 + 2, 5 * 7)
    assert own.saved_row_count == 4 * 7 + 4 * 2
    assert spent == [own.row_count, own.backward_count]
    for target, found in zip(targets, maps(answer), strict=True):
        alone = request("image", {"image": IMAGES[:1]}, targets=[target], methods=steps(7))
        assert relative_distance(found, maps(service.stub.Explain(alone, timeout=60))[0]) < 1e-5


ROW_METRICS = "explainserve_rows_total", "explainserve_backward_evaluations_total"


def test_estimate_states_the_limits_and_computes_nothing(service: Loopback) -> None:
    before = service.metric("explainserve_rows_total")
    expected = estimate(service.stub, REQUESTS["one"])

    assert (expected.row_limit, expected.reply_bytes_limit) == (20_000, 2 * 1024 * 1024)
    assert expected.max_host_bytes_limit == 4 * 1024**3
    assert service.metric("explainserve_rows_total") == before


def test_estimate_of_what_would_be_refused(stub: ExplainerServiceStub) -> None:
    """It answers, so that a client sees by how much it asks for too much, and makes no baseline for it."""
    draws: dict[str, Any] = {"baselines": [every(uniform_noise={"count": 1024})]}
    greedy = request("two-digits", {"image": normal(16, 3, 64, 64)}, methods=steps(512), **draws)
    expected = estimate(stub, greedy)

    assert expected.attribution_count == 16 * 1024
    assert expected.max_backward_count == 16 * 1024 * 512
    assert expected.max_row_count > expected.row_limit
    assert expected.reply_bytes > 16 * 1024 * 3 * 64 * 64 * 4 > expected.reply_bytes_limit


def test_estimate_of_the_absurd(stub: ExplainerServiceStub) -> None:
    """More pairs of maps than any integer of the wire counts."""
    pairs = [{"name": "g", "selectors": [{}], "pairwise": True}]
    draws = [every(uniform_noise={"count": 1024})]
    absurd = request(
        "image", {"image": IMAGES}, targets=[{"top_k": {"count": 2**31 - 1}}], baselines=draws, groups=pairs
    )

    assert estimate(stub, absurd).reply_bytes == 2**63 - 1
