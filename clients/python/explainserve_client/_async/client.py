"""The client: one method per call of the service, arrays in, typed results out."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import grpc
from google.protobuf.wrappers_pb2 import StringValue
from grpc import aio

from explainserve.v1 import (
    explainer_service_pb2,
    explainer_service_pb2_grpc,
    model_repository_service_pb2,
    model_repository_service_pb2_grpc,
)
from explainserve_client.connection import (
    CallContext,
    health_check,
    health_state,
    open_async_channel,
    open_async_stream,
    send_async,
)
from explainserve_client.errors import ClientClosedError, ServerError, request_id_of, server_error
from explainserve_client.inputs import fit
from explainserve_client.methods import Method
from explainserve_client.models import ModelInfo, ModelSummary, model_ref, named_model
from explainserve_client.preprocess import Preprocessed, image_input, preprocess
from explainserve_client.regions import GroupLike, RegionLike
from explainserve_client.requests import ExplainOptions, explain_request, predict_request
from explainserve_client.results import CostEstimate, ExplainResult, PredictResult, explain_result
from explainserve_client.streams import Assembly, ExplainEvent

if TYPE_CHECKING:
    from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceAsyncStub
    from explainserve.v1.model_repository_service_pb2_grpc import ModelRepositoryServiceAsyncStub

Request = TypeVar("Request")
Response = TypeVar("Response")


class AsyncClient:
    """A client over asyncio.

        async with AsyncClient("localhost:8001") as client:
            result = await client.explain("two-digits", image, targets=[3, 8], baselines="gray")

    Signatures of models are fetched once per name and version, and again when the server answers with another version
    or refuses a request. Calls that the server could not take (UNAVAILABLE) are tried up to four times within the
    timeout.

    Args:
        target: address of the server, such as "localhost:8001".
        channel: a channel to use instead of opening one; it stays open when the client closes.
        timeout: seconds for a call that names none, None for no limit.
        credentials: for TLS; None is plain text.
        max_message_bytes: limit of a request and of a reply.
    """

    def __init__(
        self,
        target: str = "localhost:8001",
        *,
        channel: aio.Channel | None = None,
        timeout: float | None = 60.0,
        credentials: grpc.ChannelCredentials | None = None,
        max_message_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        self._target = target
        self._channel = channel
        self._owns_channel = channel is None
        self._timeout = timeout
        self._credentials = credentials
        self._max_message_bytes = max_message_bytes
        self._explainer: ExplainerServiceAsyncStub | None = None
        self._infos: dict[tuple[str, int | None], ModelInfo] = {}
        self._closed = False
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<AsyncClient of {self._target}{' closed' if self._closed else ''}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the channel, unless it was passed in. Calls that are still running are cancelled."""
        self._closed = True
        channel, self._channel = self._channel, None
        if channel is not None and self._owns_channel:
            await channel.close()

    async def explain(
        self,
        model: str,
        inputs: Any,
        *,
        version: int | None = None,
        method: Method | Sequence[Method] | None = None,
        targets: Any = None,
        baselines: Any = None,
        score: str | None = None,
        regions: Mapping[str, RegionLike] | None = None,
        groups: Mapping[str, GroupLike] | None = None,
        fixed_inputs: Sequence[str] = (),
        layers: Sequence[str] = (),
        baseline_reduction: str | None = None,
        views: Sequence[str] = (),
        omit_tensors: bool = False,
        omit_statistics: bool = False,
        omit_joint_statistics: bool = False,
        omit_score_path: bool = False,
        omit_regions: bool = False,
        include_baseline_tensors: bool = False,
        include_standard_errors: bool = False,
        include_parts: bool = False,
        time_budget: float | None = None,
        priority: int = 0,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> ExplainResult:
        """Raw attributions of a batch of instances, with all figures needed to draw or compare them.

        Args:
            model: name of the model.
            inputs: an array where the model has one input, else a dict by input name, in MODEL space; with the batch
                axis, or without it for a single instance. What `preprocess` returned, or a list of that, is an input
                too.
            version: None is the highest that is ready.
            method: IntegratedGradients(...) or another method, or a list of them, which share what they evaluate; None
                is adaptive Integrated Gradients.
            targets: one or a list of class indices, index paths, labels, "argmax", TopK(k), Margin(a, b), float weight
                arrays, Target(...); None is the model's default.
            baselines: one or a list of "zeros", "black", "gray", "white", "random", arrays, typed baselines, or dicts
                of these by input; None is the model's default.
            score: "OUTPUT", "LOGIT", "PROBABILITY" or "LOG_PROBABILITY", for every target that does not name its own.
                None is each method's own: the output as it is, or what stands before its softmax or sigmoid for methods
                that are defined on it, where the model file shows it.
            regions: boxes or boolean masks by name, whose attributions are summed.
            groups: by name, lists of AttributionSelector whose figures are wanted together.
            fixed_inputs: names of inputs that keep the instance's value and get no attribution.
            layers: names of layers that are explained in the place of the inputs, such as an embedding of token ids.
            baseline_reduction: "EACH" (default) or "MEAN" over the baselines.
            views: "ELEMENTS", "CHANNEL_SUM", "CHANNEL_ABS_SUM", "CHANNEL_MAX_ABS"; default the first two.
            omit_tensors, omit_statistics, omit_joint_statistics, omit_score_path, omit_regions: left out of the answer.
            include_baseline_tensors: whether the answer holds the baselines' values.
            include_standard_errors: whether it holds the standard error of each value of sampled methods.
            include_parts: whether it holds segments, and the maps that a map was made of.
            time_budget: seconds after which the best map so far is the answer.
            priority: -10 to 10, higher goes first.
            timeout: seconds for the whole call; None is the client's, infinity no limit.
            request_id: for the server's logs; made up where None.

        Raises:
            RequestValueError, RequestTypeError: the arguments cannot be sent.
            ServerError: the server refused or failed; the subclass says which.
        """
        context = self._context(timeout, request_id)
        info = await self._info(model, version, context)
        instances = fit(inputs, info)
        request = explain_request(
            info,
            version,
            instances,
            method=method,
            targets=targets,
            baselines=baselines,
            score=score,
            regions=regions,
            groups=groups,
            fixed_inputs=fixed_inputs,
            layers=layers,
            baseline_reduction=baseline_reduction,
            time_budget=time_budget,
            priority=priority,
            views=views,
            omit_tensors=omit_tensors,
            omit_statistics=omit_statistics,
            omit_joint_statistics=omit_joint_statistics,
            omit_score_path=omit_score_path,
            omit_regions=omit_regions,
            include_baseline_tensors=include_baseline_tensors,
            include_standard_errors=include_standard_errors,
            include_parts=include_parts,
        )
        response, used_id = await self._send_to_model(self._stub().Explain, request, context, info, version)
        result = explain_result(response, instances.geometries, used_id)
        self._notice_version(info, version, result.provenance.model_version)
        return result

    async def explain_stream(
        self,
        model: str,
        inputs: Any,
        *,
        version: int | None = None,
        partial_maps: bool = False,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[ExplainOptions],
    ) -> AsyncGenerator[ExplainEvent, None]:
        """What becomes of each path while an `explain` with the same arguments runs, and then its result.

        Yields a Progress after each round of each path, followed by the map so far, an Attribution, where
        `partial_maps` asks for it; its stop reason is "UNFINISHED" until it is the path's own. The last event is the
        ExplainResult that `explain` returns, which may be larger than a message here. Whoever reads slowly gets the
        newest round of each path, and always its last.

        Nothing is sent before the first event is asked for. Closing the iterator cancels the call, and the server drops
        the rows that wait; leaving a loop early does that as soon as nothing holds the iterator.

        Args:
            model, inputs, version, timeout, request_id, options: as in `explain`.
            partial_maps: whether the map so far follows each Progress.

        Raises:
            RequestValueError, RequestTypeError, ServerError: as `explain`.
            MalformedResponseError: the stream ended before its result was complete.
        """
        context = self._context(timeout, request_id)
        info = await self._info(model, version, context)
        instances = fit(inputs, info)
        explain = explain_request(info, version, instances, **options)
        request = explainer_service_pb2.ExplainStreamRequest(explain=explain, include_partial_maps=partial_maps)
        assembly = Assembly(info.inputs, instances.geometries)
        call = open_async_stream(self._stub().ExplainStream, request, context)
        try:
            async for message in call:
                event = assembly.add(message)
                if event is not None:
                    yield event
            used_id = request_id_of(await call.trailing_metadata())
        except grpc.RpcError as error:
            self._infos.pop((info.name, version), None)
            raise server_error(error, context.request_id) from error
        finally:
            call.cancel()
        result = assembly.result(used_id or context.request_id)
        self._notice_version(info, version, result.provenance.model_version)
        yield result

    async def predict(
        self,
        model: str,
        inputs: Any,
        *,
        version: int | None = None,
        top_k: int = 5,
        score: str | None = None,
        outputs: Sequence[str] = (),
        include_tensors: bool = False,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> PredictResult:
        """Outputs of the model, and the `top_k` highest classes with their labels.

        Args:
            model, inputs, version, timeout, request_id: as in `explain`.
            top_k: number of classes, at least 1.
            score: unit of the scores, as in `explain`.
            outputs: names of the outputs to return; all by default.
            include_tensors: whether the answer holds the raw output tensors.
        """
        context = self._context(timeout, request_id)
        info = await self._info(model, version, context)
        request = predict_request(
            info,
            version,
            fit(inputs, info),
            top_k=top_k,
            score=score,
            outputs=outputs,
            include_tensors=include_tensors,
        )
        response, used_id = await self._send_to_model(self._stub().Predict, request, context, info, version)
        self._notice_version(info, version, response.provenance.model_version)
        return PredictResult.from_proto(response, used_id)

    async def estimate_cost(
        self,
        model: str,
        inputs: Any,
        *,
        version: int | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[ExplainOptions],
    ) -> CostEstimate:
        """What an `explain` with the same arguments would cost, without computing it."""
        context = self._context(timeout, request_id)
        info = await self._info(model, version, context)
        explain = explain_request(info, version, fit(inputs, info), **options)
        request = explainer_service_pb2.EstimateCostRequest(explain=explain)
        response, _ = await self._send_to_model(self._stub().EstimateCost, request, context, info, version)
        return CostEstimate.from_proto(response)

    async def models(self, *, timeout: float | None = None, request_id: str | None = None) -> tuple[ModelSummary, ...]:
        """Every model version of the server, those that failed to load included."""
        request = explainer_service_pb2.ListModelsRequest()
        response, _ = await send_async(self._stub().ListModels, request, self._context(timeout, request_id))
        return tuple(ModelSummary.from_proto(line) for line in response.models)

    async def model(
        self, name: str, version: int | None = None, *, timeout: float | None = None, request_id: str | None = None
    ) -> ModelInfo:
        """One model: inputs, outputs, which methods it supports and why not. Asks the server each time."""
        return await self._fetch_info(name, version, self._context(timeout, request_id))

    async def index(self, *, timeout: float | None = None, request_id: str | None = None) -> tuple[ModelSummary, ...]:
        """Every model version in the server's folder, loaded or not. The server must allow model control."""
        request = model_repository_service_pb2.IndexModelsRequest()
        call = self._repository_stub().IndexModels
        response, _ = await send_async(call, request, self._context(timeout, request_id))
        return tuple(ModelSummary.from_proto(line) for line in response.models)

    async def load_model(
        self, name: str, version: int | None = None, *, timeout: float | None = None, request_id: str | None = None
    ) -> ModelSummary:
        """Loads a version of a model, or loads it anew; returns once it answers. The server must allow model control.

        Args:
            version: None is the highest in the server's folder.
            timeout: seconds; loading goes on when they have passed.

        Raises:
            ServerError: it cannot be served; a version that was served before goes on.
        """
        request = model_repository_service_pb2.LoadModelRequest(model=named_model(name, version))
        call = self._repository_stub().LoadModel
        response, _ = await send_async(call, request, self._context(timeout, request_id))
        self._forget(name)
        return ModelSummary.from_proto(response.model)

    async def unload_model(
        self, name: str, version: int | None = None, *, timeout: float | None = None, request_id: str | None = None
    ) -> ModelSummary:
        """Unloads a version of a model; running requests finish. The server must allow model control.

        Args:
            version: None is the highest that is ready.
        """
        request = model_repository_service_pb2.UnloadModelRequest(model=named_model(name, version))
        call = self._repository_stub().UnloadModel
        response, _ = await send_async(call, request, self._context(timeout, request_id))
        self._forget(name)
        return ModelSummary.from_proto(response.model)

    async def preprocess(
        self,
        model: str,
        image: Any,
        *,
        version: int | None = None,
        input: str | None = None,
        resize: str | int | None = None,
        crop: str | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Preprocessed:
        """An image as an instance of the model's input, with the geometry that maps boxes between the two.

        Args:
            model, version, timeout, request_id: as in `explain`.
            image: array [height, width] or [height, width, channels] in 0..255, PIL image or path.
            input: name of the input; None is the only one that is laid out as an image.
            resize: None, "stretch", "shortest", or a number of pixels for the shorter side.
            crop: None or "center".
        """
        info = await self._info(model, version, self._context(timeout, request_id))
        return preprocess(image, image_input(info, input), resize=resize, crop=crop)

    async def health(self, service: str = "", *, timeout: float | None = None, request_id: str | None = None) -> str:
        """ "SERVING" or "NOT_SERVING", of the whole server or of a service of it."""
        self._stub()
        check = health_check(self._channel)
        response, _ = await send_async(check, StringValue(value=service), self._context(timeout, request_id))
        return health_state(response)

    def _stub(self) -> ExplainerServiceAsyncStub:
        """Kept, for making it takes a while."""
        channel = self._opened_channel()
        if self._explainer is None:
            self._explainer = explainer_service_pb2_grpc.ExplainerServiceStub(channel)
        return self._explainer

    def _repository_stub(self) -> ModelRepositoryServiceAsyncStub:
        return model_repository_service_pb2_grpc.ModelRepositoryServiceStub(self._opened_channel())

    def _opened_channel(self) -> aio.Channel:
        """Opened at the first call, so that a client may be made before its event loop runs."""
        with self._lock:
            if self._closed:
                raise ClientClosedError(f"the client of {self._target} is closed")
            if self._channel is None:
                self._channel = open_async_channel(self._target, self._credentials, self._max_message_bytes)
            return self._channel

    def _context(self, timeout: float | None, request_id: str | None) -> CallContext:
        return CallContext.starting_now(self._timeout if timeout is None else timeout, request_id)

    async def _info(self, name: str, version: int | None, context: CallContext) -> ModelInfo:
        """The signature that arrays are fitted to, of a version that can answer."""
        info = self._infos.get((name, version)) or await self._fetch_info(name, version, context)
        info.require_ready()
        return info

    async def _fetch_info(self, name: str, version: int | None, context: CallContext) -> ModelInfo:
        request = explainer_service_pb2.GetModelRequest(model=model_ref(name, version))
        response, _ = await send_async(self._stub().GetModel, request, context)
        info = ModelInfo.from_proto(response.model)
        if info.summary.state == "READY":
            self._infos[name, version] = info
        return info

    async def _send_to_model(
        self,
        method: aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        context: CallContext,
        info: ModelInfo,
        version: int | None,
    ) -> tuple[Response, str]:
        """Sends what was fitted to a signature; a refusal may mean that the signature is no longer the model's."""
        try:
            return await send_async(method, request, context)
        except ServerError:
            self._infos.pop((info.name, version), None)
            raise

    def _forget(self, name: str) -> None:
        """Drops the signatures of a model whose versions changed."""
        for key in [key for key in self._infos if key[0] == name]:
            self._infos.pop(key, None)

    def _notice_version(self, info: ModelInfo, version: int | None, answered: int) -> None:
        if info.version != answered:
            self._infos.pop((info.name, version), None)
