"""Integrated Gradients end to end over gRPC beside Captum in process: time per row, and time to the same map error.

    python benchmarks/against_captum.py [--rounds 5] [--only rows|error] [--output FILE]

Same machine, same threads, same run, contestants in turn. Ours is a server process and a client in this process, so
that serialization, scheduling, statistics and the arithmetic of methods count; Captum is called here, on frozen
parameters, in the faster of torch's two memory formats, with as many rows per batch as our server takes. Trained
networks, exports and references are kept in `benchmarks/cache`; the first run takes some minutes more. Writes
`benchmarks/results/against_captum.md`.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import captum.attr
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import networks
import trained
from explainserve_client import IntegratedGradients
from serving import Occupation, Served, Times, interleaved, serving

HERE = Path(__file__).parent
BATCH_ROWS = 16
"""Rows of one batch: the server's default, and Captum's `internal_batch_size`."""
SIDE = 224
TARGET = 3
FORMATS = {"onnx": "ONNX", "pt2": ".pt2", "pt": "TorchScript"}
RANDOM_NETS: dict[str, Callable[[], nn.Module]] = {"ResNet-50": networks.resnet50, "ViT-S/16": networks.vit_small}
CAPTUM_RULES = {"gauss_legendre": "gausslegendre", "midpoint": "riemann_middle"}
GRID = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
ADAPTIVE_GRID = tuple(n for n in GRID if n >= 16)
GOALS = (0.05, 0.02, 0.01)
DEFAULT = "default tolerance"
UNREACHABLE = 1e-6
"""A tolerance that is never met: `max_step_count` alone says where the adaptive rule stops."""

Array = NDArray[Any]
Curve = list[tuple[int, float]]
"""(rows, relative L2 error of the map)."""


# --- Captum ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Captum:
    """A network as a user of Captum has it."""

    net: nn.Module
    channels_last: bool

    @classmethod
    def fastest(cls, net: nn.Module, x: Array) -> Captum:
        """In the memory format that is faster here, by the better of two runs of one batch each."""
        variants = [cls(net, False), cls(copy.deepcopy(net).to(memory_format=torch.channels_last), True)]
        return min(variants, key=lambda variant: min(variant.seconds(x) for _ in range(3)))

    def seconds(self, x: Array) -> float:
        """Time of one batch."""
        started = time.perf_counter()
        self.map(x, np.zeros_like(x), 0, BATCH_ROWS, "midpoint")
        return time.perf_counter() - started

    def map(self, x: Array, baseline: Array, target: int, step_count: int, rule: str) -> Array:
        """The map, in the shape of x."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        ends = (torch.from_numpy(array[None]).contiguous(memory_format=layout) for array in (x, baseline))
        method = captum.attr.IntegratedGradients(self.net)
        options = {"n_steps": step_count, "method": CAPTUM_RULES[rule], "internal_batch_size": BATCH_ROWS}
        return method.attribute(*ends, target=target, **options).detach()[0].numpy()


# --- time per row ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RowTimes:
    """Times of `step_count` rows for one network, by contestant; "Captum" is the first."""

    step_count: int
    times: dict[str, Times]
    channels_last: bool


def time_per_row(served: Served, name: str, net: nn.Module, rounds: int, step_count: int) -> RowTimes:
    """The midpoint rule with zeros as baseline, on one picture of noise."""
    x = np.random.default_rng(0).standard_normal((3, SIDE, SIDE)).astype(np.float32)
    peer, method = Captum.fastest(net, x), IntegratedGradients(step_count=step_count)
    contestants: dict[str, Callable[[], Any]] = {
        "Captum": lambda: peer.map(x, np.zeros_like(x), TARGET, step_count, "midpoint")
    }
    for suffix, title in FORMATS.items():
        explain = partial(served.client.explain, model_name(name, suffix), x)
        contestants[title] = partial(explain, targets=TARGET, baselines="zeros", method=method)
    return RowTimes(step_count, interleaved(contestants, rounds, served), peer.channels_last)


# --- time to the same map error --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """One picture and the network that is asked about it: the probability of its most probable class, from gray."""

    model: str
    net: nn.Module
    peer: Captum
    x: Array
    baseline: Array
    target: int
    reference: Array

    def error(self, found: Array) -> float:
        """Relative L2 distance of the whole map to the reference."""
        return float(np.linalg.norm(found - self.reference) / np.linalg.norm(self.reference))

    def captum(self, step_count: int, rule: str) -> Array:
        """Captum's map."""
        return self.peer.map(self.x, self.baseline, self.target, step_count, rule)

    def ours(self, served: Served, suffix: str, method: IntegratedGradients | None) -> Any:
        """Our attribution, over gRPC."""
        model = model_name(self.model, suffix)
        result = served.client.explain(
            model, self.x, targets=self.target, baselines="gray", score="PROBABILITY", method=method
        )
        return result.attributions[0]


@dataclass(frozen=True, eq=False)
class Goal:
    """What reaching the same error takes: rows per picture, and times of all pictures together.

    Attributes:
        errors: the error that all contestants reach, per picture.
        rows: per contestant, per picture; None where it is not reached with GRID's largest.
    """

    title: str
    errors: list[float]
    rows: dict[str, list[int | None]]
    times: dict[str, Times]


@dataclass(frozen=True, eq=False)
class ErrorTimes:
    """One trained network.

    Attributes:
        scores: F(x') and F(x) per picture.
        curves: median error over pictures by rows, per rule.
    """

    accuracy: float
    scores: list[tuple[float, float]]
    curves: dict[str, Curve]
    goals: list[Goal]
    channels_last: bool


FIXED = {"Captum, Gauss-Legendre": "gauss_legendre", "Captum, midpoint": "midpoint"}
"""Captum's contestants and our names of their rules; the first is Captum's default."""
ADAPTIVE = "adaptive"


def time_to_error(served: Served, name: str, net: nn.Module, accuracy: float, run: Run) -> ErrorTimes:
    """Measures one trained network."""
    cases = list(_cases(name, net, run))
    defaults = [case.ours(served, "onnx", None) for case in cases]
    curves = [_curves(case, served) for case in cases]
    reached = [case.error(attribution.tensor) for case, attribution in zip(cases, defaults, strict=True)]
    goals = [_goal(DEFAULT, cases, curves, reached)]
    goals[0].rows[ADAPTIVE] = [attribution.step_count for attribution in defaults]
    goals += [_goal(f"{goal:.0%}", cases, curves, [goal] * len(cases)) for goal in GOALS]
    for goal in goals:
        goal.times.update(interleaved(dict(_contestants(goal, cases, served)), run.rounds, served))
    scores = [(d.baseline_output_value, d.instance_output_value) for d in defaults]
    return ErrorTimes(accuracy, scores, _medians(curves), goals, cases[0].peer.channels_last)


def _cases(name: str, net: nn.Module, run: Run) -> Iterator[Case]:
    headed = nn.Sequential(net, nn.Softmax(1)).eval()
    pictures, baseline = trained.explained_pictures(), trained.gray()
    with torch.no_grad():
        probabilities = headed(torch.from_numpy(pictures)).numpy()
    peer = Captum.fastest(headed, pictures[0])
    for index in np.argsort(-probabilities.max(1))[: run.images].tolist():
        x, target = pictures[index], int(probabilities[index].argmax())
        path = run.cache / f"reference-{name}-{index}-{run.reference}.npy"
        if not path.exists():
            print(f"reference of picture {index} for the {name} network", flush=True)
            np.save(path, Captum(headed, False).map(x, baseline, target, run.reference, "midpoint"))
        yield Case(name, net, peer, x, baseline, target, np.load(path))


def _curves(case: Case, served: Served) -> dict[str, Curve]:
    """Error by rows; the fixed rules have the same points here and there."""
    curves: dict[str, Curve] = {
        title: [(n, case.error(case.captum(n, rule))) for n in GRID] for title, rule in FIXED.items()
    }
    adaptive = (case.ours(served, "onnx", _adaptive(n)) for n in ADAPTIVE_GRID)
    curves[ADAPTIVE] = [(found.step_count, case.error(found.tensor)) for found in adaptive]
    return curves


def _adaptive(row_count: int) -> IntegratedGradients:
    return IntegratedGradients(
        tolerance=UNREACHABLE, completeness_tolerance=UNREACHABLE, max_step_count=max(16, row_count)
    )


def _goal(title: str, cases: Sequence[Case], curves: Sequence[dict[str, Curve]], errors: list[float]) -> Goal:
    rows = {name: [rows_to(own[name], error) for own, error in zip(curves, errors, strict=True)] for name in curves[0]}
    return Goal(title, errors, rows, {})


def rows_to(curve: Curve, error: float) -> int | None:
    """Fewest rows that reach an error, between measured points on a straight line in logarithms."""
    before: tuple[int, float] | None = None
    for n, found in curve:
        if found <= error:
            if before is None:
                return n
            share = np.log(before[1] / error) / np.log(before[1] / found)
            return int(np.ceil(np.exp(np.log(before[0]) + share * np.log(n / before[0])) - 1e-9))
        before = n, found
    return None


def _contestants(goal: Goal, cases: Sequence[Case], served: Served) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each explains all pictures, one after another; whoever does not reach the error does not run."""

    def each(rows: list[int | None], run: Callable[[Case, int], Any]) -> Callable[[], Any]:
        return lambda: [run(case, n) for case, n in zip(cases, rows, strict=True) if n is not None]

    reached = {name: rows for name, rows in goal.rows.items() if None not in rows}
    for name, rule in FIXED.items():
        if name in reached:
            yield name, each(reached[name], lambda case, n, rule=rule: case.captum(n, rule))
    by_default = goal.title == DEFAULT
    for suffix, title in FORMATS.items() if ADAPTIVE in reached else ():
        yield (
            f"{title}, adaptive",
            each(
                reached[ADAPTIVE],
                lambda case, n, suffix=suffix: case.ours(served, suffix, None if by_default else _adaptive(n)),
            ),
        )
    for name, rule in FIXED.items():
        if name in reached:
            yield (
                name.replace("Captum", "ONNX"),
                each(
                    reached[name],
                    lambda case, n, rule=rule: case.ours(
                        served, "onnx", IntegratedGradients(step_count=n, quadrature=rule)
                    ),
                ),
            )


def _medians(curves: Sequence[dict[str, Curve]]) -> dict[str, Curve]:
    return {
        name: [
            (points[0][0], float(np.median([error for _, error in points])))
            for points in zip(*(own[name] for own in curves), strict=True)
        ]
        for name in curves[0]
    }


# --- models and the cache --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """How much is measured, and where the cache lies."""

    rounds: int
    images: int
    reference: int
    cache: Path


def model_name(net: str, suffix: str) -> str:
    """The name under which a network is served in a format."""
    return f"{_slug(net)}-{suffix}"


def _slug(net: str) -> str:
    return net.lower().replace("/", "-")


def cache_folder() -> Path:
    """Holds what follows from the sources of the networks and of torch; another folder when they change."""
    sources = b"".join((HERE / name).read_bytes() for name in ("networks.py", "trained.py"))
    folder = HERE / "cache" / hashlib.sha256(sources + torch.__version__.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def served_folder(name: str, net: nn.Module, cache: Path, **options: Any) -> Path:
    """A model folder with the network in every format, exported once."""
    for suffix in FORMATS:
        folder = cache / f"models-{_slug(name)}" / model_name(name, suffix)
        if not (folder / "done").exists():
            print(f"exporting {name} as {FORMATS[suffix]}", flush=True)
            networks.write_model(net, suffix, folder, SIDE, **options)
            (folder / "done").touch()
    return folder.parent


# --- measuring and writing -------------------------------------------------------------------------------------------


def measure_rows(run: Run, threads: int, step_count: int) -> dict[str, RowTimes]:
    """Per network with random weights."""
    measured = {}
    for name, build in RANDOM_NETS.items():
        net = build()
        folder = served_folder(name, net, run.cache)
        with serving(folder, threads, run.cache / "server.log") as served:
            measured[name] = time_per_row(served, name, net, run.rounds, step_count)
        print("\n".join(row_lines({name: measured[name]})), flush=True)
    return measured


def measure_errors(run: Run, threads: int) -> dict[str, ErrorTimes]:
    """Per trained network."""
    measured = {}
    options = {"classes": trained.CLASS_COUNT, "mean": trained.LEVEL, "std": trained.CONTRAST}
    for name in trained.RECIPES:
        net, accuracy = trained.load_or_train(name, run.cache)
        folder = served_folder(name, net, run.cache, **options)
        with serving(folder, threads, run.cache / "server.log") as served:
            measured[name] = time_to_error(served, name, net, accuracy, run)
        print("\n".join(error_lines(name, measured[name])), flush=True)
    return measured


def row_lines(measured: dict[str, RowTimes]) -> list[str]:
    """A table: one line per network and contestant."""
    lines = [
        "| network | contestant | ms per row: median (min to max) | processor ms per row | time / Captum's |",
        "|---|---|---|---|---|",
    ]
    for name, rows in measured.items():
        peer = rows.times["Captum"]
        for title, times in rows.times.items():
            shown = f"{title}, {_layout(rows.channels_last)}" if title == "Captum" else title
            per_row = 1000 / rows.step_count
            wall = f"{times.median * per_row:.0f} ({min(times.wall) * per_row:.0f} to {max(times.wall) * per_row:.0f})"
            cpu = f"{times.median_cpu * per_row:.0f}"
            lines.append(f"| {name} | {shown} | {wall} | {cpu} | {_ratio(times, peer)} |")
    return lines


def error_lines(name: str, measured: ErrorTimes) -> list[str]:
    """Two tables: errors by rows, and times to the same error."""
    scores = ", ".join(f"{low:.3f} to {high:.3f}" for low, high in measured.scores)
    grid = [str(n) for n in GRID]
    lines = [
        f"### {name.capitalize()}",
        "",
        f"Accuracy on held-out digits {measured.accuracy:.3f}; probability from baseline to picture: {scores}.",
        f"Captum in {_layout(measured.channels_last)} memory.",
        "",
        f"| median error by rows | {' | '.join(grid)} |",
        "|---" * (len(grid) + 1) + "|",
    ]
    for rule, curve in measured.curves.items():
        found = dict(curve)
        cells = [f"{found[n]:.4f}" if n in found else "" for n in GRID]
        lines.append(f"| {rule.removeprefix('Captum, ')} | {' | '.join(cells)} |")
    lines += [
        "",
        "| to the error of | that is | contestant | rows per picture | ms per map: median (min to max) "
        "| processor ms | time / Captum's default | / Captum's midpoint |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for goal in measured.goals:
        lines += _goal_lines(goal)
    return [*lines, ""]


def _goal_lines(goal: Goal) -> Iterator[str]:
    count = len(goal.errors)
    errors = ", ".join(f"{error:.4f}" for error in goal.errors) if goal.title == DEFAULT else f"{goal.errors[0]}"
    for name, times in goal.times.items():
        rule = ADAPTIVE if ADAPTIVE in name else f"Captum, {name.partition(', ')[2]}"
        wall = [seconds / count * 1000 for seconds in times.wall]
        shown = f"{np.median(wall):.0f} ({min(wall):.0f} to {max(wall):.0f})"
        cells = [goal.title, errors, name, ", ".join(map(str, goal.rows[rule])), shown]
        cells.append(f"{times.median_cpu / count * 1000:.0f}")
        cells += [_ratio(times, goal.times[peer]) if peer in goal.times else "not reached" for peer in FIXED]
        yield f"| {' | '.join(cells)} |"


def _ratio(times: Times, peer: Times) -> str:
    """Of medians, and of the fastest runs."""
    return f"{times.median / peer.median:.2f} ({times.fastest / peer.fastest:.2f})"


def _layout(channels_last: bool) -> str:
    return "channels-last" if channels_last else "contiguous"


def machine_lines(threads: int, others_share: float) -> list[str]:
    """What it ran on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    libraries = ("torch", "captum", "onnxruntime", "onnx", "grpcio", "protobuf", "numpy")
    return [
        f"Machine: {len(os.sched_getaffinity(0))} cores, {platform.machine()}, {memory:.0f} GiB; {threads} threads for",
        f"everyone. Other processes took {others_share:.0%} of the processor meanwhile.",
        f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in libraries) + ".",
    ]


def report(
    rows: dict[str, RowTimes], errors: dict[str, ErrorTimes], run: Run, threads: int, others_share: float
) -> str:
    """The markdown page."""
    lines = [
        "# Beside Captum",
        "",
        "Written by `benchmarks/against_captum.py`. Ours: a server process and a client, over gRPC on loopback,",
        "figures and score path included. Captum: in process, frozen parameters, as many rows per batch as our server",
        f"({BATCH_ROWS}). Runs in turn, {run.rounds} of each. Processor time is of both processes and all threads.",
        "Ratios are of medians and, in brackets, of the fastest runs.",
        "",
        *machine_lines(threads, others_share),
        "",
    ]
    if rows:
        lines += ["## Time per row", "", "Random weights, 224x224, midpoint rule, one picture, class logit.", ""]
        lines += [*row_lines(rows), ""]
    if errors:
        lines += [
            "## Time to the same map error",
            "",
            "Trained on two-digits pictures enlarged to 224x224; probability of the most probable class of",
            f"the {run.images} two-digit pictures of the demo that the network is most certain of, so that the score",
            "saturates; gray baseline. Error: relative L2 of the whole map to a reference of",
            f"{run.reference} midpoints. Rows that a rule needs are read from its curve, straight in logarithms",
            f"between points, per picture. `{DEFAULT}` is what the service does when nothing is asked: everyone must",
            "reach the error that it reached.",
            "",
        ]
        for name, measured in errors.items():
            lines += error_lines(name, measured)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contestant that count")
    parser.add_argument("--steps", type=int, default=32, help="rows of one map in the time per row")
    parser.add_argument("--images", type=int, default=3, help="pictures of the time to the same error")
    parser.add_argument("--reference", type=int, default=1024, help="points of the reference")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", choices=("rows", "error"), help="one of the two parts")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "against_captum.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = Run(arguments.rounds, arguments.images, arguments.reference, cache_folder())
    started = Occupation.now()
    rows = {} if arguments.only == "error" else measure_rows(run, arguments.threads, arguments.steps)
    errors = {} if arguments.only == "rows" else measure_errors(run, arguments.threads)
    page = report(rows, errors, run, arguments.threads, Occupation.now().others_share(started))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
