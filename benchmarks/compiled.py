"""What compiling a `.pt2` model brings: micro-batches with their gradient, compiled and not, in turn.

    python benchmarks/compiled.py NAME=model.pt2... --cache DIR [--rows 1 8 32] [--threads 2] [--seconds 3]

Compiles first, where the cache does not hold the code yet, in a process of its own as a server does; what that takes is
told. Then both forms evaluate the same micro-batches in turn, in one process, for `--seconds` each size. Writes
`benchmarks/results/compiled.md`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from explainserve.backends import torch_export
from explainserve.backends.contract import LoadedModel, LoadOptions
from explainserve.backends.precision import map_error
from explainserve.backends.timing import random_row, repeated
from explainserve.backends.torch_compilation import code_folder, compile_elsewhere
from explainserve.backends.torch_rows import TorchModel
from explainserve.model_config import ModelConfig
from explainserve.plan import Rows
from machine import Occupation, machine_lines

RESULTS = Path(__file__).parent / "results" / "compiled.md"
CONFIG = ModelConfig()
COMPILE_SECONDS = 1200.0


@dataclass(frozen=True)
class Pair:
    """A model in both forms.

    Attributes:
        compile_seconds: in a process of its own; well below a minute where the code was there.
        load_seconds: of the code that is there.
    """

    name: str
    graph: TorchModel
    code: TorchModel
    compile_seconds: float
    load_seconds: float

    @classmethod
    def of(cls, name: str, path: Path, options: LoadOptions) -> Pair:
        """Compiles a model where that was not done before."""
        graph = torch_export.load(path, CONFIG, options)
        assert isinstance(graph, TorchModel)
        options = replace(options, channels_last=graph.channels_last)
        started = time.perf_counter()
        compile_elsewhere(path, CONFIG, options)
        compiled = time.perf_counter()
        code = torch_export.compiled(graph, code_folder(CONFIG, options))
        return cls(name, graph, code, compiled - started, time.perf_counter() - compiled)


@dataclass(frozen=True)
class Comparison:
    """Milliseconds of a micro-batch, of each run in turn."""

    graph: list[float]
    code: list[float]

    @classmethod
    def of(cls, pair: Pair, row_count: int, seconds: float) -> Comparison:
        """Runs both in turn for so long, and thrice at least."""
        rows = repeated(random_row(pair.graph), row_count)
        for model in (pair.graph, pair.code):
            model.evaluate(rows)
        found = cls([], [])
        ends_at = time.perf_counter() + seconds
        while len(found.graph) < 3 or time.perf_counter() < ends_at:
            found.graph.append(milliseconds(pair.graph, rows))
            found.code.append(milliseconds(pair.code, rows))
        return found

    @property
    def cells(self) -> str:
        """Medians with half the span of the middle half, and their ratio."""
        graph, code = median(self.graph), median(self.code)
        return f"{graph:.1f} ± {spread(self.graph):.1f} | {code:.1f} ± {spread(self.code):.1f} | {graph / code:.2f}"


def milliseconds(model: LoadedModel, rows: Rows) -> float:
    """Wall time of one evaluation."""
    started = time.perf_counter()
    model.evaluate(rows)
    return 1e3 * (time.perf_counter() - started)


def spread(values: list[float]) -> float:
    """Half of the interquartile range."""
    ordered = sorted(values)
    return (ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4]) / 2


def lines(pair: Pair, row_counts: list[int], seconds: float) -> list[str]:
    """The rows of the table that tell of one model."""
    error = map_error(pair.code, pair.graph)
    cost = f"{pair.compile_seconds:.0f} | {pair.load_seconds:.0f} | {'—' if error is None else f'{error:.1e}'}"
    return [f"| {pair.name} | {n} | {Comparison.of(pair, n, seconds).cells} | {cost} |" for n in row_counts]


def page(table: list[str], threads: int, others_share: float) -> str:
    """The whole page of results."""
    head = [
        "# Compiled `.pt2` models",
        "",
        "Milliseconds of a micro-batch with its gradient, evaluated in turn: median ± half the interquartile range.",
        "One row alone runs uncompiled in both. Seconds to compile in a process of its own, and to load the code here;",
        "error of whole maps beside the uncompiled model (`execution_map_error`). By `benchmarks/compiled.py`.",
        "",
        "| model | rows | uncompiled ms | compiled ms | times faster | compile s | load s | map error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *table, "", *machine_lines(threads, others_share), ""])


def main() -> None:
    """Measures the models of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    options = LoadOptions(thread_count=asked.threads, cache=asked.cache, compile_seconds=COMPILE_SECONDS)
    named = (text.partition("=") for text in asked.models)
    pairs = [Pair.of(name, Path(file), options) for name, _, file in named]
    began = Occupation.now()
    table = [line for pair in pairs for line in lines(pair, asked.rows, asked.seconds)]
    asked.output.write_text(page(table, asked.threads, Occupation.now().others_share(began)), encoding="utf-8")
    print(asked.output.read_text())


if __name__ == "__main__":
    main()
