"""Who computes the maps: Captum, our explainer without gRPC, our server. Each in a process of its own, so that each has
its own threads and memory; the clock runs where the work is asked for.
"""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

import captum.attr
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import explainserve_client
from explainserve_client import Client
from machine import peak_bytes, reset_peak
from serving import Served
from subjects import Subject, Task, cache_folder, module_of

Array = NDArray[Any]

CAPTUM_RULES = {"gauss_legendre": "gausslegendre", "midpoint": "riemann_middle"}
"""Captum's names of rules by ours; the first is its default."""

CAPTUM_BATCHES = (1, 4, 8, 16, 32, 64, 128)
"""Rows of a batch that are tried, in order."""

LONG_SECONDS = 0.5
"""A trial that takes this long is not repeated."""

LEAST_STEPS = 2
"""Captum refuses a single step."""

UNREACHABLE = 1e-6
"""A tolerance that is never met: `max_step_count` alone says where the adaptive rule stops."""


@dataclass(frozen=True)
class Rule:
    """How many gradients, and where: a fixed rule, or "adaptive" with at most so many, None by default."""

    name: str
    step_count: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Of Integrated Gradients, as both our client and our method take them."""
        if self.name != "adaptive":
            return {"step_count": self.step_count, "quadrature": self.name}
        if self.step_count is None:
            return {}
        limit = max(16, self.step_count)
        return {"tolerance": UNREACHABLE, "completeness_tolerance": UNREACHABLE, "max_step_count": limit}


@dataclass(frozen=True, eq=False)
class Ask:
    """One request: every target of every instance.

    Attributes:
        instances: shape (count, *instance shape).
        targets: classes; None where the output is one number.
    """

    instances: Array
    targets: tuple[int | None, ...]
    rule: Rule

    @property
    def map_count(self) -> int:
        """Maps of the answer."""
        return len(self.instances) * len(self.targets)


class Contestant(Protocol):
    """Answers requests."""

    def explain(self, asks: Sequence[Ask]) -> list[tuple[Array, int]]:
        """Of requests that come at once, each from a client of its own: the maps, shape (instances * targets, ...), and
        the gradient rows of the first."""
        ...


@dataclass(frozen=True)
class Run:
    """One measured run.

    Attributes:
        wall, cpu: seconds; processor time of every process that took part.
        peak_bytes: most resident memory of the process that computes.
    """

    wall: float
    cpu: float
    peak_bytes: int


# --- Captum ----------------------------------------------------------------------------------------------------------


class Captum:
    """A network as a user of Captum has it: in the faster memory format, with the fastest of CAPTUM_BATCHES.

    Several clients are answered one after another with all threads, or side by side with a thread each: `threaded`.
    On CUDA, torch's own defaults hold: convolutions may be in TensorFloat-32, products are not.
    """

    def __init__(self, task: Task, net: nn.Module, threads: int, device: str = "cpu") -> None:
        torch.set_num_threads(threads)
        self._task, self._threads, self._device = task, threads, device
        net = net.to(device)
        self._net = torch.nn.Sequential(net, torch.nn.Softmax(1)) if task.probability else net
        self._channels_last, self._batch_rows = False, CAPTUM_BATCHES[0]
        self._pool = ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1))
        self.threaded = False
        self._choose()

    @property
    def description(self) -> str:
        """What was chosen."""
        layout = "channels-last" if self._channels_last else "contiguous"
        return f"{layout}, batches of {self._batch_rows}"

    def explain(self, asks: Sequence[Ask]) -> list[tuple[Array, int]]:
        if len(asks) > 1 and self.threaded:
            return list(self._pool.map(self._explained, asks))
        return [self._explained(ask) for ask in asks]

    def _explained(self, ask: Ask) -> tuple[Array, int]:
        maps = [self._maps(ask.instances, target, ask.rule) for target in ask.targets]
        return np.stack(maps, 1).reshape(-1, *ask.instances.shape[1:]), ask.rule.step_count or 0

    def _maps(self, instances: Array, target: int | None, rule: Rule) -> Array:
        layout = torch.channels_last if self._channels_last else torch.contiguous_format
        x = torch.from_numpy(instances).to(self._device).contiguous(memory_format=layout)
        baseline = torch.from_numpy(np.broadcast_to(self._task.baseline, instances.shape).copy()).to(self._device)
        found = captum.attr.IntegratedGradients(self._net).attribute(
            x,
            baseline.contiguous(memory_format=layout),
            target=target,
            n_steps=rule.step_count,
            method=CAPTUM_RULES[rule.name],
            internal_batch_size=self._batch_rows,
        )
        return found.detach().contiguous().cpu().numpy()

    def _choose(self) -> None:
        """The fastest pair of memory format and batch."""
        plain, images = self._net, self._task.instances.ndim == 4
        variants = []
        for self._channels_last in (False, True) if images else (False,):
            self._net = _in_layout(plain, self._channels_last)
            variants.append((*self._fastest_batch(), self._channels_last, self._net))
        _, self._batch_rows, self._channels_last, self._net = min(variants, key=lambda variant: variant[0])

    def _fastest_batch(self) -> tuple[float, int]:
        """Seconds per row and rows; larger batches are tried as long as they help."""
        best = (float("inf"), CAPTUM_BATCHES[0])
        for self._batch_rows in CAPTUM_BATCHES:
            found = (self._seconds_per_row(), self._batch_rows)
            if found[0] > 1.05 * best[0]:
                break
            best = min(best, found)
        return best

    def _seconds_per_row(self) -> float:
        """Of a full batch, the better of two where it is short; infinite where the model has a smaller one baked in."""
        rule = Rule("midpoint", max(LEAST_STEPS, self._batch_rows))
        times: list[float] = []
        while len(times) < 2 and sum(times) < LONG_SECONDS:
            started = time.perf_counter()
            try:
                self._maps(self._task.instances[:1], self._task.targets[0], rule)
            except RuntimeError:
                return float("inf")
            times.append(time.perf_counter() - started)
        return min(times) / max(LEAST_STEPS, self._batch_rows)


def captum_of(subject: Subject, task: Task, threads: int, device: str = "cpu") -> Captum:
    """For a process of its own, which makes or reads the network itself."""
    net = module_of(subject, cache_folder())
    assert net is not None
    return Captum(task, net, threads, device)


def _in_layout(net: nn.Module, channels_last: bool) -> nn.Module:
    return copy.deepcopy(net).to(memory_format=torch.channels_last) if channels_last else net


# --- ours in process -------------------------------------------------------------------------------------------------


class InProcess:
    """Our explainer called directly: scheduler, device thread and arithmetic of methods; neither gRPC nor figures."""

    def __init__(self, subject: Subject, task: Task, threads: int, device: str = "cpu") -> None:
        from prometheus_client import CollectorRegistry

        from explainserve import process
        from explainserve.backends import LoadOptions
        from explainserve.devices import Devices
        from explainserve.engine import Engine
        from explainserve.explainer import Explainer
        from explainserve.metrics import Metrics
        from explainserve.repository import Repository
        from explainserve.scheduling import Scheduler
        from explainserve.settings import Settings

        self._loop = asyncio.new_event_loop()
        process.prepare(self._loop)  # and settle below: as the server does
        settings = Settings()
        options = LoadOptions(device, thread_count=threads, share_weights=settings.share_weights)
        repository = Repository(
            subject.folder / subject.formats[0],
            options,
            settings.max_batch_rows,
            warm_up_seconds=settings.warm_up_seconds,
        )
        repository.load_all()
        process.settle()
        self._task = task
        self._model = repository.get(subject.name)
        devices = Devices({options.device: Engine(Scheduler(settings.max_waiting_rows), Metrics(CollectorRegistry()))})
        devices.start()
        self._explainer = Explainer(devices, settings.row_limit, settings.byte_limit)

    @property
    def description(self) -> str:
        """How the model is run."""
        words = [f"batches of {self._model.max_batch_rows}", self._model.loaded.execution.replace("_", " ")]
        return ", ".join(filter(None, words))

    def explain(self, asks: Sequence[Ask]) -> list[tuple[Array, int]]:
        return self._loop.run_until_complete(self._at_once(asks))

    async def _at_once(self, asks: Sequence[Ask]) -> list[tuple[Array, int]]:
        return await asyncio.gather(*map(self._explained, asks))

    async def _explained(self, ask: Ask) -> tuple[Array, int]:
        prepared = await asyncio.to_thread(self._explainer.prepare, self._query(ask))
        answer = await self._explainer.explain(prepared)
        found = [explanation.attribution for explanation in answer.explanations]
        return np.stack([each.tensors[self._task.input] for each in found]), found[0].step_count

    def _query(self, ask: Ask) -> Any:
        from explainserve.baselines import BaselineSpec, Given
        from explainserve.explanation import Instance, Subject
        from explainserve.methods import IntegratedGradients
        from explainserve.query import Query
        from explainserve.signature import MapSpec, Score
        from explainserve.targets import Element, TargetSpec

        name, output, score = self._task.input, self._model.signature.outputs[0].name, Score[self._task.score]
        indices = [() if target is None else (target,) for target in ask.targets]
        return Query(
            self._model,
            tuple(Instance({name: x}, {}) for x in ask.instances),
            tuple(TargetSpec(output, score, Element(index), request_index=i) for i, index in enumerate(indices)),
            (BaselineSpec(Given(self._task.baseline)),),
            (IntegratedGradients(**ask.rule.options),),
            Subject({name: MapSpec(name)}, {name: ask.instances.shape[1:]}),
        )


# --- ours over gRPC --------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class OverGrpc:
    """Our server, asked by clients with a connection each: figures, score path and error estimate included."""

    served: Served
    task: Task
    model: str
    _clients: list[Client] = field(init=False, default_factory=list)
    _pool: ThreadPoolExecutor = field(init=False, default_factory=lambda: ThreadPoolExecutor(64))

    def explain(self, asks: Sequence[Ask]) -> list[tuple[Array, int]]:
        while len(self._clients) < len(asks):
            self._clients.append(Client(self.served.address, timeout=600.0))
        return list(self._pool.map(self._explained, self._clients, asks))

    def measured(self, asks: Sequence[Ask]) -> Run:
        """One run of requests that come at once."""
        server = self.served.process.pid
        reset_peak(server)
        cpu, wall = time.process_time() + self.served.cpu_seconds, time.perf_counter()
        self.explain(asks)
        wall = time.perf_counter() - wall
        return Run(wall, time.process_time() + self.served.cpu_seconds - cpu, peak_bytes(server))

    def _explained(self, client: Client, ask: Ask) -> tuple[Array, int]:
        options = ask.rule.options
        result = client.explain(
            self.model,
            ask.instances,
            targets=[() if target is None else target for target in ask.targets],
            baselines=self.task.baseline,
            score=self.task.score,
            method=explainserve_client.IntegratedGradients(**options) if options else None,
        )
        return np.stack([each.tensor for each in result.attributions]), result.attributions[0].step_count


# --- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Worker:
    """A contestant in a child process."""

    _pipe: Connection

    def explain(self, asks: Sequence[Ask]) -> list[tuple[Array, int]]:
        return self._call("explain", asks)

    def measured(self, asks: Sequence[Ask]) -> Run:
        """One run of requests that come at once; the child reads the clocks."""
        return self._call("measured", asks)

    def get(self, name: str) -> Any:
        """An attribute of the contestant."""
        return self._call("get", name)

    def set(self, name: str, value: Any) -> None:
        """Sets an attribute of the contestant."""
        self._call("set", name, value)

    def _call(self, *words: Any) -> Any:
        self._pipe.send(words)
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextmanager
def worker(kind: Callable[..., Any], *arguments: Any, threads: int) -> Iterator[Worker]:
    """Makes a contestant in a child process, which ends with the context."""
    ours, theirs = multiprocessing.Pipe()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(theirs, kind, *arguments, threads), daemon=True
    )
    process.start()
    theirs.close()
    try:
        ready = ours.recv()
        if isinstance(ready, Exception):
            raise ready
        yield Worker(ours)
    finally:
        ours.close()
        process.join(10)
        process.kill()


def _serve(pipe: Connection, kind: Callable[..., Any], *arguments: Any) -> None:
    """The child's loop: a command, its answer; ends with the pipe."""
    try:
        contestant = kind(*arguments)
        pipe.send("ready")
        while True:
            pipe.send(_answer(contestant, *pipe.recv()))
    except EOFError:
        pass
    except Exception as error:
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _answer(contestant: Any, word: str, *values: Any) -> Any:
    if word == "explain":
        return contestant.explain(*values)
    if word == "get":
        return getattr(contestant, *values)
    if word == "set":
        return setattr(contestant, *values)
    reset_peak(os.getpid())
    cpu, wall = time.process_time(), time.perf_counter()
    contestant.explain(*values)
    wall = time.perf_counter() - wall
    return Run(wall, time.process_time() - cpu, peak_bytes(os.getpid()))
