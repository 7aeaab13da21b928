"""One table: Integrated Gradients by our server over gRPC, by our explainer in process, and by Captum in process.

    python benchmarks/run.py                         # all networks: about half an hour on two quiet cores
    python benchmarks/run.py --quick                 # some of them, some minutes
    python benchmarks/run.py resnet18 swin_tiny      # networks of networks.py and trained.py by name
    python benchmarks/run.py models/mine             # a model folder, or model.onnx, model.pt2, model.pt
    python benchmarks/run.py mine.onnx,mine.pt       # we serve the first, Captum gets the second

At equal numbers of steps and at equal error of the map, for 1, 4 and 16 clients at once, and how time and memory grow
with steps, targets, instances and clients. Contestants run in turn; ratios are of neighbouring runs. The error is the
relative L2 distance of the whole map to one of many points. Exports, weights and Captum's errors are kept in
`benchmarks/cache`; the first run takes some minutes more. Writes `benchmarks/results/benchmark.md`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from contestants import CAPTUM_RULES, Ask, InProcess, OverGrpc, Rule, Run, Worker, captum_of, worker
from curves import COARSE, COARSE_REFERENCE, GRID, REFERENCE, Accuracy, kept, rows_to
from machine import Occupation, machine_lines
from serving import serving
from subjects import FORMATS, Subject, Task, cache_folder, subject, task
from table import CAPTUM, GRPC, IN_PROCESS, Line, Question, page, quoted
from trained import RECIPES

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
STANDARD = (*RECIPES, "resnet50", "vit_small")
QUICK = ("convolutional-28", "transformer-28", "resnet50", "vit_small")
STEPS, HEAVY_STEPS, HEAVY_SECONDS = 32, 16, 0.03
CLIENTS = (1, 4, 16)
GROWTH = {"steps": (8, 128), "targets": (2, 8), "instances": (4, 16)}
"""The last of each is what a quick run measures."""

PICTURES = 3
ADAPTIVE_COUNTS = (16, 24, 32, 48, 64, 96, 128)
GOALS = (0.01,)
"""Errors that are asked for, beside the one that our default reaches."""

Asks = Sequence[Sequence[Ask]]
"""Requests that come at once, wave after wave."""


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        rounds, seconds: runs of each contestant, fewer (but two) where a line would take longer.
    """

    rounds: int
    seconds: float
    quick: bool


# --- one model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bench:
    """One subject with its contestants."""

    subject: Subject
    task: Task
    contestants: Mapping[str, Worker | OverGrpc]
    extent: Extent

    @cached_property
    def heavy(self) -> bool:
        """Whether a row takes so long that fewer of them are asked for."""
        contestant, asks = self.contestants[GRPC], self._fixed(HEAVY_STEPS, 1)[0]
        return min(contestant.measured(asks).wall for _ in range(2)) / HEAVY_STEPS > HEAVY_SECONDS

    @property
    def steps(self) -> int:
        """Of most lines at equal steps."""
        return HEAVY_STEPS if self.heavy else STEPS

    def lines(self, cache: Path) -> Iterator[Line]:
        """Everything that is measured of one subject."""
        heavy, quick, steps = self.heavy, self.extent.quick, self.steps
        for clients in CLIENTS[:1] if heavy and quick else CLIENTS:
            yield self._at_equal_steps(Question.STEPS, f"{steps} steps", clients, self._fixed(steps, clients))
        if not (heavy and quick):
            yield from self._at_equal_error(cache)
        if not heavy:
            yield from self._growth()

    def _at_equal_steps(self, question: Question, what: str, clients: int, asks: Asks) -> Line:
        """The midpoint rule; everyone evaluates the same points."""
        rows = dict.fromkeys(self.contestants, str(asks[0][0].rule.step_count))
        line = self._measured(question, what, clients, dict.fromkeys(self.contestants, asks), rows)
        maps = {name: contestant.explain(asks[0][:1])[0][0] for name, contestant in self.contestants.items()}
        if CAPTUM in maps:
            line.distance = max(_distance(maps[name], maps[CAPTUM]) for name in maps)
        return line

    def served_as(self, file_format: str) -> Line:
        """One client, at equal steps."""
        what = f"{self.steps} steps, served as {FORMATS[file_format]}"
        return self._at_equal_steps(Question.FORMAT, what, 1, self._fixed(self.steps, 1))

    def _at_equal_error(self, cache: Path) -> Iterator[Line]:
        captum = self.contestants.get(CAPTUM)
        if captum is None:
            return
        count = 1 if self.heavy else PICTURES
        grid, reference = (COARSE, COARSE_REFERENCE) if self.heavy else (GRID, REFERENCE)
        accuracies = [
            Accuracy(kept(cache, self.subject, self.task, index), self.task, index, captum, grid, reference)
            for index in range(count)
        ]
        found = [self._ours(index, Rule("adaptive")) for index in range(count)]
        errors = [accuracy.error(maps[0]) for accuracy, (maps, _) in zip(accuracies, found, strict=True)]
        ours = [(Rule("adaptive"), rows) for _, rows in found]
        what = f"error of our default: {_listed(errors, '.3f')}"
        yield from self._to_errors(Question.DEFAULT_ERROR, what, accuracies, errors, ours, CLIENTS)
        for goal in GOALS if not self.extent.quick else ():
            ours = [self._adaptive_to(index, goal, accuracy) for index, accuracy in enumerate(accuracies)]
            if None not in ours:
                yield from self._to_errors(
                    Question.ERROR, f"error {goal}", accuracies, [goal] * count, ours, CLIENTS[:1]
                )

    def _to_errors(
        self,
        question: Question,
        what: str,
        accuracies: Sequence[Accuracy],
        errors: Sequence[float],
        ours: Sequence[tuple[Rule, int]],
        client_counts: Sequence[int],
    ) -> Iterator[Line]:
        """A line per rule of Captum that reaches the errors; for several clients, of the one that needs fewer rows."""
        reached = {rule: rows for rule in CAPTUM_RULES if (rows := _rows_to(accuracies, errors, rule)) is not None}
        for rule in CAPTUM_RULES.keys() - reached.keys():
            print(f"{self.subject.name}: Captum does not reach {what} by {rule}", flush=True)
        best = min(reached, key=lambda rule: sum(reached[rule]), default=None)
        for clients in client_counts:
            for rule, rows in reached.items():
                if clients == 1 or rule == best:
                    title = f"{what}; Captum by {rule.replace('_', '-')}"
                    yield self._to_error(question, title, clients, [Rule(rule, n) for n in rows], ours)

    def _to_error(
        self, question: Question, what: str, clients: int, theirs: Sequence[Rule], ours: Sequence[tuple[Rule, int]]
    ) -> Line:
        asks = dict.fromkeys(self.contestants, self._waves(clients, [rule for rule, _ in ours]))
        asks[CAPTUM] = self._waves(clients, theirs)
        rows = dict.fromkeys(self.contestants, _listed([rows for _, rows in ours]))
        rows[CAPTUM] = _listed([rule.step_count or 0 for rule in theirs])
        return self._measured(question, what, clients, asks, rows)

    def _growth(self) -> Iterator[Line]:
        for steps in self._growing("steps"):
            yield self._at_equal_steps(Question.GROWTH, f"{steps} steps", 1, self._fixed(steps, 1))
        for count in self._growing("targets"):
            if count <= self.task.class_count:
                ask = Ask(self.task.instances[:1], tuple(range(count)), Rule("midpoint", STEPS))
                yield self._at_equal_steps(Question.GROWTH, f"{count} targets, {STEPS} steps", 1, [[ask]])
        for count in self._growing("instances"):
            instances = np.stack([self._instance(index) for index in range(count)])
            ask = Ask(instances, self.task.targets[:1], Rule("midpoint", STEPS))
            yield self._at_equal_steps(Question.GROWTH, f"{count} instances, {STEPS} steps", 1, [[ask]])

    def _growing(self, what: str) -> Sequence[int]:
        return GROWTH[what][-1:] if self.extent.quick else GROWTH[what]

    def _fixed(self, steps: int, clients: int) -> Asks:
        return self._waves(clients, [Rule("midpoint", steps)])

    def _waves(self, clients: int, rules: Sequence[Rule]) -> Asks:
        """A picture per client and its rule; one client asks for one picture after another."""
        asks = [self._ask(index, rules[index % len(rules)]) for index in range(max(clients, len(rules)))]
        return [[ask] for ask in asks] if clients == 1 else [asks[:clients]]

    def _ask(self, index: int, rule: Rule) -> Ask:
        target = self.task.targets[index % len(self.task.targets)]
        return Ask(self._instance(index)[None], (target,), rule)

    def _instance(self, index: int) -> np.ndarray:
        return self.task.instances[index % len(self.task.instances)]

    def _ours(self, index: int, rule: Rule) -> tuple[np.ndarray, int]:
        (answer,) = self.contestants[GRPC].explain([self._ask(index, rule)])
        return answer

    def _adaptive_to(self, index: int, error: float, accuracy: Accuracy) -> tuple[Rule, int] | None:
        """Our adaptive rule with the fewest rows that reach an error."""
        answers = (self._ours(index, Rule("adaptive", count)) for count in ADAPTIVE_COUNTS)
        rows = rows_to([(rows, accuracy.error(maps[0])) for maps, rows in answers], error)
        return None if rows is None else (Rule("adaptive", rows), rows)

    def _measured(
        self, question: Question, what: str, clients: int, asks: Mapping[str, Asks], rows: dict[str, str]
    ) -> Line:
        """Contestants in turn, after a round that does not count."""
        if clients > 1 and CAPTUM in self.contestants:
            what += self._let_captum_choose(asks[CAPTUM])
        map_count = sum(ask.map_count for wave in asks[GRPC] for ask in wave)
        runs: dict[str, list[Run]] = {name: [] for name in self.contestants}
        started = time.perf_counter()
        for index in range(self.extent.rounds + 1):
            if index > 2 and time.perf_counter() - started > self.extent.seconds:
                break
            for name, contestant in self.contestants.items():
                run = _added([contestant.measured(wave) for wave in asks[name]])
                if index:
                    runs[name].append(run)
        line = Line(self.subject.name, question, what, clients, map_count, rows, runs)
        print(f"| {' | '.join(line.cells)} |", flush=True)
        return line

    def _let_captum_choose(self, asks: Asks) -> str:
        """One after another with all threads, or side by side with a thread each: whichever is faster."""
        captum = self.contestants[CAPTUM]
        assert isinstance(captum, Worker)
        times = {}
        for threaded in (False, True):
            captum.set("threaded", threaded)
            times[threaded] = min(captum.measured(asks[0]).wall for _ in range(2))
        captum.set("threaded", times[True] < times[False])
        return " (Captum side by side)" if times[True] < times[False] else " (Captum one by one)"


def _rows_to(accuracies: Sequence[Accuracy], errors: Sequence[float], rule: str) -> list[int] | None:
    """Rows of Captum per picture; None where one is not reached."""
    rows = [accuracy.rows_to(error, rule) for accuracy, error in zip(accuracies, errors, strict=True)]
    return [n for n in rows if n is not None] if None not in rows else None


def _added(runs: Sequence[Run]) -> Run:
    return Run(sum(run.wall for run in runs), sum(run.cpu for run in runs), max(run.peak_bytes for run in runs))


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


def _listed(values: Sequence[float], form: str = "") -> str:
    return ", ".join(format(value, form) for value in values)


# --- all models ------------------------------------------------------------------------------------------------------


def measure(word: str, cache: Path, threads: int, extent: Extent) -> tuple[list[Line], str]:
    """Lines of one model, and what was chosen for the contestants."""
    found = subject(word, cache, tuple(FORMATS)[: 1 if extent.quick else None])
    lines: list[Line] = []
    with ExitStack() as stack:
        served = stack.enter_context(serving(found.folder / found.formats[0], threads, cache / "server.log"))
        asked = task(found, served.client, max(CLIENTS))
        contestants: dict[str, Worker | OverGrpc] = {}
        note = f"{found.name}, ours: batches of {served.client.model(found.name).max_batch_rows}"
        if found.module is not None:
            captum = stack.enter_context(worker(captum_of, found, asked, threads=threads))
            contestants[CAPTUM] = captum
            note += f"; Captum: {captum.get('description')}"
        contestants[IN_PROCESS] = stack.enter_context(worker(InProcess, found, asked, threads=threads))
        contestants[GRPC] = OverGrpc(served, asked, found.name)
        lines += Bench(found, asked, contestants, extent).lines(cache)
    lines += [] if extent.quick else other_formats(found, cache, threads, extent)
    return lines, note


def other_formats(found: Subject, cache: Path, threads: int, extent: Extent) -> Iterator[Line]:
    """The same network as `.pt2` and TorchScript, for one client."""
    for file_format in found.formats[1:]:
        with ExitStack() as stack:
            served = stack.enter_context(serving(found.folder / file_format, threads, cache / "server.log"))
            asked = task(found, served.client, 1)
            captum = stack.enter_context(worker(captum_of, found, asked, threads=threads))
            contestants = {CAPTUM: captum, GRPC: OverGrpc(served, asked, found.name)}
            yield Bench(found, asked, contestants, extent).served_as(file_format)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="networks by name, model files, model folders")
    parser.add_argument("--quick", action="store_true", help="fewer networks, lines and runs")
    parser.add_argument("--rounds", type=int, default=None, help="runs of each contestant that count")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quote", action="store_true", help="put the summary into the README too")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "benchmark.md")
    arguments = parser.parse_args()
    extent = Extent(arguments.rounds or (3 if arguments.quick else 7), 4 if arguments.quick else 30, arguments.quick)
    command = " ".join(("benchmarks/run.py", *arguments.models, *(["--quick"] if arguments.quick else [])))
    started, cache = Occupation.now(), cache_folder()
    lines: list[Line] = []
    notes: list[str] = []
    for word in arguments.models or (QUICK if arguments.quick else STANDARD):
        measured, note = measure(word, cache, arguments.threads, extent)
        lines += measured
        notes.append(note)
        now = Occupation.now()  # the page is written after each model: a run that is stopped has its first ones
        heading = [
            f"Written by `{command}` in {(now.at - started.at) / 60:.0f} minutes.",
            "",
            *machine_lines(arguments.threads, now.others_share(started)),
            "",
            "With what was fastest for each:",
            "",
            *(f"- {note}" for note in notes),
        ]
        arguments.output.write_text(page(heading, lines), encoding="utf-8")
    print(arguments.output.read_text(encoding="utf-8"))
    if arguments.quote:
        README.write_text(quoted(README.read_text(encoding="utf-8"), lines), encoding="utf-8")


if __name__ == "__main__":
    main()
