"""Rows per second on a GPU: our three formats in every precision, beside Captum's eager float32 and the device's floor.

    python benchmarks/gpu.py                                 # on cuda:0
    python benchmarks/gpu.py --device cuda:1 resnet50        # some models, as `run.py` takes them
    python benchmarks/gpu.py --device cpu --quick mine.pt    # the same code on the CPU, to see that it runs

At equal numbers of steps and at equal error of the map. Ours is the explainer in process, with its scheduler; Captum
and ours run in turn, each in a process of its own. The error is the relative L2 distance of the whole map to Captum's
with many midpoints. Writes `benchmarks/results/gpu.md`; on the CPU, to `benchmarks/cache`.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import floor
from contestants import CAPTUM_RULES, Ask, InProcess, Rule, Worker, captum_of, worker
from curves import COARSE, COARSE_REFERENCE, Accuracy, kept
from machine import Occupation, machine_lines
from serving import serving
from subjects import FORMATS, Subject, Task, cache_folder, module_of, subject, task

HERE = Path(__file__).parent
STANDARD = ("resnet50", "vit_small", "convolutional-28", "transformer-28")
PRECISIONS = {
    "onnx": ("float32", "tf32", "float16"),
    "pt2": ("float32", "tf32", "bfloat16", "float16"),
    "pt": ("float32", "tf32", "bfloat16", "float16"),
}
QUICK_GRID, QUICK_REFERENCE = (4, 8, 16, 32), 64
"""Steps of Captum's curves, and of the map that errors are distances to."""

HEADER = (
    "model",
    "format",
    "precision",
    "ours",
    "ours, rows/s",
    "Captum, rows/s",
    "ours / Captum at equal steps",
    "error",
    "rows to it: Captum / ours",
    "ours / Captum at equal error",
    "floor, rows/s: arithmetic / traffic",
    "ours / floor",
)


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        steps: of a map at equal steps.
        rounds: that count.
    """

    steps: int
    rounds: int
    grid: Sequence[int]
    reference: int
    work: floor.Extent


FULL = Extent(256, 7, COARSE, COARSE_REFERENCE, floor.LARGE)
QUICK = Extent(8, 2, QUICK_GRID, QUICK_REFERENCE, floor.SMALL)


# --- one line --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Duel:
    """Ours in one format and precision, and Captum.

    Attributes:
        seconds: least time of a row by arithmetic, and by traffic.
    """

    title: tuple[str, str, str]
    ours: Worker
    captum: Worker
    task: Task
    accuracy: Accuracy
    seconds: tuple[float, float]
    extent: Extent

    def cells(self) -> Iterator[str]:
        """Of the table."""
        steps = self.extent.steps
        ours, theirs = self._times(Rule("midpoint", steps), Rule("midpoint", steps))
        yield from (*self.title, self.ours.get("description"))
        yield from (f"{steps / np.median(times):.0f}" for times in (ours, theirs))
        yield _ratio(theirs, ours)
        yield from self._at_equal_error()
        yield " / ".join(f"{1 / seconds:.0f}" for seconds in self.seconds)
        yield f"{max(self.seconds) * steps / np.median(ours):.2f}"

    def _at_equal_error(self) -> Iterator[str]:
        """The error of our default, the rows to it, and the ratio of times."""
        ((maps, rows),) = self.ours.explain([self._ask(Rule("adaptive"))])
        error = self.accuracy.error(maps[0])
        reached = {rule: count for rule in CAPTUM_RULES if (count := self.accuracy.rows_to(error, rule)) is not None}
        if not reached:
            yield from (f"{error:.3f}", f"not reached / {rows}", "—")
            return
        rule = min(reached, key=lambda rule: reached[rule])
        ours, theirs = self._times(Rule("adaptive"), Rule(rule, reached[rule]))
        yield from (f"{error:.3f}", f"{reached[rule]} / {rows}", _ratio(theirs, ours))

    def _times(self, ours: Rule, theirs: Rule) -> tuple[list[float], list[float]]:
        """Seconds of a map, in turn, after a round that does not count."""
        found: tuple[list[float], list[float]] = ([], [])
        for _ in range(self.extent.rounds + 1):
            found[0].append(self.ours.measured([self._ask(ours)]).wall)
            found[1].append(self.captum.measured([self._ask(theirs)]).wall)
        return found[0][1:], found[1][1:]

    def _ask(self, rule: Rule) -> Ask:
        return Ask(self.task.instances[:1], self.task.targets[:1], rule)


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> str:
    """How many times faster we are, median (least to most) of neighbouring runs."""
    ratios = np.array(theirs) / np.array(ours)
    return f"**{np.median(ratios):.2f}** ({ratios.min():.2f} to {ratios.max():.2f})"


# --- one model -------------------------------------------------------------------------------------------------------


def measure(word: str, cache: Path, device: str, threads: int, extent: Extent) -> Iterator[str]:
    """Lines of one model; formats and precisions that are refused are told on standard output."""
    found = subject(word, cache, tuple(FORMATS))
    net = module_of(found, cache)
    if net is None:
        raise SystemExit(f"{word}: Captum has no module to run; give a .pt or .pt2 file after a comma")
    with serving(found.folder / found.formats[0], threads, cache / "server.log") as served:
        asked = task(found, served.client, 1)
    work = floor.work_of(net, torch.from_numpy(asked.instances[0]))
    with worker(partial(captum_of, device=_torch_device(device)), found, asked, threads=threads) as captum:
        print(f"{found.name}, Captum: {captum.get('description')}", flush=True)
        place = kept(cache, found, asked, 0)
        accuracy = Accuracy(place, asked, 0, captum, extent.grid, extent.reference)
        for file_format in found.formats:
            for precision in PRECISIONS[file_format]:
                title = (found.name, FORMATS[file_format], precision)
                own = in_precision(found, file_format, precision, cache)
                with ExitStack() as stack:
                    try:
                        ours = stack.enter_context(
                            worker(partial(InProcess, device=device), own, asked, threads=threads)
                        )
                    except RuntimeError as refusal:
                        print(f"{', '.join(title)}: {refusal}", flush=True)
                        continue
                    peak = floor.peak_of(_torch_device(device), precision, extent.work)
                    seconds = peak.seconds(work, precision)
                    line = Duel(title, ours, captum, asked, accuracy, seconds, extent)
                    yield _line(tuple(line.cells()))


def in_precision(found: Subject, file_format: str, precision: str, cache: Path) -> Subject:
    """The same model with another precision in its model.toml."""
    folder = cache / "precisions" / precision
    source, copied = found.folder / file_format / found.name, folder / file_format / found.name
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(source, copied)
    config = copied / "model.toml"
    stated = config.read_text(encoding="utf-8").splitlines() if config.exists() else []
    others = [line for line in stated if not line.startswith("precision")]
    config.write_text("\n".join((f'precision = "{precision}"', *others)), encoding="utf-8")
    return Subject(found.name, folder, (file_format,), found.module)


def _torch_device(device: str) -> str:
    """TensorRT computes where CUDA does."""
    return device.replace("tensorrt", "cuda")


# --- all models ------------------------------------------------------------------------------------------------------


def page(command: str, device: str, others: float, threads: int, lines: Sequence[str]) -> str:
    """The whole page."""
    table = [_line(HEADER), _line(["---"] * len(HEADER)), *lines]
    parts = [
        f"# Rows per second on {_device_name(device)}",
        "",
        f"Written by `{command}`. Ratios above 1: we are faster. The floor is the time for the products of a row at",
        "the peak that torch reaches here in that precision, and for what they read and write at the speed of a copy.",
        "",
        *machine_lines(threads, others),
        "",
        *table,
    ]
    return "\n".join(parts) + "\n"


def _device_name(device: str) -> str:
    if device == "cpu":
        return "the CPU"
    found = torch.cuda.get_device_properties(_torch_device(device))
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, as {device}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(words: Sequence[str] | None = None) -> None:
    """Measures, and writes the page after each line: a run that is stopped has its first ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=STANDARD, help="networks by name, model files, model folders")
    parser.add_argument("--device", default="cuda:0", help="cpu, cuda:N or tensorrt:N")
    parser.add_argument("--quick", action="store_true", help="few steps and runs, and small products for the floor")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="default: results/gpu.md, on the CPU a page in cache/")
    arguments = parser.parse_args(words)
    started, cache = Occupation.now(), cache_folder()
    output = arguments.output or (cache / "gpu.md" if arguments.device == "cpu" else HERE / "results" / "gpu.md")
    command = " ".join(("benchmarks/gpu.py", "--device", arguments.device, *arguments.models))
    lines: list[str] = []
    for word in arguments.models:
        for line in measure(word, cache, arguments.device, arguments.threads, QUICK if arguments.quick else FULL):
            print(line, flush=True)
            lines.append(line)
            others = Occupation.now().others_share(started)
            output.write_text(page(command, arguments.device, others, arguments.threads, lines), encoding="utf-8")


if __name__ == "__main__":
    main()
