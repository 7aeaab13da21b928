"""Every RPC of ExplainerService, from message to message. The way to the device: `requests.py` -> `explainer.py` ->
`engine.py` -> `scheduling/` -> `backends/`; and back through `figures.py` and `responses.py`."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import grpc

from explainserve.errors import DeadlineExceeded, LimitExceeded, Unimplemented
from explainserve.explainer import Answer, Explainer, Observer, Prepared, Round, unobserved
from explainserve.memory import Memory
from explainserve.methods import name_of
from explainserve.metrics import Metrics
from explainserve.plan import Differentiation
from explainserve.repository import Repository
from explainserve.rpc import (
    model_messages,
    provenance,
    reply_size,
    request_inputs,
    request_targets,
    requests,
    responses,
    streaming,
)
from explainserve.rpc.model_references import model_name
from explainserve.rpc.response_cache import Lookup, ResponseCache
from explainserve.scheduling import Request
from explainserve.served_model import ServedModel
from explainserve.settings import Settings
from explainserve.signature import OutputSpec
from explainserve.v1 import attribution_pb2, model_pb2
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceServicer

Context = grpc.aio.ServicerContext[Any, Any]
Reply = TypeVar("Reply")


@dataclass(frozen=True, eq=False)
class _Admissible:
    """A request that the server can answer when it has room.

    Attributes:
        message_memory: what its message and its reply take, as long as the reader takes.
    """

    prepared: Prepared
    reply: reply_size.ReplySize
    message_memory: int


class Servicer(ExplainerServiceServicer):
    """Answers RPCs. Errors are raised; the interceptor translates them."""

    def __init__(
        self, repository: Repository, explainer: Explainer, memory: Memory, metrics: Metrics, settings: Settings
    ) -> None:
        self._repository = repository
        self._explainer = explainer
        self._memory = memory
        self._metrics = metrics
        self._settings = settings
        self._cache = ResponseCache(settings.response_cache_bytes, metrics)

    async def Explain(  # type: ignore[override]  # bytes where the worker that made the response wrote it too
        self, request: pb.ExplainRequest, context: Context
    ) -> pb.ExplainResponse | bytes:
        """Raw attributions with all figures."""
        checked, admissible = await self._asked(request, context)
        lookup = await self._cache.lookup(checked)
        if lookup.response is not None:
            self._hold(reply_size.memory_of_messages(0, lookup.byte_count), context)
            return lookup.response
        if admissible is None:
            admissible = await asyncio.to_thread(self._admissible, checked, request, streamed=False)
        self._hold(admissible.message_memory, context)
        return await self._computed(checked, admissible, lookup, pb.ExplainResponse.SerializeToString)

    async def ExplainStream(  # type: ignore[override]  # a coroutine that writes to the context is a stream too
        self, request: pb.ExplainStreamRequest, context: Context
    ) -> None:
        """What becomes of each path while it is computed, then what Explain gives, with tensors in chunks."""
        chunks = streaming.Chunks(request.chunk_bytes, self._settings.max_message_bytes)
        checked = await self._checked(request.explain, context)
        async with _until(checked.query.request.expires_at):
            # kept nowhere, so that the response's memory is free while the chunks are sent
            events = await asyncio.to_thread(chunks.final, await self._told(checked, request, chunks, context))
            await streaming.write(context, events)

    async def Predict(self, request: pb.PredictRequest, context: Context) -> pb.PredictResponse:
        """Outputs of the model with their highest classes."""
        model = self._model(request.model)
        score, count = request_targets.predicted_score(request.score), request_targets.top_k(request.top_k)
        arrays = await asyncio.to_thread(request_inputs.inputs, request.inputs, model.signature, self._settings)
        instances = request_inputs.instances(arrays, model.signature, moving=())
        specs = [model.signature.output(name) for name in dict.fromkeys(request.outputs)] or list(
            model.signature.outputs
        )
        functions = [Differentiation(spec.name, spec.score_head(score)) for spec in specs]
        stated = [_stated_shape(spec) for spec in specs]
        replied = self._admit_predictions(specs, stated, len(instances), count, request.include_tensors)
        self._hold(reply_size.memory_of_messages(request.ByteSize(), replied), context)
        rows = Request(expires_at=self._deadline(context))
        outputs = await self._explainer.outputs(model, instances, functions, rows)
        found = [outputs.scores[function][0].shape for function in functions]  # free axes have an extent only now
        self._admit_predictions(specs, found, len(instances), count, request.include_tensors)
        scores, include = [outputs.scores[function] for function in functions], request.include_tensors
        return await asyncio.to_thread(
            responses.predict_response, outputs.model, specs, scores, outputs.usage, count, include_tensors=include
        )

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """Every model version, those that failed included."""
        return pb.ListModelsResponse(models=[model_messages.model_summary(entry) for entry in self._repository.entries])

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """All that the server knows of one model."""
        model = self._model(request.model)
        entry = self._repository.entry(model)
        # the first look at a model searches its graph for what its methods lack
        return pb.GetModelResponse(model=await asyncio.to_thread(model_messages.model_message, entry, model))

    async def EstimateCost(self, request: pb.EstimateCostRequest, context: Context) -> pb.EstimateCostResponse:
        """What an Explain request would cost."""
        checked = await self._checked(request.explain, context)
        cost = await asyncio.to_thread(self._explainer.cost, checked.query)
        return await asyncio.to_thread(
            responses.cost_response,
            checked,
            cost,
            message_bytes=request.explain.ByteSize(),
            row_limit=self._settings.row_limit,
            held_bytes_limit=self._settings.byte_limit,
            host_bytes_limit=self._memory.limit,
            reply_bytes_limit=self._settings.max_message_bytes,
            replicas=self._repository.replicas(checked.query.model),
        )

    async def Compare(  # type: ignore[override]  # a coroutine that writes to the context is a stream too
        self, request: pb.CompareRequest, context: Context
    ) -> NoReturn:
        """Not built yet."""
        raise _unimplemented("Compare", "comparisons of several explanations; use Explain with groups")

    async def Evaluate(self, request: pb.EvaluateRequest, context: Context) -> NoReturn:  # type: ignore[override]
        """Not built yet."""
        raise _unimplemented("Evaluate", "checks whether an explanation can be trusted")

    async def _told(
        self, checked: requests.Explain, request: pb.ExplainStreamRequest, chunks: streaming.Chunks, context: Context
    ) -> pb.ExplainResponse:
        """The response of Explain; meanwhile the client is told what becomes of each path."""
        lookup = await self._cache.lookup(checked)
        if lookup.response is not None:
            self._hold(reply_size.memory_of_messages(0, lookup.byte_count), context)
            return lookup.response
        admissible = await asyncio.to_thread(self._admissible, checked, request.explain, streamed=True)
        self._hold(admissible.message_memory, context)

        messages = functools.partial(
            responses.round_messages, checked, admissible.prepared, include_map=request.include_partial_maps
        )

        async def events(latest: Round) -> Iterator[bytes]:
            return chunks.round(*await asyncio.to_thread(messages, latest))

        return await streaming.watched(
            functools.partial(self._computed, checked, admissible, lookup, _as_it_is),
            events,
            functools.partial(streaming.write, context),
        )

    def _admissible(self, checked: requests.Explain, message: pb.ExplainRequest, *, streamed: bool) -> _Admissible:
        """What is to be evaluated, where neither it nor its reply is too large; all of it in one turn of a worker."""
        prepared = self._explainer.prepare(checked.query)
        reply = reply_size.reply_size(checked, prepared.cost, self._settings.row_limit)
        self._admit_reply(reply.head_bytes if streamed else reply.total_bytes)
        memory = reply_size.memory_of_messages(message.ByteSize(), reply.total_bytes)
        self._admit_memory(prepared.cost.host_bytes + memory)
        return _Admissible(prepared, reply, memory)

    def _hold(self, byte_count: int, context: Context) -> None:
        """Counts the memory of messages until the RPC is over: the reply was sent, or nobody takes it any more.

        Raises:
            QueueFull: others hold too much (QUEUE_FULL).
        """
        held = ExitStack()
        held.enter_context(self._memory.reserved(byte_count))
        context.add_done_callback(lambda _: held.close())  # type: ignore[arg-type]  # the stubs know no such callable

    async def _computed(
        self,
        checked: requests.Explain,
        admissible: _Admissible,
        lookup: Lookup,
        write: Callable[[pb.ExplainResponse], Reply],
        observe: Observer = unobserved,
    ) -> Reply:
        """What is written of the response of Explain, which is kept where the cache has none."""
        answer = await self._explainer.explain(admissible.prepared, observe)
        response, reply = await asyncio.to_thread(self._written, checked, answer, write)
        self._observe(response, [name_of(method) for method in checked.query.methods])
        await self._cache.keep(lookup, answer, response, admissible.reply.tensor_bytes)
        return reply

    def _written(
        self, checked: requests.Explain, answer: Answer, write: Callable[[pb.ExplainResponse], Reply]
    ) -> tuple[pb.ExplainResponse, Reply]:
        """The response, and what is written of it, in one turn of a worker."""
        started = time.monotonic()
        response = responses.explain_response(checked, answer)
        seconds = time.monotonic() - started
        provenance.set_serialize_duration(response.provenance, seconds)
        self._metrics.serialize_seconds.labels(checked.query.model.name).observe(seconds)
        return response, write(response)

    async def _asked(self, request: pb.ExplainRequest, context: Context) -> tuple[requests.Explain, _Admissible | None]:
        """The checked request and, in the same turn of a worker where no answer to it can have been kept, what is to be
        evaluated."""
        if self._cache.enabled:
            return await self._checked(request, context), None
        check = self._check(request, context)

        def both() -> tuple[requests.Explain, _Admissible]:
            checked = check()
            return checked, self._admissible(checked, request, streamed=False)

        return await asyncio.to_thread(both)

    async def _checked(self, request: pb.ExplainRequest, context: Context) -> requests.Explain:
        return await asyncio.to_thread(self._check(request, context))

    def _check(self, request: pb.ExplainRequest, context: Context) -> Callable[[], requests.Explain]:
        """What checks a request that came now."""
        arrived, model, deadline = time.monotonic(), self._model(request.model), self._deadline(context)
        return functools.partial(requests.explain, request, model, self._settings, arrived, deadline)

    def _model(self, reference: model_pb2.ModelRef) -> ServedModel:
        return self._repository.get(*model_name(reference))

    def _deadline(self, context: Context) -> float:
        remaining = context.time_remaining()
        limit = self._settings.default_timeout_seconds
        return time.monotonic() + (limit if remaining is None else remaining)

    def _admit_predictions(
        self,
        specs: Sequence[OutputSpec],
        shapes: Sequence[tuple[int, ...] | None],
        instance_count: int,
        class_count: int,
        include_tensors: bool,
    ) -> int:
        """The size of the reply. Shapes are those of one instance, None where a free axis leaves them open."""
        of_one = sum(
            reply_size.prediction_bytes(spec, shape, class_count, include_tensor=include_tensors)
            for spec, shape in zip(specs, shapes, strict=True)
            if shape is not None
        )
        self._admit_reply(instance_count * of_one)
        return instance_count * of_one

    def _admit_reply(self, size: int) -> None:
        limit = self._settings.max_message_bytes
        if size > limit:
            raise LimitExceeded(
                "REPLY_TOO_LARGE",
                f"the reply would have about {size} bytes, the limit is {limit}; ask for fewer maps, leave "
                "tensors out, or use ExplainStream, which sends maps in pieces",
                reply_bytes=size,
                limit=limit,
            )

    def _admit_memory(self, size: int) -> None:
        limit = self._memory.limit
        if size > limit:
            raise LimitExceeded(
                "REQUEST_BYTES_EXCEEDED",
                f"the request needs up to {size} bytes of memory, with the gradients that its paths keep and its "
                f"messages; the server has {limit} for all; ask for fewer instances, targets or baselines, or a lower "
                "max_step_count",
                bytes=size,
                limit=limit,
            )

    def _observe(self, response: pb.ExplainResponse, methods: Sequence[str]) -> None:
        model = response.provenance.model_name
        for attribution in response.attributions:
            method = methods[attribution.method_index]
            reason = attribution.stop_reason
            self._metrics.attributions.labels(model, method, _stop_reason(reason)).inc()
            self._metrics.step_count.labels(model, method).observe(attribution.step_count)
            if attribution.HasField("relative_convergence_delta"):
                delta = attribution.relative_convergence_delta
                self._metrics.convergence_delta.labels(model, method).observe(delta)
            if attribution.HasField("map_error"):
                self._metrics.map_error.labels(model, method).observe(attribution.map_error)


def _as_it_is(response: pb.ExplainResponse) -> pb.ExplainResponse:
    """Of a stream, which writes it in pieces."""
    return response


def _stated_shape(spec: OutputSpec) -> tuple[int, ...] | None:
    """Of one instance; None where an axis is free."""
    sizes = [axis.size for axis in spec.axes[1:]]
    known = tuple(size for size in sizes if size is not None)
    return known if len(known) == len(sizes) else None


@asynccontextmanager
async def _until(deadline: float) -> AsyncIterator[None]:
    """Ends the block at a time of `time.monotonic`: a stream whose reader stands still would stay for ever."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise DeadlineExceeded("DEADLINE_EXCEEDED", "time ran out before the whole answer was sent") from None


def _stop_reason(code: attribution_pb2.StopReason.ValueType) -> str:
    return attribution_pb2.StopReason.Name(code).removeprefix("STOP_REASON_").lower()


def _unimplemented(method: str, what: str) -> Unimplemented:
    return Unimplemented("RPC_UNIMPLEMENTED", f"{method} is not built yet: {what}", rpc=method)
