"""Clients that behave as badly as clients do, and check every answer that they get."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any

import grpc
import numpy as np

import equality
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1 import model_repository_service_pb2 as repository_pb
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceStub
from explainserve.v1.model_repository_service_pb2_grpc import ModelRepositoryServiceStub
from explainserve.v1.tensor_pb2 import Tensor
from rpc.bad_requests import CASES
from rpc.loopback import element, normal, of_error, request
from second_look import Doubt, doubts
from slow_reader import reading_slowly
from soak_requests import Drawn

PATIENCE = 240.0
"""Seconds after which an answer counts as lost."""

RELOADED = "reloaded"
"""Name of the model that is loaded and unloaded all the time."""

AWAY = {"MODEL_UNLOADED", "MODEL_LOADING"}
"""What requests to it may get meanwhile."""

ACTIONS = {
    "answer": 45,
    "cancel": 12,
    "burst": 2,
    "deadline": 10,
    "time_budget": 8,
    "bad": 12,
    "raising": 2,
    "slow_reader": 2,
    "vanish": 2,
}
"""Shares of what a client does."""

STREAM_ACTIONS = {"stream": 10, "satisfied": 4, "slow_stream": 2}

RELOADED_ACTIONS = {"reloaded": 6}
"""Beside these where the server streams, and where it reloads models."""

HOSTILE_ACTIONS = {
    "answer": 20,
    "cancel": 20,
    "burst": 20,
    "slow_reader": 12,
    "slow_stream": 12,
    "vanish": 6,
    "stream": 10,
}
"""Shares of clients that mean ill: most give up or hardly read what they asked for."""

BURST = 50
"""Calls of a burst that are all given up."""

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@dataclass(frozen=True, eq=False)
class Outcome:
    """How an RPC ended.

    Attributes:
        response: None where it failed.
        reason: of the ErrorInfo; "" where the server was not heard.
        retry_seconds: of the RetryInfo; None where there is none.
    """

    code: grpc.StatusCode
    reason: str = ""
    response: Any = None
    retry_seconds: float | None = None

    def __str__(self) -> str:
        return f"{self.code.name} {self.reason}".strip()


@dataclass(frozen=True, eq=False)
class Expected:
    """A request and what became of it when it was the only one."""

    drawn: Drawn
    alone: Outcome

    def doubts(self, action: str, found: Outcome) -> list[Doubt]:
        """Maps of an outcome under load that need a second look."""
        alone = self.alone.response
        if self.drawn.rpc != "Explain" or found.response is None or alone is None:
            return []
        if len(found.response.attributions) != len(alone.attributions):
            return []
        return doubts(f"{action}, {self.drawn}", self.drawn.request, found.response, alone)

    def differences(self, found: Outcome) -> Iterator[str]:
        """What is wrong with an outcome under load."""
        if (found.code, found.reason) != (self.alone.code, self.alone.reason):
            yield f"{found}, alone {self.alone}"
        elif found.response is not None:
            yield from _COMPARISONS[self.drawn.rpc](found.response, self.alone.response)


def _predictions(found: pb.PredictResponse, alone: pb.PredictResponse) -> Iterator[str]:
    scores = [np.array([c.score for p in r.predictions for c in p.classes]) for r in (found, alone)]
    if scores[0].shape != scores[1].shape or not np.allclose(*scores, rtol=1e-4, atol=1e-5, equal_nan=True):
        yield "predictions differ"


def _messages(found: Any, alone: Any) -> Iterator[str]:
    for field_ in found.DESCRIPTOR.fields:
        if getattr(found, field_.name) != getattr(alone, field_.name):
            yield f"{field_.name} is {getattr(found, field_.name)}, alone {getattr(alone, field_.name)}"


def _models(found: pb.GetModelResponse, alone: pb.GetModelResponse) -> Iterator[str]:
    """But for what is measured, anew at each load, and memory, which grows when a request opens a session."""
    for model in (found.model, alone.model):
        for message, name in product((model, *model.replicas), ("memory", "max_batch_rows", "row_duration")):
            message.ClearField(name)
        for replica in model.replicas:
            replica.ClearField("micro_batch_bytes")
    yield from _messages(found, alone)


_COMPARISONS: dict[str, Callable[[Any, Any], Iterator[str]]] = {
    "Explain": equality.differences,
    "Predict": _predictions,
    "EstimateCost": _messages,
    "GetModel": _models,
}


@dataclass(eq=False)
class Tally:
    """What all clients saw.

    Attributes:
        outcomes: by action and outcome.
        failures: what must not happen, in words that name the request.
        doubts: maps that need a second look.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    compared: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, action: str, outcome: Outcome, what: str, wrong: Sequence[str], compared: bool = False) -> None:
        """Counts one call."""
        with self._lock:
            self.outcomes[action, str(outcome)] += 1
            self.compared += compared
            self.failures += [f"{action}, {what}: {line}" for line in wrong]

    @property
    def call_count(self) -> int:
        """Calls that ended, in whatever way."""
        return sum(self.outcomes.values())


def outcome_of(call: Any) -> Outcome:
    """Waits for the end of a call, or makes it."""
    try:
        return Outcome(grpc.StatusCode.OK, response=call())
    except grpc.FutureCancelledError:
        return Outcome(grpc.StatusCode.CANCELLED)
    except grpc.RpcError as error:
        told = of_error(error)
        return Outcome(told.code, told.reason, retry_seconds=told.retry_after_seconds)


@dataclass(eq=False)
class SoakClient:
    """One client: an action after another until it is told to stop.

    Args:
        address: of the server.
        seed: the actions are drawn from it.
        expected: requests with what they get alone.
        offered: the younger RPCs that the server has.
        hostile: do what a client that means ill does.
        stopping: set when the client shall end.
        excused: codes that any call may end with, where the server is about to stop.
    """

    address: str
    seed: Sequence[int]
    expected: Sequence[Expected]
    tally: Tally
    offered: frozenset[str]
    stopping: threading.Event
    excused: frozenset[grpc.StatusCode] = frozenset()
    hostile: bool = False

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        reloaded = [each for each in self.expected if each.drawn.model == RELOADED]
        self._steady = [each for each in self.expected if each.drawn.model != RELOADED]
        self._reloading = [each for each in reloaded if each.alone.response is not None]
        answered = [each for each in self._steady if each.drawn.rpc == "Explain" and each.alone.response is not None]
        self._explained = answered
        self._adaptive = [each for each in answered if not _is_fixed(each.drawn.request)]
        self._large = sorted(answered, key=lambda each: -each.alone.response.ByteSize())[: len(answered) // 8]
        actions = dict(HOSTILE_ACTIONS if self.hostile else ACTIONS)
        if "ExplainStream" in self.offered and not self.hostile:
            actions |= STREAM_ACTIONS
        if "LoadModel" in self.offered and not self.hostile:
            actions |= RELOADED_ACTIONS
        self._actions = list(actions)
        self._shares = np.array(list(actions.values())) / sum(actions.values())

    def run(self) -> None:
        """Acts until `stopping` is set."""
        with grpc.insecure_channel(self.address, options=OPTIONS) as channel:
            self._stub = ExplainerServiceStub(channel)
            while not self.stopping.is_set():
                action = str(self._random.choice(self._actions, p=self._shares))
                try:
                    getattr(self, f"_{action}")()
                except Exception as error:  # such as an answer that cannot be read; the client goes on
                    self.tally.failures.append(f"{action}: {type(error).__name__}: {error}")

    def _answer(self) -> None:
        """A request that is waited for."""
        expected = self._any(self._steady)
        self._check("answer", expected, self._ask(expected))

    def _reloaded(self) -> None:
        """A request to a model that may be away."""
        expected = self._any(self._reloading)
        found = self._ask(expected)
        if found.reason in AWAY:
            self.tally.add("reloaded", found, str(expected.drawn), [])
        else:
            self._check("reloaded", expected, found)

    def _ask(self, expected: Expected) -> Outcome:
        drawn = expected.drawn
        return outcome_of(lambda: getattr(self._stub, drawn.rpc)(drawn.request, timeout=PATIENCE))

    def _cancel(self) -> None:
        """A request that is given up at a random moment."""
        expected = self._any(self._explained)
        call = self._stub.Explain.future(expected.drawn.request, timeout=PATIENCE)
        time.sleep(self._random.exponential(0.05))
        call.cancel()
        self._check("cancel", expected, outcome_of(call.result), {grpc.StatusCode.CANCELLED})

    def _burst(self) -> None:
        """Many requests at once, all given up."""
        calls = [
            self._stub.Explain.future(self._any(self._explained).drawn.request, timeout=PATIENCE) for _ in range(BURST)
        ]
        time.sleep(self._random.exponential(0.02))
        for call in calls:
            call.cancel()
        for call in calls:
            self._count("burst of cancels", outcome_of(call.result), "", [])

    def _deadline(self) -> None:
        """A request that has little time."""
        expected, seconds = self._any(self._explained), self._random.exponential(0.1)
        found = outcome_of(lambda: self._stub.Explain(expected.drawn.request, timeout=seconds))
        self._check("deadline", expected, found, {grpc.StatusCode.DEADLINE_EXCEEDED})

    def _time_budget(self) -> None:
        """The best map within some time."""
        expected = self._any(self._adaptive)
        request = pb.ExplainRequest()
        request.CopyFrom(expected.drawn.request)
        request.time_budget.FromMicroseconds(1 + int(self._random.exponential(0.5) * 1e6))
        found = outcome_of(lambda: self._stub.Explain(request, timeout=PATIENCE))
        late = {grpc.StatusCode.DEADLINE_EXCEEDED} if found.reason == "TIME_BUDGET_TOO_SHORT" else set()
        self._check("time budget", expected, found, late)

    def _bad(self) -> None:
        """A request that must be refused, with the reason that is documented for it."""
        name = self._any(list(CASES))
        case = CASES[name]
        found = outcome_of(lambda: self._stub.Explain(case.request, timeout=PATIENCE))
        right = (found.code, found.reason) == (case.code, case.reason)
        self._count("bad request", found, name, [] if right else [f"{found}, expected {case.code.name} {case.reason}"])

    def _raising(self) -> None:
        """Passes every check and fails in the model."""
        found = outcome_of(lambda: self._stub.Explain(RAISING, timeout=PATIENCE))
        self._count("model that raises", found, "", [] if found.reason == "MODEL_RAISED" else [str(found)])

    def _slow_reader(self) -> None:
        """A large answer, read slowly."""
        expected = self._any(self._large)
        with self._slow_stub(float(self._random.uniform(2e5, 2e6))) as (stub, _):
            found = outcome_of(lambda: stub.Explain(expected.drawn.request, timeout=PATIENCE))
        self._check("slow reader", expected, found)

    def _vanish(self) -> None:
        """A connection that breaks."""
        expected = self._any(self._large)
        with self._slow_stub(1e5) as (stub, reader):
            call = stub.Explain.future(expected.drawn.request, timeout=PATIENCE)
            time.sleep(self._random.exponential(0.2))
            reader.vanish()
            self._check("vanish", expected, outcome_of(call.result), {grpc.StatusCode.UNAVAILABLE})

    def _stream(self) -> None:
        """All events of a stream; it ends with what Explain gives."""
        expected = self._any(self._explained)
        found = outcome_of(lambda: _final(self._stub.ExplainStream(self._streamed(expected), timeout=PATIENCE)))
        self._check("stream", expected, found)

    def _slow_stream(self) -> None:
        """A stream of a large answer with all of its partial maps, read slowly, or given up half read."""
        expected = self._any(self._large)
        request = pb.ExplainStreamRequest(explain=expected.drawn.request, include_partial_maps=True)
        with self._slow_stub(float(self._random.uniform(2e5, 2e6))) as (stub, _):
            call = stub.ExplainStream(request, timeout=PATIENCE)
            if self._random.random() < 0.5:
                found = outcome_of(lambda: _final(call))
                self._check("slow stream", expected, found)
            else:
                time.sleep(self._random.exponential(1.0))
                call.cancel()
                self._count("slow stream that is stopped", outcome_of(lambda: list(call)), str(expected.drawn), [])

    def _satisfied(self) -> None:
        """A client that stops a stream after a few events."""
        expected = self._any(self._adaptive)
        events = self._stub.ExplainStream(self._streamed(expected), timeout=PATIENCE)
        found = outcome_of(lambda: list(islice(events, int(self._random.integers(1, 4)))))
        events.cancel()
        self.tally.add("stream that is stopped", Outcome(found.code, found.reason), str(expected.drawn), [])

    def _streamed(self, expected: Expected) -> pb.ExplainStreamRequest:
        return pb.ExplainStreamRequest(
            explain=expected.drawn.request,
            include_partial_maps=bool(self._random.random() < 0.5),
            chunk_bytes=int(self._random.choice([0, 1024, 65536])),
        )

    @contextmanager
    def _slow_stub(self, bytes_per_second: float) -> Iterator[tuple[ExplainerServiceStub, Any]]:
        options = [*OPTIONS, ("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        with (
            reading_slowly(self.address, bytes_per_second) as reader,
            grpc.insecure_channel(reader.address, options=options) as channel,
        ):
            yield ExplainerServiceStub(channel), reader

    def _check(
        self, action: str, expected: Expected, found: Outcome, allowed: Collection[grpc.StatusCode] = ()
    ) -> None:
        """Compares an outcome; `allowed` are codes that this action may end with as well."""
        compared = found.code not in allowed
        wrong = list(expected.differences(found)) if compared else []
        self._count(action, found, str(expected.drawn), wrong, compared and found.response is not None)
        if compared:
            self.tally.doubts += expected.doubts(action, found)

    def _count(self, action: str, found: Outcome, what: str, wrong: Sequence[str], compared: bool = False) -> None:
        if found.code in self.excused:
            wrong = []
        elif found.reason == "QUEUE_FULL":
            wrong = ["no RetryInfo"] if found.retry_seconds is None else []
        self.tally.add(action, found, what, wrong, compared)

    def _any(self, choices: Sequence[Any]) -> Any:
        return choices[int(self._random.integers(len(choices)))]


RAISING = request(
    "multi_input",
    {"image": normal(1, 3, 4, 4), "ids": np.full((1, 5), 10**6, np.int64)},
    targets=[element(0)],
)
"""An index beyond the embedding."""


def _is_fixed(explain: pb.ExplainRequest) -> bool:
    return any(method.integrated_gradients.HasField("step_count") for method in explain.methods)


def _final(events: Iterator[pb.ExplainStreamResponse]) -> pb.ExplainResponse:
    """What Explain gives, its tensors put together from the chunks."""
    final, pieces = pb.ExplainResponse(), defaultdict[int, bytearray](bytearray)
    for event in events:
        if event.HasField("final"):
            final.CopyFrom(event.final)
        elif event.HasField("chunk"):
            assert event.chunk.offset == len(pieces[event.chunk.chunk_key])
            pieces[event.chunk.chunk_key] += event.chunk.data
    for tensor in _tensors(final):
        if tensor.HasField("chunk_key"):
            tensor.data = bytes(pieces.pop(tensor.chunk_key))
            tensor.ClearField("chunk_key")
    return final


def _tensors(response: pb.ExplainResponse) -> Iterator[Tensor]:
    for attribution in response.attributions:
        yield from (tensor for part in attribution.inputs for tensor in (part.tensor, part.spread))
    for baseline in response.baselines:
        yield from (part.tensor for part in baseline.inputs)


def reload_models(
    address: str, tally: Tally, stopping: threading.Event, excused: frozenset[grpc.StatusCode] = frozenset()
) -> None:
    """Unloads and loads one model again and again."""
    named = {"name": RELOADED}
    with grpc.insecure_channel(address) as channel:
        stub = ModelRepositoryServiceStub(channel)
        while not stopping.wait(0.5):
            for call in (
                lambda: stub.UnloadModel(repository_pb.UnloadModelRequest(model=named), timeout=PATIENCE),
                lambda: stub.LoadModel(repository_pb.LoadModelRequest(model=named), timeout=PATIENCE),
            ):
                found = outcome_of(call)
                right = found.response is not None or found.code in excused
                tally.add("reload", found, RELOADED, [] if right else [str(found)])
