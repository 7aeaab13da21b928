"""A server in a thread of its own and what a client needs to talk to it over a real connection."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import numpy as np
import structlog
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from explainserve.rpc.server import Server
from explainserve.rpc.tensors import encode
from explainserve.settings import Settings
from explainserve.v1 import attribution_pb2, tensor_pb2
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceStub

T = TypeVar("T")
Array = NDArray[Any]

PATIENCE = 60.0
"""Seconds after which something that should happen has not."""


class Loopback:
    """A server on loopback and a channel to it.

    Attributes:
        lines: what it logged.
        loading: done when its models are loaded.

    Args:
        loaded: wait for its models.
    """

    def __init__(self, settings: Settings, *, loaded: bool = True) -> None:
        collect_what_others_left()
        self.lines: list[dict[str, Any]] = []
        self.server = Server(settings, capturing_log(self.lines))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server", daemon=True)
        self._thread.start()
        try:
            self.submit(self.server.listen()).result(PATIENCE)
            self.loading = self.submit(self.server.load())
            if loaded:
                self.loading.result(PATIENCE)
        except BaseException:
            self._end_loop()
            raise
        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        self.channel = grpc.insecure_channel(self.address, options=options)
        self.stub = ExplainerServiceStub(self.channel)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs something on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self, grace_seconds: float = 0.0) -> None:
        self.channel.close()
        self.submit(self.server.stop(grace_seconds)).result(PATIENCE)
        self._end_loop()

    def http(self, path: str) -> tuple[int, str]:
        """Status and body of a GET."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.server.http_port}{path}", timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, sample: str, **labels: str) -> float:
        """A sample of /metrics, summed over the labels that are not named; 0 where there is none yet."""
        families = text_string_to_metric_families(self.http("/metrics")[1])
        found = [s for family in families for s in family.samples if s.name == sample]
        return sum(s.value for s in found if labels.items() <= s.labels.items())

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def collect_what_others_left() -> None:
    """A server collects garbage when it starts, and what that warns of would be laid to the test that starts it, such
    as event loops that pytest-asyncio leaves open."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.unfreeze()
        gc.collect()


def capturing_log(lines: list[dict[str, Any]]) -> Any:
    """A logger that appends each line to a list."""

    def keep(logger: Any, level: str, line: Any) -> str:
        lines.append({**line, "level": level})
        raise structlog.DropEvent

    return structlog.wrap_logger(
        None, processors=[structlog.contextvars.merge_contextvars, keep], wrapper_class=structlog.stdlib.BoundLogger
    )


@dataclass(frozen=True)
class Refusal:
    """How an RPC failed."""

    code: grpc.StatusCode
    reason: str
    metadata: dict[str, str]
    message: str
    trailing: dict[str, Any]
    retry_after_seconds: float | None = None


def refusal(call: Callable[[], object]) -> Refusal:
    """The error that a call must fail with."""
    try:
        answer = call()
    except grpc.RpcError as error:
        return of_error(error)
    raise AssertionError(f"expected an error, got {str(answer)[:500]}")


def of_error(error: Any) -> Refusal:
    """Code, message and ErrorInfo; the reason is "" where the server did not say."""
    trailing = {item.key: item.value for item in error.trailing_metadata() or ()}
    rich = rpc_status.from_call(error)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    later = None
    if rich is not None:
        first, *rest = rich.details
        assert first.Unpack(info)
        assert info.domain == "explainserve"
        if rest:
            assert len(rest) == 1 and rest[0].Unpack(retry)
            later = retry.retry_delay.ToNanoseconds() / 1e9
    return Refusal(error.code(), info.reason, dict(info.metadata), error.details(), trailing, later)


def until(holds: Callable[[], bool]) -> None:
    """Waits for something that must happen, without asking how soon."""
    ends = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.02)


def named(name: str, version: int | None = None) -> dict[str, Any]:
    """A ModelRef."""
    return {"named": {"name": name} if version is None else {"name": name, "version": version}}


def request(model: str, inputs: Mapping[str, Array | tensor_pb2.Tensor], **fields: Any) -> pb.ExplainRequest:
    """An Explain request; arrays are encoded."""
    tensors = {name: v if isinstance(v, tensor_pb2.Tensor) else encode(v) for name, v in inputs.items()}
    return pb.ExplainRequest(model=named(model), inputs=tensors, **fields)


def element(*indices: int, **fields: Any) -> dict[str, Any]:
    """A target: one element by position."""
    return {"element": {"index": {"indices": indices}}, **fields}


def label(text: str, **fields: Any) -> dict[str, Any]:
    """A target: one element by label."""
    return {"element": {"label": text}, **fields}


def every(**kind: Any) -> dict[str, Any]:
    """A baseline of every input."""
    return {"every_input": kind}


def steps(count: int, **fields: Any) -> list[dict[str, Any]]:
    """Methods: a fixed rule of Integrated Gradients."""
    return [{"integrated_gradients": {"step_count": count, **fields}}]


def adaptive(**fields: Any) -> list[dict[str, Any]]:
    """Methods: adaptive Integrated Gradients."""
    return [{"integrated_gradients": fields}]


def array(tensor: tensor_pb2.Tensor) -> Array:
    """A float32 tensor as numpy, decoded without the server's code."""
    assert tensor.data_type == tensor_pb2.DATA_TYPE_FLOAT32
    return np.frombuffer(tensor.data, "<f4").reshape(tuple(tensor.shape))


def maps(response: pb.ExplainResponse, name: str | None = None) -> list[Array]:
    """Maps of one input, in the order of the response; by default of the only input."""
    return [array(_input(attribution, name).tensor) for attribution in response.attributions]


def _input(attribution: attribution_pb2.Attribution, name: str | None) -> attribution_pb2.InputAttribution:
    if name is None:
        (only,) = attribution.inputs
        return only
    (found,) = (each for each in attribution.inputs if each.name == name)
    return found


def relative_distance(a: Array, b: Array) -> float:
    """Relative L2 distance."""
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


def normal(*shape: int, seed: int = 0) -> Array:
    """A standard normal float32 array."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)
