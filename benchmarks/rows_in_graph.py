"""What interpolating, seeding and summing cost beside the model: by numpy on the host, and in the ONNX graph itself.

    python benchmarks/rows_in_graph.py [--rows 1 4 16 64] [--seconds 1]

Same process, same threads, in turn. The model is linear with ten scores, so that what happens around it shows; its own
time, measured on batches and cotangents that are there already, is taken off. Micro-batches are of two kinds: all rows
on one segment, as fixed rules have them, and a row per segment with eight segments on a path, as the first round of
the adaptive rule has them. Writes `benchmarks/results/rows_in_graph.md`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from explainserve.backends import onnx_graph, onnx_runtime
from explainserve.backends.contract import LoadedModel, LoadOptions
from explainserve.backends.onnx_session import open_session
from explainserve.model_config import ModelConfig
from explainserve.onnx_vjp import input_gradient
from explainserve.plan import Differentiation, Rows, Segment, Selector
from explainserve.signature import ScoreHead
from machine import Occupation, machine_lines

HERE = Path(__file__).parent
SHAPES = {"28x28x1": (1, 28, 28), "224x224x3": (3, 224, 224)}
CLASSES = 10
SEGMENTS_PER_PATH = 8
FUNCTION = Differentiation("y", ScoreHead.IDENTITY, ("x",))
MARGIN = Selector(np.array([3, 7]), np.array([1.0, -1.0], np.float32))

Array = NDArray[Any]
Shape = tuple[int, ...]


# --- micro-batches ---------------------------------------------------------------------------------------------------


def one_segment(shape: Shape, count: int) -> Rows:
    """All rows on one segment."""
    start, end = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    return Rows(FUNCTION, (_segment(start, end, (np.arange(count) + 0.5) / count),))


def one_row_segments(shape: Shape, count: int) -> Rows:
    """A row per segment, up to eight of them on one path."""
    random = np.random.default_rng(0)
    paths = [random.standard_normal((2, *shape)).astype(np.float32) for _ in range(0, count, SEGMENTS_PER_PATH)]
    ends = [tuple(path) for path in paths]
    alphas = [(row % SEGMENTS_PER_PATH + 0.5) / SEGMENTS_PER_PATH for row in range(count)]
    return Rows(
        FUNCTION,
        tuple(_segment(*ends[row // SEGMENTS_PER_PATH], np.array([alpha])) for row, alpha in enumerate(alphas)),
    )


KINDS: Mapping[str, Callable[[Shape, int], Rows]] = {
    "one segment": one_segment,
    "a row per segment": one_row_segments,
}


def _segment(start: Array, end: Array, alphas: NDArray[np.float64]) -> Segment:
    return Segment({"x": start}, {"x": end}, {}, FUNCTION, alphas, np.full(len(alphas), 1 / len(alphas)), (MARGIN,))


def segment_bytes(rows: Rows) -> int:
    """What crosses to a device and back where the graph works on segments: distinct ends, and sums."""
    arrays = [array for segment in rows.segments for array in (segment.start["x"], segment.end["x"])]
    distinct = {id(array): array.nbytes for array in arrays}
    return sum(distinct.values()) + len(rows.segments) * arrays[0].nbytes


def row_bytes(rows: Rows) -> int:
    """What crosses where the host does: each row and its gradient."""
    return 2 * rows.row_count * rows.segments[0].end["x"].nbytes


# --- the two ways ----------------------------------------------------------------------------------------------------


def linear(shape: Shape) -> onnx.ModelProto:
    """Ten scores, each a weighted sum of the input."""
    weights = np.random.default_rng(1).standard_normal((int(np.prod(shape)), CLASSES)).astype(np.float32)
    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["y"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", CLASSES])
    graph = helper.make_graph(nodes, "linear", [x], [y], [numpy_helper.from_array(weights, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


class OnHost:
    """Numpy makes batches and cotangents and sums the gradients of all rows, which onnxruntime returns."""

    def __init__(self, shape: Shape, options: LoadOptions) -> None:
        gradient = input_gradient(linear(shape), ["x"], "y")
        self.cotangent = gradient.cotangent
        self.session = open_session(onnx_graph.with_outputs(gradient.model, ["y", gradient.gradients["x"]]), options)

    def evaluate(self, rows: Rows) -> list[Array]:
        """The sum of each segment."""
        scores, gradients = self.session.run(None, self.feeds(rows))
        return [self._sum(segment, scores[span], gradients[span]) for segment, span in _spans(rows)]

    def feeds(self, rows: Rows) -> dict[str, Array]:
        """Batch and cotangent."""
        batch = np.empty((rows.row_count, *rows.segments[0].end["x"].shape), np.float32)
        cotangent = np.zeros((rows.row_count, CLASSES), np.float32)
        for segment, span in _spans(rows):
            cotangent[span, MARGIN.indices] = MARGIN.weights
            for row, alpha in enumerate(segment.alphas, span.start):
                point = np.multiply(segment.end["x"], alpha, dtype=np.float32)
                point += np.multiply(segment.start["x"], 1.0 - alpha, dtype=np.float32)
                batch[row] = point
        return {"x": batch, self.cotangent: cotangent}

    def _sum(self, segment: Segment, scores: Array, gradients: Array) -> Array:
        scores[:, MARGIN.indices].astype(np.float64) @ MARGIN.weights.astype(np.float64)
        used = np.flatnonzero(segment.weights)
        total: Array = segment.weights[used].astype(np.float32) @ gradients.reshape(segment.row_count, -1)
        return total.reshape(gradients.shape[1:])


def in_graph(shape: Shape, options: LoadOptions) -> LoadedModel:
    """The model as the service evaluates it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(linear(shape), path)
        return onnx_runtime.load(path, ModelConfig(), options)


def _spans(rows: Rows) -> Iterator[tuple[Segment, slice]]:
    first = 0
    for segment in rows.segments:
        yield segment, slice(first, first + segment.row_count)
        first += segment.row_count


# --- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Wall seconds of one micro-batch, all runs of each contestant."""

    shape: str
    kind: str
    rows: Rows
    seconds: Mapping[str, list[float]]

    def beside(self, way: str, of: Callable[[list[float]], float]) -> float:
        """Milliseconds per row beside the model itself."""
        return 1e3 * (of(self.seconds[way]) - of(self.seconds["model"])) / self.rows.row_count


def timings(counts: list[int], seconds: float, options: LoadOptions) -> Iterator[Timing]:
    """Measures every shape, kind and number of rows."""
    for name, shape in SHAPES.items():
        host, graph = OnHost(shape, options), in_graph(shape, options)
        for kind, make in KINDS.items():
            for count in counts:
                rows = make(shape, count)
                _check(host.evaluate(rows), graph, rows)
                yield Timing(name, kind, rows, _in_turn(_contestants(host, graph, rows), seconds))


def _contestants(host: OnHost, graph: LoadedModel, rows: Rows) -> dict[str, Callable[[], Any]]:
    ready = host.feeds(rows)
    return {
        "model": lambda: host.session.run(None, ready),
        "host": lambda: host.evaluate(rows),
        "graph": lambda: graph.evaluate(rows),
    }


def _check(expected: list[Array], graph: LoadedModel, rows: Rows) -> None:
    for found, total in zip(graph.evaluate(rows), expected, strict=True):
        np.testing.assert_allclose(found.gradient_sums["x"], total, rtol=1e-4, atol=1e-4)


def _in_turn(contestants: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["model"]) < 5:
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return times


# --- the page --------------------------------------------------------------------------------------------------------


def page(measured: list[Timing], threads: int, others_share: float) -> str:
    """The results as Markdown."""
    lines = [
        "# Rows inside the ONNX graph",
        "",
        "Written by `benchmarks/rows_in_graph.py`. Milliseconds per row beside the model itself, least (median), of",
        "interpolating, seeding, weighting and summing: by numpy on the host, and inside the graph that onnxruntime",
        "runs, all overhead per micro-batch included. Crossing: MiB per micro-batch, to a device and back together.",
        "With few rows of a small input, what a micro-batch costs at least shows: some twenty small operators.",
        "",
        *machine_lines(threads, others_share),
        "",
        "| input | micro-batch | rows | host | graph | graph / host | crossing, host | crossing, graph |",
        "|---|---|---|---|---|---|---|---|",
        *map(_line, measured),
        "",
    ]
    return "\n".join(lines)


def _line(timing: Timing) -> str:
    host, graph = ((timing.beside(way, min), timing.beside(way, _median)) for way in ("host", "graph"))
    crossing = [f"{count(timing.rows) / 2**20:.3g}" for count in (row_bytes, segment_bytes)]
    cells = [timing.shape, timing.kind, timing.rows.row_count]
    cells += [f"{least:.3f} ({median:.3f})" for least, median in (host, graph)]
    return "| " + " | ".join(map(str, [*cells, f"{graph[0] / host[0]:.2f}", *crossing])) + " |"


def _median(values: list[float]) -> float:
    return float(np.median(values))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring, per micro-batch")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "rows_in_graph.md")
    arguments = parser.parse_args()
    started = Occupation.now()
    measured = []
    for timing in timings(arguments.rows, arguments.seconds, LoadOptions(thread_count=arguments.threads)):
        measured.append(timing)
        print(_line(timing), flush=True)
    text = page(measured, arguments.threads, Occupation.now().others_share(started))
    arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
