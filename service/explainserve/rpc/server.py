"""Puts a server together: repository, engine, servicer, health, reflection, metrics; starts and stops it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from explainserve import placement, process
from explainserve.backends import LoadOptions
from explainserve.backends.trial import TrialLimits
from explainserve.backends.tried import Tried
from explainserve.devices import Devices
from explainserve.engine import Engine
from explainserve.errors import ExplainServeError
from explainserve.explainer import Explainer
from explainserve.memory import Memory
from explainserve.metrics import Metrics
from explainserve.repository import ModelEntry, ModelState, Repository
from explainserve.rpc.http import HttpServer
from explainserve.rpc.interceptor import ObservingInterceptor
from explainserve.rpc.repository_servicer import RepositoryServicer
from explainserve.rpc.servicer import Servicer
from explainserve.scheduling import Scheduler
from explainserve.served_model import ServedModel
from explainserve.settings import Settings
from explainserve.v1 import explainer_service_pb2, model_repository_service_pb2
from explainserve.v1.explainer_service_pb2_grpc import add_ExplainerServiceServicer_to_server
from explainserve.v1.model_repository_service_pb2_grpc import add_ModelRepositoryServiceServicer_to_server
from explainserve.watchdog import Watchdog

SERVICE = explainer_service_pb2.DESCRIPTOR.services_by_name["ExplainerService"].full_name
_REPOSITORY_SERVICE = model_repository_service_pb2.DESCRIPTOR.services_by_name["ModelRepositoryService"].full_name

_RECEIVED_PER_MESSAGE_BYTE = 2
"""Requests up to this many times the limit are read, to be refused with a reason; larger ones gRPC cuts off."""


class Server:
    """One server process: `listen`, `load`, then `stop`.

    Attributes:
        port, http_port: where it listens, known after `listen`.
    """

    def __init__(self, settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
        self._settings = settings
        self._log = log
        self._metrics = Metrics(CollectorRegistry())
        self._loading = ThreadPoolExecutor(1, "models", initializer=process.give_way)
        """One load at a time: each may take the memory of two models."""
        self._loaded = False
        self._stopping = False
        self._any_hung = False
        self._stuck = False
        self.http_port = 0
        self.port = 0

    async def listen(self) -> None:
        """Answers from now on: that it is not ready, that models still load, and with those that are loaded already.

        Raises:
            OSError: the HTTP port is taken.
            RuntimeError: the gRPC port is taken.
            NotFound: the model folder is not there (NO_MODELS_FOLDER).
        """
        settings = self._settings
        process.prepare(asyncio.get_running_loop())
        self._loop = asyncio.get_running_loop()
        self._http = HttpServer(
            settings.host,
            settings.http_port,
            self._metrics.registry,
            alive=lambda: not self._stuck,
            ready=lambda: self._loaded and not (self._stopping or self._stuck),
        )
        self._http.start()
        self.http_port = self._http.port
        try:
            await self._listen()
        except BaseException:
            await asyncio.to_thread(self._http.stop)
            raise

    async def load(self) -> None:
        """Loads the models; then the server is ready."""
        await self._loop.run_in_executor(self._loading, self._load)
        self._loaded = True
        await self._tell_health()

    async def _listen(self) -> None:
        settings = self._settings
        names = placement.devices(settings.device)
        options = LoadOptions(
            allow_fallback=settings.allow_device_fallback,
            thread_count=placement.thread_count(settings.thread_count, names),
            cache=settings.cache,
            share_weights=settings.share_weights,
            compile_seconds=settings.compile_seconds,
        )
        limits = TrialLimits(settings.trial_seconds, settings.trial_memory_bytes) if settings.trial_seconds else None
        tried = Tried(settings.cache and settings.cache / "tried")
        self._repository = Repository(
            settings.models,
            options,
            settings.max_batch_rows,
            limits,
            tried,
            settings.warm_up_seconds,
            self._report,
            names,
        )
        self._devices = Devices({name: self._engine(name) for name in names}, self._repository.replicas)
        memory = Memory(settings.max_waiting_bytes, self._metrics)
        explainer = Explainer(self._devices, settings.row_limit, settings.byte_limit, memory)
        self._health = health.aio.HealthServicer()
        self._control = RepositoryServicer(self._repository, self._loading, enabled=settings.allow_model_control)
        self._server = self._grpc_server(Servicer(self._repository, explainer, memory, self._metrics, settings))
        self.port = self._server.add_insecure_port(_address(settings.host, settings.port))
        self._found = await asyncio.to_thread(self._repository.find_all)
        await self._tell_health()
        self._devices.start()
        await self._server.start()

    async def stop(self, grace_seconds: float | None = None) -> None:
        """Refuses new requests at once, gives running ones the grace period, then ends them."""
        self._stopping = True
        self._loading.shutdown(wait=False, cancel_futures=True)  # a load that is under way cannot be interrupted
        await self._health.enter_graceful_shutdown()
        await self._server.stop(self._settings.grace_seconds if grace_seconds is None else grace_seconds)
        await _in_own_thread(self._devices.stop)
        await _in_own_thread(self._http.stop)

    async def serve_until(self, stopped: Callable[[], Awaitable[object]]) -> None:
        """Runs until `stopped` returns, then stops in order."""
        try:
            await stopped()
        finally:
            await self.stop()

    def _engine(self, device: str) -> Engine:
        """Each device has a queue and a watchdog of its own."""
        return Engine(
            Scheduler(self._settings.max_waiting_rows),
            self._metrics,
            Watchdog(self._settings.watchdog_seconds),
            self._fail,
            device,
        )

    def _load(self) -> None:
        self._repository.load_found(self._found)
        process.settle()

    def _report(self, entry: ModelEntry) -> None:
        """Logs and counts a new state of a model version."""
        states = Counter(each.state for each in self._repository.entries)
        for state in ModelState:
            self._metrics.models.labels(state.value).set(states[state])
        self._stuck = self._any_hung and not states[ModelState.READY]
        if self._loaded:
            asyncio.run_coroutine_threadsafe(self._tell_health(), self._loop)
        line = self._log.error if entry.reason else self._log.info
        line(
            "model",
            name=entry.name,
            version=entry.version,
            state=entry.state.name,
            reason=entry.reason,
            devices=[replica.runs_on for replica in entry.replicas],
        )

    def _fail(self, model: ServedModel, error: ExplainServeError) -> None:
        """A model hung. The engine must not wait for the log, so the event loop goes on from here."""
        self._any_hung = True
        self._loop.call_soon_threadsafe(self._repository.fail, model, error)

    async def _tell_health(self) -> None:
        """The server is healthy once its models are loaded, and until the last one that was ready hangs: then only a
        restart helps, or a load."""
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        state = serving if self._loaded and not self._stuck else not_serving
        for service in ("", SERVICE):
            await self._health.set(service, state)

    def _grpc_server(self, servicer: Servicer) -> grpc.aio.Server:
        limit = self._settings.max_message_bytes
        server = grpc.aio.server(
            interceptors=[ObservingInterceptor(self._metrics, self._log, limit)],
            options=[
                ("grpc.so_reuseport", 0),  # else two servers bind one port without an error
                ("grpc.max_receive_message_length", _RECEIVED_PER_MESSAGE_BYTE * limit),
                ("grpc.max_send_message_length", limit),
            ],
        )
        add_ExplainerServiceServicer_to_server(servicer, server)
        add_ModelRepositoryServiceServicer_to_server(self._control, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, _REPOSITORY_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server


async def _in_own_thread(work: Callable[[], None]) -> None:
    """Not in those of requests, which may all be at work for requests that were ended."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        await asyncio.get_running_loop().run_in_executor(thread, work)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
