"""A server under random clients for some minutes: is an answer lost or wrong, does memory grow, does it stop in order?

    python benchmarks/soak.py [--minutes 5] [--clients 12] [--seed 1] [--hostile] [-- FLAGS OF THE SERVER]

Starts a server process of many small models in all formats and a large one, asks a few hundred random requests one at a
time, and then lets clients loose that repeat them at once: with cancels at random moments, deadlines, time budgets, bad
requests, slow readers and broken connections, and where the server offers them streams and reloading of models. Every
answer is compared with the one given alone. In the end nothing waits, memory has been flat, and SIGTERM under load
exits with 0. Whether memory is flat takes some minutes to tell; a shorter soak says that it cannot. With `--hostile`
nearly all clients read slowly or give up what they asked for. A failure names its request; the same seed draws the same
ones. Writes `benchmarks/results/soak.md`, or `soak-hostile.md`; exits with 1 where something failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import networks
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1 import model_repository_service_pb2 as repository_pb
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceStub
from explainserve.v1.model_repository_service_pb2_grpc import ModelRepositoryServiceStub
from holding import GROWTH_LIMIT, SETTLING_SHARE, STRETCH_SECONDS, Growth, Holding, watching
from machine import Occupation, machine_lines
from models import FORMATS
from rpc.folder import write_folder
from second_look import Doubt
from serving import Served, serving
from soak_clients import OPTIONS, PATIENCE, RELOADED, Expected, SoakClient, Tally, outcome_of, reload_models
from soak_requests import draw
from three_formats import WRITERS

HERE = Path(__file__).parent
GONE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})
"""What clients of a server that stops may get instead of an answer."""

STOP_SECONDS = 15
"""Grace period of the server; twice that and it counts as stuck."""


# --- the server and its models ---------------------------------------------------------------------------------------


def write_models(folder: Path) -> Path:
    """The models of the tests, three networks in every format, a large one, and one to be reloaded."""
    write_folder(folder)
    for name, write in WRITERS.items():
        for file_format in FORMATS:
            write(file_format, folder / f"{name}-{file_format}")
    large = networks.calibrated(networks.ResNet((1, 1), 1, width=8, classes=10), 224)
    networks.write_model(large, "onnx", folder / "large", 224, classes=10)
    shutil.copytree(folder / "image", folder / RELOADED)
    return folder


def server_flags() -> list[str]:
    """The caps that the catalogue of bad requests counts on, and a queue that is full at times."""
    flags = {"--max-instances": 16, "--max-step-count": 512, "--max-waiting-rows": 8000, "--grace": STOP_SECONDS}
    return ["--allow-model-control", *(str(word) for pair in flags.items() for word in pair)]


def offered(channel: grpc.Channel) -> frozenset[str]:
    """Which of the younger RPCs the server has."""
    explainer, repository = ExplainerServiceStub(channel), ModelRepositoryServiceStub(channel)
    calls = {
        "ExplainStream": lambda: list(explainer.ExplainStream(pb.ExplainStreamRequest(), timeout=60)),
        "LoadModel": lambda: repository.IndexModels(repository_pb.IndexModelsRequest(), timeout=60),
    }
    return frozenset(name for name, call in calls.items() if outcome_of(call).code is not grpc.StatusCode.UNIMPLEMENTED)


def asked_alone(served: Served, stub: ExplainerServiceStub, seed: int, count: int) -> list[Expected]:
    """Random requests, one at a time, and what each gets."""
    summaries = {line.name for line in served.client.models() if line.state == "READY"}
    models = [served.client.model(name) for name in sorted(summaries)]
    models = [info for info in models if info.differentiable and info.name != "slow"]
    drawn = [draw(seed, number, models) for number in range(count)]
    return [Expected(each, outcome_of(partial(getattr(stub, each.rpc), each.request, timeout=60))) for each in drawn]


# --- what the server holds -------------------------------------------------------------------------------------------


def left_over(http_address: str) -> dict[str, float]:
    """Rows that wait and requests that are being answered, where there are any."""
    with urllib.request.urlopen(f"http://{http_address}/metrics", timeout=60) as page:
        families = text_string_to_metric_families(page.read().decode())
    names = ("explainserve_waiting_rows", "explainserve_active_requests")
    samples = [sample for family in families if family.name in names for sample in family.samples]
    return {f"{sample.name} {sample.labels}": sample.value for sample in samples if sample.value}


# --- the soak --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Soak:
    """What a soak found.

    Attributes:
        seen: memory, threads and files of the server during the load.
        idle: before the load, and after it.
        exit_code: after SIGTERM under load.
        looks: what explained maps that needed a second look, and how often.
        wrong: maps that nothing explained.
    """

    offered: frozenset[str]
    expected: list[Expected]
    tally: Tally = field(default_factory=Tally)
    stopped: Tally = field(default_factory=Tally)
    seen: list[Holding] = field(default_factory=list)
    idle: list[Holding] = field(default_factory=list)
    left: dict[str, float] = field(default_factory=dict)
    looks: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    exit_code: int | None = None
    stop_seconds: float = 0.0

    @property
    def growth(self) -> Growth:
        """Of memory."""
        return Growth.of(self.seen)

    @property
    def failures(self) -> list[str]:
        """Everything that must not be."""
        failures = [*self.tally.failures, *self.stopped.failures, *self.wrong]
        failures += [f"left over: {name} {value}" for name, value in self.left.items()]
        failures += [self.growth.failure] if self.growth.failure else []
        if self.exit_code != 0:
            failures.append(f"SIGTERM under load ended with {self.exit_code}")
        return failures

    def look_again(self, served: Served, doubts: Sequence[Doubt]) -> None:
        """Decides about maps that were not equal, with a server that does nothing else."""
        with grpc.insecure_channel(served.address, options=OPTIONS) as channel:
            ask = partial(ExplainerServiceStub(channel).Explain, timeout=PATIENCE)
            for doubt in doubts:
                explained, wrong = doubt.verdict(ask)
                self.looks.update([explained] if explained else [])
                self.wrong += [wrong] if wrong else []


def soak(arguments: argparse.Namespace) -> Soak:
    """The whole of it."""
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(Path(folder) / "models")
        found = soaked(models, arguments)
        if found.stopped.doubts:  # and the server that could tell is gone
            with started(models, arguments) as served:
                found.look_again(served, found.stopped.doubts)
    return found


def started(models: Path, arguments: argparse.Namespace) -> AbstractContextManager[Served]:
    """A server process."""
    return serving(models, arguments.threads, arguments.log, *server_flags(), *arguments.server)


def soaked(models: Path, arguments: argparse.Namespace) -> Soak:
    """A server from its start to its end under load."""
    client_count, seed = arguments.clients, arguments.seed
    with ExitStack() as stack:
        served = stack.enter_context(started(models, arguments))
        channel = stack.enter_context(grpc.insecure_channel(served.address, options=OPTIONS))
        found = Soak(offered(channel), asked_alone(served, ExplainerServiceStub(channel), seed, arguments.requests))
        print(f"seed {seed}: {len(found.expected)} requests asked alone; offered: {sorted(found.offered)}", flush=True)
        found.idle.append(Holding.now(served.process.pid))
        clients = partial(loaded, served, found, hostile=arguments.hostile)
        with watching(served.process.pid) as found.seen, clients(found.tally, client_count, seed):
            time.sleep(arguments.minutes * 60)
        found.left = wait_for_idleness(served)
        found.idle.append(Holding.now(served.process.pid))
        found.look_again(served, found.tally.doubts)
        with clients(found.stopped, client_count, seed + 1, GONE) as stopping:
            time.sleep(3)
            told = time.monotonic()
            served.process.send_signal(signal.SIGTERM)
            found.exit_code = served.process.wait(2 * STOP_SECONDS)
            found.stop_seconds = time.monotonic() - told
            stopping.set()
    return found


@contextmanager
def loaded(
    served: Served,
    found: Soak,
    tally: Tally,
    client_count: int,
    seed: int,
    excused: frozenset[grpc.StatusCode] = frozenset(),
    *,
    hostile: bool,
) -> Iterator[threading.Event]:
    """Clients at work as long as the context lasts; setting the event ends them too."""
    stopping = threading.Event()
    clients = [
        SoakClient(served.address, [seed, index], found.expected, tally, found.offered, stopping, excused, hostile)
        for index in range(client_count)
    ]
    work = [client.run for client in clients]
    if "LoadModel" in found.offered:
        work.append(partial(reload_models, served.address, tally, stopping, excused))
    running = [threading.Thread(target=each, name=f"client {index}") for index, each in enumerate(work)]
    for thread in running:
        thread.start()
    try:
        yield stopping
    finally:
        stopping.set()
        for thread in running:
            thread.join()


def wait_for_idleness(served: Served) -> dict[str, float]:
    """What is still left over when all clients have been gone for a while."""
    ends = time.monotonic() + 30
    while (left := left_over(served.http_address)) and time.monotonic() < ends:
        time.sleep(0.2)
    return left


# --- the page --------------------------------------------------------------------------------------------------------


def report(found: Soak, arguments: argparse.Namespace, others_share: float) -> str:
    """The markdown page."""
    verdict = "Nothing was lost or wrong." if not found.failures else f"{len(found.failures)} FAILURES."
    lines = [
        "# Soak: a server under random clients",
        "",
        f"Written by `benchmarks/soak.py --minutes {arguments.minutes:g} --clients {arguments.clients} "
        f"--seed {arguments.seed}{' --hostile' * arguments.hostile}{' '.join(['', *arguments.server])}`. {verdict}",
        "",
        *machine_lines(arguments.threads, others_share),
        "",
        f"{found.tally.call_count} calls of {arguments.clients} clients in {arguments.minutes:g} minutes; "
        f"{found.tally.compared} answers compared with those given alone to the same "
        f"{len(found.expected)} requests, of which {_refused(found)} are refused alone as well.",
        f"Younger RPCs that took part: {', '.join(sorted(found.offered)) or 'none'}.",
        "",
        *_outcome_table(found.tally),
        "",
        *_look_lines(found),
        "",
        "## What the server held",
        "",
        *_holding_table(found),
        "",
        f"Memory beside maps on their way grew by {found.growth}, twice the standard error of a line through the least "
        f"of each {STRETCH_SECONDS:.0f} s after the first {SETTLING_SHARE:.0%}; allowed are {GROWTH_LIMIT:.0%}.",
        f"Left over in the end: {found.left or 'no row that waits, no request that is answered'}.",
        "",
        "## SIGTERM under load",
        "",
        f"Exit code {found.exit_code} after {found.stop_seconds:.1f} s; {found.stopped.call_count} calls around it, "
        f"{found.stopped.compared} answers compared.",
    ]
    if found.failures:
        lines += ["", "## Failures", "", *(f"- {failure}" for failure in found.failures[:50])]
    return "\n".join(lines) + "\n"


def _refused(found: Soak) -> int:
    return sum(expected.alone.response is None for expected in found.expected)


def _look_lines(found: Soak) -> Iterator[str]:
    """Maps that were not equal at once; `second_look.py` says how they are judged."""
    if not found.looks and not found.wrong:
        yield "Every map was equal to the one given alone at once."
        return
    yield from ("| maps that needed a second look | |", "|---|---|")
    yield from (f"| {explained} | {count} |" for explained, count in found.looks.most_common())
    yield f"| unexplained | {len(found.wrong)} |"


def _outcome_table(tally: Tally) -> Iterator[str]:
    yield from ("| what clients did | calls | outcomes |", "|---|---|---|")
    for action in sorted({action for action, _ in tally.outcomes}):
        outcomes = {outcome: count for (name, outcome), count in tally.outcomes.most_common() if name == action}
        shown = [f"{count} {outcome}" for outcome, count in outcomes.items()]
        rest = f", and {len(shown) - 6} more kinds" if len(shown) > 6 else ""
        yield f"| {action} | {sum(outcomes.values())} | {', '.join(shown[:6])}{rest} |"


def _holding_table(found: Soak) -> Iterator[str]:
    moments = {
        "before": found.idle[0],
        "in the middle": found.seen[len(found.seen) // 2],
        "at the end": found.seen[-1],
        "idle again": found.idle[1],
    }
    yield from ("| | resident memory, MiB | threads | open files |", "|---|---|---|---|")
    for title, held in moments.items():
        yield f"| {title} | {held.resident_bytes / 2**20:.0f} | {held.thread_count} | {held.file_count} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=300, help="distinct random requests")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "soak-server.log")
    parser.add_argument("server", nargs="*", help="flags of the server, after --")
    parser.add_argument("--hostile", action="store_true", help="clients that mean ill")
    parser.add_argument("--output", type=Path, help="default: results/soak.md, or results/soak-hostile.md")
    arguments = parser.parse_args()
    arguments.output = arguments.output or HERE / "results" / ("soak-hostile.md" if arguments.hostile else "soak.md")
    started = Occupation.now()
    found = soak(arguments)
    page = report(found, arguments, Occupation.now().others_share(started))
    arguments.output.write_text(page, encoding="utf-8")
    print(page)
    sys.exit(1 if found.failures else 0)


if __name__ == "__main__":
    main()
