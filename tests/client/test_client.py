"""Both clients over a loopback connection: what is sent, what comes back, what is retried, remembered and refused."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from client.fake_service import FakeService, explain_response, maps, refuse, tensor
from explainserve.v1 import (
    baseline_pb2,
    explainer_service_pb2,
    model_pb2,
    model_repository_service_pb2,
    statistics_pb2,
    target_pb2,
)
from explainserve_client import (
    AsyncClient,
    Box,
    Client,
    ClientClosedError,
    DeadlineExceeded,
    IntegratedGradients,
    InvalidArgument,
    MissingEntryError,
    NotFound,
    RequestValueError,
    Unavailable,
)

IMAGE = np.zeros((1, 64, 64), np.float32)


def test_the_example_of_the_readme(service: FakeService, address: str) -> None:
    with Client(address) as client:
        result = client.explain(
            "two-digits",
            IMAGE,
            targets=[3, 8],
            baselines="gray",
            method=IntegratedGradients(step_count=64),
            regions={"left": Box(0, 0, 32, 64)},
        )

    a, raw = result.attributions[0], maps()[0]
    view = raw[0].astype(np.float64)
    assert np.array_equal(a.tensor, raw)
    assert np.array_equal(a.tensors["image"], raw)
    assert (a.convergence_delta, a.instance_output_value, a.baseline_output_value) == (0.01, 0.9, 0.1)
    assert a.statistics["CHANNEL_SUM"].max == view.max()
    displayed = a.normalization("MIN_MAX", "CHANNEL_SUM").apply(a.tensor)
    np.testing.assert_allclose(displayed, (view - view.min()) / (view.max() - view.min()), rtol=1e-12)
    assert result.joint["all"].statistics["CHANNEL_SUM"].min == min(values.min() for values in maps())
    assert result.provenance.backend == "onnxruntime"
    assert a.inputs["image"].statistics is a.statistics
    assert a.regions["left"]["CHANNEL_SUM"].share == 0.5


async def test_a_request_holds_what_was_asked_for(client: Any, service: FakeService) -> None:
    await client.explain(
        "two-digits",
        IMAGE,
        version=2,
        targets=[3, 8],
        baselines="gray",
        score="PROBABILITY",
        method=IntegratedGradients(step_count=64),
        regions={"left": Box(0, 0, 32, 64)},
        views=["CHANNEL_SUM"],
        omit_score_path=True,
        include_baseline_tensors=True,
        baseline_reduction="MEAN",
        time_budget=1.5,
        priority=-3,
    )

    (request,) = service.requests("Explain")
    assert request.model == model_pb2.ModelRef(named=model_pb2.NamedModel(name="two-digits", version=2))
    assert dict(request.inputs) == {"image": tensor(IMAGE[np.newaxis])}
    assert [list(target.element.index.indices) for target in request.targets] == [[3], [8]]
    assert {target.score for target in request.targets} == {target_pb2.SCORE_PROBABILITY}
    assert [baseline.every_input.WhichOneof("kind") for baseline in request.baselines] == ["gray"]
    assert request.methods[0].integrated_gradients.step_count == 64
    assert request.regions[0].box == statistics_pb2.Box(width=32, height=64)
    assert request.response_options == explainer_service_pb2.ResponseOptions(
        views=[statistics_pb2.VIEW_CHANNEL_SUM], omit_score_path=True, include_baseline_tensors=True
    )
    assert request.baseline_reduction == baseline_pb2.BASELINE_REDUCTION_MEAN
    assert (request.time_budget.seconds, request.time_budget.nanos) == (1, 500_000_000)
    assert request.priority == -3


async def test_a_bare_request_leaves_every_default_to_the_server(client: Any, service: FakeService) -> None:
    await client.explain("two-digits", IMAGE)

    expected = explainer_service_pb2.ExplainRequest(
        model=model_pb2.ModelRef(named=model_pb2.NamedModel(name="two-digits")),
        inputs={"image": tensor(IMAGE[np.newaxis])},
        response_options=explainer_service_pb2.ResponseOptions(),
    )
    assert service.requests("Explain") == [expected]


async def test_the_signature_is_fetched_once(client: Any, service: FakeService) -> None:
    for _ in range(3):
        await client.explain("two-digits", IMAGE)

    assert len(service.requests("GetModel")) == 1


async def test_the_signature_is_fetched_again_when_another_version_answers(client: Any, service: FakeService) -> None:
    newer = explain_response()
    newer.provenance.model_version = 3
    service.answers["Explain"] = lambda request, context: newer

    await client.explain("two-digits", IMAGE)
    await client.explain("two-digits", IMAGE)

    assert len(service.requests("GetModel")) == 2


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ("load_model", model_repository_service_pb2.LoadModelResponse),
        ("unload_model", model_repository_service_pb2.UnloadModelResponse),
    ],
)
async def test_a_model_is_changed_and_its_signature_fetched_again(
    client: Any, service: FakeService, change: str, answer: type[Any]
) -> None:
    call = "LoadModel" if change == "load_model" else "UnloadModel"
    summary = model_pb2.ModelSummary(name="two-digits", version=2, state=model_pb2.MODEL_STATE_UNLOADED)
    service.answers[call] = lambda request, context: answer(model=summary)
    await client.explain("two-digits", IMAGE)

    changed = await getattr(client, change)("two-digits", 2)
    await getattr(client, change)("two-digits")
    await client.explain("two-digits", IMAGE)

    assert (changed.name, changed.version, changed.state) == ("two-digits", 2, "UNLOADED")
    versions = [
        request.model.version if request.model.HasField("version") else None for request in service.requests(call)
    ]
    assert versions == [2, None]
    assert len(service.requests("GetModel")) == 2


async def test_the_index_lists_what_is_not_loaded(client: Any, service: FakeService) -> None:
    summary = model_pb2.ModelSummary(name="later", version=1, state=model_pb2.MODEL_STATE_UNLOADED)
    service.answers["IndexModels"] = lambda request, context: model_repository_service_pb2.IndexModelsResponse(
        models=[summary]
    )

    (found,) = await client.index()
    assert (found.name, found.version, found.state) == ("later", 1, "UNLOADED")


async def test_the_signature_is_fetched_again_after_a_refusal(client: Any, service: FakeService) -> None:
    service.answers["Explain"] = lambda request, context: refuse(
        context, grpc.StatusCode.INVALID_ARGUMENT, "INPUT_SHAPE_MISMATCH", "wrong shape", {"input": "image"}
    )
    for _ in range(2):
        with pytest.raises(InvalidArgument):
            await client.explain("two-digits", IMAGE)

    assert len(service.requests("GetModel")) == 2


async def test_a_model_that_failed_to_load_is_refused_with_its_reason(client: Any, service: FakeService) -> None:
    summary = model_pb2.ModelSummary(name="broken", version=1, state=model_pb2.MODEL_STATE_FAILED, reason="truncated")
    service.models["broken"] = model_pb2.Model(summary=summary)

    with pytest.raises(RequestValueError, match="'broken' version 1 is FAILED: truncated"):
        await client.explain("broken", IMAGE)
    assert (await client.model("broken")).summary.reason == "truncated"


async def test_errors_carry_code_reason_metadata_and_request_id(client: Any) -> None:
    with pytest.raises(NotFound) as caught:
        await client.explain("no-such", IMAGE, request_id="abc")

    error = caught.value
    assert (error.code, error.reason, error.metadata, error.request_id) == (
        "NOT_FOUND",
        "UNKNOWN_MODEL",
        {"model": "no-such"},
        "abc",
    )
    assert "no model 'no-such'" in str(error)


async def test_the_request_id_is_made_up_sent_and_returned(client: Any, service: FakeService) -> None:
    first = await client.explain("two-digits", IMAGE)
    second = await client.explain("two-digits", IMAGE)
    chosen = await client.explain("two-digits", IMAGE, request_id="mine")

    sent = [metadata["x-request-id"] for name, _, metadata in service.calls if name == "Explain"]
    assert sent == [first.request_id, second.request_id, "mine"]
    assert chosen.request_id == "mine"
    assert len(set(sent)) == 3 and len(sent[0]) == 32


async def test_the_timeout_spans_all_messages_of_a_call(client: Any, service: FakeService) -> None:
    seen: list[float] = []
    slow_model = service.answers["GetModel"]

    def get_model(request: Any, context: grpc.ServicerContext) -> Any:
        time.sleep(0.3)
        return slow_model(request, context)

    def explain(request: Any, context: grpc.ServicerContext) -> Any:
        seen.append(context.time_remaining())
        return explain_response()

    service.answers.update(GetModel=get_model, Explain=explain)
    await client.explain("two-digits", IMAGE, timeout=8)

    assert seen[0] <= 8 - 0.3 + 0.05


async def test_a_deadline_that_passes_is_an_error_with_the_request_id(client: Any, service: FakeService) -> None:
    released = threading.Event()
    service.answers["Explain"] = lambda request, context: (released.wait(10), explain_response())[1]
    try:
        with pytest.raises(DeadlineExceeded) as caught:
            await client.explain("two-digits", IMAGE, timeout=0.5, request_id="late")
    finally:
        released.set()

    assert caught.value.request_id == "late"


async def test_no_deadline_is_sent_without_a_timeout(
    connect: Callable[..., Any], service: FakeService, address: str
) -> None:
    remaining: list[float | None] = []

    def explain(request: Any, context: grpc.ServicerContext) -> Any:
        remaining.append(context.time_remaining())
        return explain_response()

    service.answers["Explain"] = explain
    unlimited = connect(address, timeout=None)
    await unlimited.explain("two-digits", IMAGE)
    await unlimited.aclose()

    assert remaining[0] is None or remaining[0] > 1e6


async def test_an_unavailable_server_is_tried_again_also_with_a_large_image(client: Any, service: FakeService) -> None:
    """A request above gRPC's own retry buffer of 256 KiB would silently not be tried again."""
    attempts: list[int] = []

    def explain(request: Any, context: grpc.ServicerContext) -> Any:
        attempts.append(len(request.inputs["image"].data))
        if len(attempts) < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        return explain_response()

    service.answers["Explain"] = explain
    await client.explain("two-digits", np.zeros((100, 1, 64, 64), np.float32), timeout=20)

    assert attempts == [100 * 64 * 64 * 4] * 3


async def test_nothing_else_is_tried_again(client: Any, service: FakeService) -> None:
    service.answers["Explain"] = lambda request, context: context.abort(grpc.StatusCode.INTERNAL, "bug")

    with pytest.raises(Exception, match="INTERNAL: bug"):
        await client.explain("two-digits", IMAGE)
    assert len(service.requests("Explain")) == 1


async def test_a_server_that_is_not_there_is_unavailable(connect: Callable[..., Any]) -> None:
    lost = connect("127.0.0.1:1", timeout=5)
    with pytest.raises(Unavailable):
        await lost.models()
    await lost.aclose()


async def test_a_message_above_the_limit_is_refused(
    connect: Callable[..., Any], service: FakeService, address: str
) -> None:
    small = connect(address, max_message_bytes=10_000, timeout=10)
    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED"):
        await small.explain("two-digits", IMAGE)
    await small.aclose()

    assert service.requests("Explain") == []


async def test_a_reply_above_grpcs_own_limit_arrives(client: Any, service: FakeService) -> None:
    large = explain_response()
    large.attributions[0].inputs[0].tensor.CopyFrom(tensor(np.ones((2, 1024, 1024), np.float32)))
    service.answers["Explain"] = lambda request, context: large

    result = await client.explain("two-digits", IMAGE)

    assert result.attributions[0].tensor.shape == (2, 1024, 1024)


async def test_predictions(client: Any, service: FakeService) -> None:
    response = explainer_service_pb2.PredictResponse(
        predictions=[
            explainer_service_pb2.Prediction(
                output="logits",
                classes=[explainer_service_pb2.ClassScore(index=3, label="three", score=0.75)],
                tensor=tensor(np.arange(10.0)),
            )
        ]
    )
    response.provenance.model_version = 2
    service.answers["Predict"] = lambda request, context: response

    result = await client.predict("two-digits", IMAGE, top_k=1, score="PROBABILITY", include_tensors=True)

    (request,) = service.requests("Predict")
    assert (request.top_k, request.score, request.include_tensors) == (1, target_pb2.SCORE_PROBABILITY, True)
    (prediction,) = result.predictions
    assert (prediction.classes[0].index, prediction.classes[0].label, prediction.classes[0].score) == (3, "three", 0.75)
    assert np.array_equal(prediction.tensor, np.arange(10.0))


async def test_the_cost_is_estimated_of_the_same_request(client: Any, service: FakeService) -> None:
    service.answers["EstimateCost"] = lambda request, context: explainer_service_pb2.EstimateCostResponse(
        min_row_count=66, max_row_count=130, reply_bytes=17_000
    )
    options: dict[str, Any] = {"targets": [3, 8], "baselines": "gray", "views": ["ELEMENTS"], "omit_tensors": True}

    await client.explain("two-digits", IMAGE, **options)
    cost = await client.estimate_cost("two-digits", IMAGE, **options)

    assert (cost.min_row_count, cost.max_row_count, cost.reply_bytes) == (66, 130, 17_000)
    assert [estimate.explain for estimate in service.requests("EstimateCost")] == service.requests("Explain")


async def test_a_misspelled_option_is_refused(client: Any) -> None:
    with pytest.raises(TypeError, match="omit_tensor"):
        await client.estimate_cost("two-digits", IMAGE, omit_tensor=True)


async def test_models_are_listed(client: Any, service: FakeService) -> None:
    line = model_pb2.ModelSummary(
        name="two-digits", version=2, state=model_pb2.MODEL_STATE_READY, format=model_pb2.MODEL_FORMAT_TORCH_EXPORT
    )
    service.answers["ListModels"] = lambda request, context: explainer_service_pb2.ListModelsResponse(models=[line])

    (summary,) = await client.models()

    assert (summary.name, summary.version, summary.state, summary.format) == ("two-digits", 2, "READY", "TORCH_EXPORT")


async def test_a_model_is_described(client: Any) -> None:
    info = await client.model("two-digits")

    assert info.inputs["image"].shape == (None, 1, 64, 64)
    assert info.inputs["image"].dtype == "float32"
    assert info.outputs["logits"].kind == "LOGITS"
    assert info.outputs["logits"].labels[3] == "3"
    assert info.default_target is None


@pytest.mark.parametrize(("value", "state"), [(1, "SERVING"), (2, "NOT_SERVING"), (99, "UNKNOWN")])
async def test_health(client: Any, service: FakeService, value: int, state: str) -> None:
    response = service.answers["Health"](None, None)
    response.value = value
    service.answers["Health"] = lambda request, context: response

    assert await client.health("explainserve.v1.ExplainerService") == state
    assert service.requests("Health")[0].value == "explainserve.v1.ExplainerService"


async def test_a_preprocessed_image_keeps_its_geometry_beside_the_map(client: Any, service: FakeService) -> None:
    prepared = await client.preprocess("two-digits", np.full((128, 96), 255, np.uint8), resize="stretch")

    result = await client.explain("two-digits", prepared)

    assert result.attributions[1].inputs["image"].geometry == prepared.geometry
    assert prepared.geometry.to_image(Box(0, 0, 64, 64)) == Box(0, 0, 96, 128)
    sent = np.frombuffer(service.requests("Explain")[0].inputs["image"].data, "<f4")
    np.testing.assert_allclose(sent, (1 - 0.5) / 0.25, rtol=1e-6)


async def test_joint_figures_split_by_unit_say_which_there_are(client: Any, service: FakeService) -> None:
    service.answers["Explain"] = lambda request, context: explain_response(
        ("all/logits/LOGIT", "all/logits/PROBABILITY")
    )
    result = await client.explain("two-digits", IMAGE)

    with pytest.raises(
        KeyError, match="no group 'all'; there are 'all/logits/LOGIT', 'all/logits/PROBABILITY'"
    ) as caught:
        result.joint["all"]
    assert isinstance(caught.value, MissingEntryError)


async def test_a_closed_client_says_so(connect: Callable[..., Any], address: str) -> None:
    used = connect(address)
    await used.model("two-digits")
    await used.aclose()
    await used.aclose()

    with pytest.raises(ClientClosedError, match="closed"):
        await used.model("two-digits")


def test_a_channel_that_was_passed_in_stays_open(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        with Client(channel=channel) as first:
            first.model("two-digits")
        with Client(channel=channel) as second:
            assert second.model("two-digits").name == "two-digits"


async def test_an_asyncio_channel_that_was_passed_in_stays_open(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        async with AsyncClient(channel=channel) as first:
            await first.model("two-digits")
        async with AsyncClient(channel=channel) as second:
            assert (await second.model("two-digits")).name == "two-digits"


def test_an_asyncio_client_may_be_made_before_its_event_loop(address: str) -> None:
    client = AsyncClient(address)

    async def use() -> str:
        async with client:
            return (await client.model("two-digits")).name

    assert asyncio.run(use()) == "two-digits"


async def test_cancelling_a_task_cancels_the_call(service: FakeService, address: str) -> None:
    started, ended = threading.Event(), threading.Event()

    def explain(request: Any, context: grpc.ServicerContext) -> Any:
        context.add_callback(ended.set)
        started.set()
        ended.wait(10)
        return explain_response()

    service.answers["Explain"] = explain
    async with AsyncClient(address) as client:
        task = asyncio.create_task(client.explain("two-digits", IMAGE, timeout=9))
        await asyncio.to_thread(started.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(ended.wait, 5)


def test_threads_may_share_a_blocking_client(service: FakeService, address: str) -> None:
    with Client(address) as client, ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda _: client.explain("two-digits", IMAGE).request_id, range(20)))

    assert len(set(ids)) == 20
