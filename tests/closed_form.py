"""A loaded model in numpy with a known gradient, whose evaluation a test can hold, break or spoil."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explainserve.backends import OperatorGap
from explainserve.backends.contract import Collect, Compilation
from explainserve.backends.probe import ProbeResult
from explainserve.model_config import ModelConfig
from explainserve.plan import STANDARD, Differentiation, Rows, Segment, SegmentEvaluation, Selector
from explainserve.served_model import ServedModel
from explainserve.signature import Axis, InputSpec, Layer, OutputSpec, ScoreHead, Signature

WEIGHTS = np.array([[0.5, -1.0], [1.5, 0.25], [-0.75, 2.0]])
FORWARD = Differentiation("y", ScoreHead.IDENTITY)
GRADIENT = Differentiation("y", ScoreHead.IDENTITY, ("x",))
PATIENCE = 20.0


class ClosedForm:
    """y = tanh(x @ WEIGHTS): x of three elements, y of two.

    Attributes:
        batches: rows of each evaluation so far.
        seen: alphas of each evaluation so far.
        selector_counts: selectors of the segments of each evaluation so far.
        failure: raised by the next evaluations where it is set.
        spoiled: value that replaces the scores where it is set.
        holds_after: gradient rows after which further ones wait for `gate`; None: they never do.
    """

    backend = "closed_form"
    gradient_mode = "autograd"
    device = "cpu"
    execution = ""
    runs_ahead = False
    fixed_batch = False
    gaps: tuple[OperatorGap, ...] = ()
    layers: tuple[Layer, ...] = ()
    gradient_rules: Mapping[str, str] = {STANDARD.name: ""}
    layers_refusal = "it has none"
    library_versions: Mapping[str, str] = {}
    compilation: Compilation | None = None
    signature = Signature(
        (InputSpec("x", np.dtype(np.float32), (Axis("batch"), Axis("", 3))),),
        (OutputSpec("y", np.dtype(np.float32), (Axis("batch"), Axis("", 2))),),
    )

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.seen: list[list[float]] = []
        self.selector_counts: list[int] = []
        self.failure: Exception | None = None
        self.spoiled: float | None = None
        self.holds_after: int | None = None
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.gradient_rows = 0
        self.backward_count = 0
        self.forward_rows = 0

    def peak_bytes(self, rows: Rows) -> int | None:
        return None

    def interrupt(self) -> None:
        """A held evaluation cannot be ended, like one of torch."""

    def rule_gap(self, rule: str) -> str:
        return ""

    def evaluate(self, rows: Rows) -> tuple[SegmentEvaluation, ...]:
        if rows.function.wrt and self.holds_after is not None and self.gradient_rows >= self.holds_after:
            self.entered.set()
            assert self.gate.wait(PATIENCE), "nobody opened the gate"
        self.batches.append(rows.row_count)
        self.seen.append([float(a) for segment in rows.segments for a in segment.alphas])
        self.selector_counts.append(len(rows.passes))
        if rows.function.wrt:
            self.gradient_rows += rows.row_count
            self.backward_count += sum(segment.backward_count for segment in rows.segments)
        else:
            self.forward_rows += rows.row_count
        if self.failure is not None:
            raise self.failure
        return tuple(part for segment in rows.segments for part in self._parts(segment))

    def submit(self, rows: Rows) -> Collect:
        return lambda: self.evaluate(rows)

    def _parts(self, segment: Segment) -> Iterator[SegmentEvaluation]:
        start, end = (np.asarray(side["x"], np.float64) for side in (segment.start, segment.end))
        alphas = segment.alphas[:, None]
        y = value((1 - alphas) * start + alphas * end)
        if self.spoiled is not None:
            y = np.full_like(y, self.spoiled)
        if not segment.selectors:
            yield SegmentEvaluation(np.empty(0), outputs=y.astype(np.float32))
        for selector in segment.selectors:
            weights = np.zeros(2)
            np.add.at(weights, selector.indices, selector.weights)
            gradients = ((1 - y**2) * weights) @ WEIGHTS.T
            yield SegmentEvaluation(y @ weights, {"x": (segment.weights @ gradients).astype(np.float32)})


def value(x: NDArray[Any]) -> NDArray[np.float64]:
    """y at rows of x, float64."""
    return np.asarray(np.tanh(x.astype(np.float64) @ WEIGHTS))


def exact_attribution(x: NDArray[Any], baseline: NDArray[Any], index: int) -> NDArray[np.float64]:
    """Integrated Gradients in closed form: a ridge function shares its change in proportion to w (x - x')."""
    step = WEIGHTS[:, index] * (x.astype(np.float64) - baseline)
    change = value(x)[index] - value(np.asarray(baseline))[index]
    return np.asarray(step / step.sum() * change)


def served(loaded: ClosedForm, name: str = "closed", max_batch_rows: int = 4, device: str = "cpu") -> ServedModel:
    """The model as the repository would hand it out."""
    return ServedModel(
        name=name,
        version=1,
        device=device,
        path=Path("model.onnx"),
        file_bytes=0,
        sha256="0" * 64,
        format="onnx",
        config=ModelConfig(),
        loaded=loaded,
        probe=ProbeResult(rows_independent=True, noise_floor=0.0),
        max_batch_rows=max_batch_rows,
    )


def path(row_count: int, *, index: int = 0, offset: float = 0.0) -> Segment:
    """Gradient rows from zero to one, weighted alike."""
    alphas = (np.arange(row_count) + 0.5 + offset) / row_count
    ends = {"x": np.zeros(3, np.float32)}, {"x": np.ones(3, np.float32)}
    selector = Selector(np.array([index], np.int64), np.ones(1, np.float32))
    return Segment(*ends, {}, GRADIENT, alphas, np.full(row_count, 1 / row_count), (selector,))
