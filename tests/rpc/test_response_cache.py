"""Answers that are kept: what is equal, what is not, what is never kept, and what a kept one says of itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from explainserve.explainer import Answer, Usage
from explainserve.metrics import Metrics
from explainserve.rpc.response_cache import Lookup, ResponseCache
from explainserve.rpc.tensors import encode
from explainserve.settings import Settings
from explainserve.v1 import attribution_pb2, method_pb2
from explainserve.v1 import explainer_service_pb2 as pb
from rpc.conftest import LIMITS
from rpc.loopback import Array, Loopback, element, every, label, maps, named, normal, refusal, request, steps

_SEEDS = itertools.count()
BOX = {"x": 0, "y": 0, "width": 2, "height": 2}


@pytest.fixture(scope="module")
def caching(folder: Path) -> Iterator[Loopback]:
    """A server that keeps answers."""
    loopback = Loopback(Settings(models=folder, response_cache_bytes=64 * 1024 * 1024, **LIMITS))
    yield loopback
    loopback.stop()


def image() -> Array:
    """One that no other test has sent."""
    return normal(2, 3, 6, 8, seed=next(_SEEDS))


def ask(server: Loopback, message: pb.ExplainRequest) -> pb.ExplainResponse:
    return server.stub.Explain(message, timeout=60)


def is_kept(server: Loopback, first: pb.ExplainRequest, second: pb.ExplainRequest) -> bool:
    """Whether the second request gets the answer to the first."""
    assert not ask(server, first).provenance.from_cache
    return ask(server, second).provenance.from_cache


FULL: dict[str, Any] = {
    "targets": [label("bee", score="SCORE_LOGIT")],
    "baselines": [every(uniform_noise={"low": 0.0, "high": 1.0, "seed": 1, "count": 2})],
    "baseline_reduction": "BASELINE_REDUCTION_EACH",
    "methods": [{"integrated_gradients": {"tolerance": 0.25, "completeness_tolerance": 0.25, "max_step_count": 24}}],
    "regions": [{"name": "corner", "box": BOX}],
    "groups": [{"name": "first", "selectors": [{"instance_index": 0}], "pairwise": True}],
    "response_options": {"views": ["VIEW_ELEMENTS"]},
}
"""Something in every optional field of a request that decides its answer."""


def changed(**fields: Any) -> dict[str, Any]:
    return {**FULL, **fields}


def noise(**fields: Any) -> dict[str, Any]:
    return changed(baselines=[every(uniform_noise={"low": 0.0, "high": 1.0, "seed": 1, "count": 2, **fields})])


def integrated(**fields: Any) -> dict[str, Any]:
    spec = method_pb2.IntegratedGradients(**FULL["methods"][0]["integrated_gradients"])
    spec.MergeFrom(method_pb2.IntegratedGradients(**fields))
    return changed(methods=[{"integrated_gradients": spec}])


OTHERS: dict[str, dict[str, Any]] = {
    "targets: another class": changed(targets=[label("ant", score="SCORE_LOGIT")]),
    "targets: the same class by position": changed(targets=[element(1, score="SCORE_LOGIT")]),
    "targets: another score": changed(targets=[label("bee", score="SCORE_PROBABILITY")]),
    "targets: of one instance": changed(
        targets=[label("bee", score="SCORE_LOGIT"), label("ant", score="SCORE_LOGIT", instance_index=0)]
    ),
    "targets: argmax": changed(targets=[{"argmax": {}}]),
    "targets: top k": changed(targets=[{"top_k": {"count": 1}}]),
    "targets: weights": changed(targets=[{"weights": encode(np.ones(4, np.float32))}]),
    "baselines: another seed": noise(seed=2),
    "baselines: another count": noise(count=3),
    "baselines: another range": noise(high=0.5),
    "baselines: in pixels": changed(baselines=[{"every_input": {**every(zeros={})["every_input"], "space": 2}}]),
    "baselines: another kind": changed(baselines=[every(black={})]),
    "baselines: a tensor": changed(baselines=[every(tensor=encode(np.ones((3, 6, 8), np.float32)))]),
    "baselines: in another order": changed(baselines=[every(zeros={}), every(black={})]),
    "baseline_reduction": changed(baseline_reduction="BASELINE_REDUCTION_MEAN", groups=[]),
    "methods: tolerance": integrated(tolerance=0.2),
    "methods: completeness_tolerance": integrated(completeness_tolerance=0.2),
    "methods: max_step_count": integrated(max_step_count=32),
    "methods: a fixed rule": changed(methods=steps(8)),
    "methods: quadrature": changed(methods=steps(8, quadrature="QUADRATURE_LEFT")),
    "regions: another place": changed(regions=[{"name": "corner", "box": {**BOX, "x": 1}}]),
    "regions: another name": changed(regions=[{"name": "edge", "box": BOX}]),
    "regions: a mask": changed(regions=[{"name": "corner", "mask": encode(np.ones((6, 8), np.bool_))}]),
    "groups: another name": changed(groups=[{"name": "one", "selectors": [{"instance_index": 0}], "pairwise": True}]),
    "groups: other maps": changed(groups=[{"name": "first", "selectors": [{"instance_index": 1}], "pairwise": True}]),
    "groups: without pairs": changed(groups=[{"name": "first", "selectors": [{"instance_index": 0}]}]),
    "response_options: another view": changed(response_options={"views": ["VIEW_CHANNEL_SUM"]}),
    **{
        f"response_options: {field.name}": changed(response_options={"views": ["VIEW_ELEMENTS"], field.name: True})
        for field in pb.ResponseOptions.DESCRIPTOR.fields
        if field.name != "views"
    },
}
"""Requests that differ from FULL in one thing, by the field that it is in."""


def test_every_field_of_a_request_is_tried() -> None:
    """A new field must be among those that decide the answer, or those that do not."""
    tried = {name.split(":")[0] for name in OTHERS}
    elsewhere = {"model", "inputs", "fixed_inputs", "layers", "priority", "time_budget"}

    assert tried | elsewhere == {field.name for field in pb.ExplainRequest.DESCRIPTOR.fields}
    assert not tried & elsewhere


@pytest.mark.parametrize("name", OTHERS)
def test_another_option_is_another_answer(caching: Loopback, name: str) -> None:
    x = image()

    assert not is_kept(caching, request("image", {"image": x}, **FULL), request("image", {"image": x}, **OTHERS[name]))


@pytest.mark.parametrize("changes", [(0, 0, 0, 0), (1, 2, 5, 7)])
def test_another_input_is_another_answer(caching: Loopback, changes: tuple[int, ...]) -> None:
    x, other = image(), image()
    other[...] = x
    other[changes] = np.nextafter(other[changes], np.float32(9))

    assert not is_kept(caching, request("image", {"image": x}), request("image", {"image": other}))


def test_an_input_that_is_held_fixed_is_another_answer(caching: Loopback) -> None:
    x = {"x": normal(2, 5, seed=71), "y": normal(2, 5, seed=72)}

    assert not is_kept(caching, request("product", x), request("product", x, fixed_inputs=["y"]))


def test_a_layer_in_the_place_of_inputs_is_another_answer(caching: Loopback) -> None:
    x = {"image": normal(1, 3, 6, 8, seed=74)}

    assert not is_kept(caching, request("rectified", x), request("rectified", x, layers=["f"]))
    assert not is_kept(caching, request("rectified", x, layers=["d"]), request("rectified", x, layers=["c"]))


def test_another_version_or_model_is_another_answer(caching: Loopback) -> None:
    """Models of equal weights answer under their own name."""
    x = {"x": normal(1, 4, seed=73)}
    first = request("versions", x)
    first.model.named.version = 1

    assert not is_kept(caching, first, request("versions", x))
    assert not ask(caching, request("plain", x)).provenance.from_cache


SPELLED_OUT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "target": ({}, {"targets": [element(2, output="logits", score="SCORE_OUTPUT")]}),
    "output": ({"targets": [{"argmax": {}}]}, {"targets": [{"argmax": {}, "output": "logits"}]}),
    "baseline": ({}, {"baselines": [every(data={"name": "training_mean"})]}),
    "baseline by input": (
        {"baselines": [every(gray={})]},
        {"baselines": [{"inputs": {"image": {"gray": {}}}}]},
    ),
    "space": (
        {"baselines": [every(zeros={})]},
        {"baselines": [{"every_input": {"zeros": {}, "space": "SPACE_MODEL"}}]},
    ),
    "noise": (
        {"baselines": [every(uniform_noise={})]},
        {
            "baselines": [
                {
                    "every_input": {
                        "uniform_noise": {"low": 0.0, "high": 255.0, "seed": 0, "count": 1},
                        "space": "SPACE_PIXEL",
                    }
                }
            ]
        },
    ),
    "reduction": ({}, {"baseline_reduction": "BASELINE_REDUCTION_EACH"}),
    "method": ({}, {"methods": [{"integrated_gradients": {}}]}),
    "adaptive rule": (
        {},
        {
            "methods": [
                {
                    "integrated_gradients": {
                        "quadrature": "QUADRATURE_ADAPTIVE",
                        "tolerance": 0.05,
                        "completeness_tolerance": 0.05,
                        "max_step_count": 128,
                    }
                }
            ]
        },
    ),
    "fixed rule": ({"methods": steps(8)}, {"methods": steps(8, quadrature="QUADRATURE_MIDPOINT")}),
    "region": (
        {"regions": [{"name": "corner", "box": BOX}]},
        {"regions": [{"name": "corner", "box": BOX, "input": "image"}]},
    ),
    "views": ({}, {"response_options": {"views": ["VIEW_ELEMENTS", "VIEW_CHANNEL_SUM"]}}),
    "options": ({}, {"response_options": {"omit_tensors": False}}),
    "version": ({}, {"model": named("image", 1)}),
    "priority": ({"priority": -3}, {"priority": 7}),
}
"""Requests that leave a default out, and the same ones that state it."""


@pytest.mark.parametrize("name", SPELLED_OUT)
def test_a_default_that_is_spelled_out_is_the_same_request(caching: Loopback, name: str) -> None:
    short, long = SPELLED_OUT[name]
    message = request("image", {"image": image()}, **short)
    stated = pb.ExplainRequest(inputs=message.inputs, **{"model": message.model, **long})

    assert is_kept(caching, message, stated)


def test_a_kept_answer_is_the_answer_but_for_its_durations(caching: Loopback) -> None:
    message = request("image", {"image": image()}, **FULL)
    computed, kept, again = (ask(caching, message) for _ in range(3))

    assert computed.provenance.compute_duration.ToNanoseconds() > 0
    for own in (kept.provenance, again.provenance):
        assert own.HasField("queue_duration") and own.queue_duration.ToNanoseconds() == 0
        assert own.HasField("compute_duration") and own.compute_duration.ToNanoseconds() == 0
        assert own.row_count == computed.provenance.row_count > 0
        own.ClearField("from_cache")
    for response in (computed, kept, again):
        for duration in ("queue_duration", "compute_duration", "serialize_duration"):
            response.provenance.ClearField(duration)
    assert computed == kept == again


def test_a_kept_answer_evaluates_no_row_and_is_counted(caching: Loopback) -> None:
    message = request("image", {"image": image()})
    ask(caching, message)
    before = {
        name: caching.metric(name, model="image")
        for name in ("explainserve_rows_total", "explainserve_attributions_total")
    }
    hits = caching.metric("explainserve_response_cache_lookups_total", model="image", outcome="hit")

    assert ask(caching, message).provenance.from_cache
    assert {name: caching.metric(name, model="image") for name in before} == before
    assert caching.metric("explainserve_response_cache_lookups_total", model="image", outcome="hit") == hits + 1
    assert caching.metric("explainserve_response_cache_bytes") > 0


def adaptive_slowly(**fields: Any) -> pb.ExplainRequest:
    """Seconds of work: no tolerance is reached."""
    options = {"tolerance": 1e-9, "completeness_tolerance": 1e-9, "max_step_count": 200}
    return request("slow", {"x": normal(1, 4, seed=74)}, methods=[{"integrated_gradients": options}], **fields)


def test_an_answer_that_was_cut_by_its_time_budget_is_not_kept(caching: Loopback) -> None:
    cut = ask(caching, adaptive_slowly(time_budget={"nanos": 700_000_000}))
    whole = ask(caching, adaptive_slowly())

    assert cut.attributions[0].stop_reason == attribution_pb2.STOP_REASON_TIME_BUDGET
    assert not whole.provenance.from_cache
    assert whole.attributions[0].step_count > cut.attributions[0].step_count
    # and the whole one is there for whoever has less time than it took
    soon = ask(caching, adaptive_slowly(time_budget={"nanos": 700_000_000}))
    assert soon.provenance.from_cache and np.array_equal(maps(soon)[0], maps(whole)[0])


def test_an_answer_that_is_not_finite_is_not_kept(caching: Loopback) -> None:
    x = {"x": np.array([[1.0, -1.0, 4.0, 9.0]], np.float32)}
    message = request("root", x, targets=[{"weights": encode(np.ones(4, np.float32))}], methods=steps(4))

    assert not is_kept(caching, message, message)


@pytest.mark.parametrize(
    "fields",
    [
        {"targets": [element(9)]},
        {"targets": [element(0, output="nothing")]},
        {"baselines": [{"inputs": {"image": {"zeros": {}}, "nothing": {"zeros": {}}}}]},
        {"baselines": [every(data={"name": "nothing"})]},
    ],
)
def test_a_request_that_is_refused_is_refused_again(caching: Loopback, fields: dict[str, Any]) -> None:
    x = {"image": image()}
    ask(caching, request("image", x, baselines=[every(zeros={})]))
    first, second = (refusal(lambda: ask(caching, request("image", x, **fields))) for _ in range(2))

    assert (first.code, first.reason, first.message) == (second.code, second.reason, second.message)


def test_the_bound_holds_and_the_least_recently_used_leave(serve: Any) -> None:
    messages = [request("image", {"image": image()}, methods=steps(4)) for _ in range(6)]
    size = ask(serve(), messages[0]).ByteSize()
    server = serve(response_cache_bytes=4 * size)

    for message in messages:
        ask(server, message)
        assert ask(server, messages[0]).provenance.from_cache  # used again and again, so it stays
        assert 0 < server.metric("explainserve_response_cache_bytes") <= 4 * size
    assert not ask(server, messages[1]).provenance.from_cache


def test_nothing_is_kept_unless_asked_for(service: Loopback) -> None:
    message = request("plain", {"x": normal(1, 4, seed=75)})

    assert not is_kept(service, message, message)
    assert service.metric("explainserve_response_cache_lookups_total") == 0


async def test_an_answer_that_cannot_fit_is_not_even_written() -> None:
    """Its tensors alone tell."""
    written: list[bool] = []

    class Response:
        def SerializeToString(self) -> bytes:
            written.append(True)
            return b"answer"

    answer, response, key = Answer(None, (), (), Usage()), Response(), b"key"  # type: ignore[arg-type]
    cache = ResponseCache(2000, Metrics(CollectorRegistry()))
    await cache.keep(Lookup(key), answer, response, tensor_bytes=2000)  # type: ignore[arg-type]
    assert not written
    await cache.keep(Lookup(key), answer, response, tensor_bytes=1000)  # type: ignore[arg-type]
    assert written
