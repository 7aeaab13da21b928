"""ONNX models on onnxruntime; gradients come from graphs that `onnx_vjp` builds, so no torch is needed.

Each pair of score head and differentiated inputs is a function of its own, built when it is first asked for: rows
without a gradient never pay for the backward part, and rows of several targets pay once for the forward part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from explainserve.backends import onnx_file, onnx_graph, pattern_file
from explainserve.backends.contract import (
    Collect,
    Compilation,
    LoadedModel,
    LoadOptions,
    Memory,
    OperatorGap,
)
from explainserve.backends.onnx_batch import with_rows
from explainserve.backends.onnx_blocks import state_block_size
from explainserve.backends.onnx_float16 import in_float16
from explainserve.backends.onnx_functions import OnnxFunctions
from explainserve.backends.onnx_providers import require_precision
from explainserve.backends.onnx_rules import OnnxRules
from explainserve.backends.onnx_session import (
    available_device,
    thread_count,
)
from explainserve.backends.onnx_suppression import leave_out_suppressed
from explainserve.backends.onnx_weights import Weights, stored_bytes
from explainserve.backends.probe import (
    free_extents,
    has_free_axes,
    output_rows,
    sample_instances,
)
from explainserve.backends.resident_memory import peak_growth
from explainserve.backends.row_division import Team
from explainserve.backends.timing import least_seconds, random_row, repeated
from explainserve.errors import EvaluationFailed, ModelRefused, Unsupported
from explainserve.model_config import ModelConfig, Precision
from explainserve.onnx_vjp.opset import OLDEST as OLDEST_OPSET
from explainserve.plan import Differentiation, Rows, SegmentEvaluation
from explainserve.signature import Axis, Layer, ScoreHead, Signature, explained_layers

logger = logging.getLogger(__name__)

Array = NDArray[np.generic]
ROWS_PER_THREAD = (2, 4, 8, 16, 32)
"""Numbers of rows for each thread that are timed, in order: rows are divided from the first on that is faster so."""

MOST_TIMED_ROWS = 64
FASTER = 0.95
"""Time, relative to that of all rows at once, below which rows are divided: what else the machine does disturbs."""

LARGEST_TWICE_PACKED = 32 << 20
"""Bytes of weights up to which sessions are opened for single threads too, which pack the weights once more."""


def load(path: Path, config: ModelConfig, options: LoadOptions) -> OnnxModel:
    """Reads an .onnx file.

    Raises:
        ModelRefused: see `onnx_file.read`, `pattern_file.read` and `onnx_graph.signature`; also where onnxruntime
            cannot build the graph (MODEL_NOT_RUNNABLE, OPSET_TOO_OLD), the configuration contradicts it
            (CONFIG_MISMATCH), or the device is missing (DEVICE_UNAVAILABLE) or lacks the precision
            (PRECISION_UNAVAILABLE).
    """
    device = available_device(options)
    require_precision(device, config.precision)
    options = replace(options, device=device, precision=config.precision)
    weights = Weights()
    model = onnx_file.read(path, weights)
    _check_opset(model)
    onnx_graph.name_nodes(model.graph)
    state_block_size(model)
    suppressed = leave_out_suppressed(model)
    declared, bare_outputs = onnx_graph.signature(model, config)
    declared = replace(declared, suppressed=suppressed)
    weights.take(model)
    model, free = with_rows(model, declared, options, weights)
    signature = config.signature(_with_batch_extent(declared, None if free else 1))
    unbatched = bare_outputs | {spec.name for spec in signature.inputs if not spec.batched}
    layers = onnx_graph.layers(model)
    if config.precision is Precision.FLOAT16:
        model, weights = _converted(model, weights, signature)
    fixed = bool(unbatched) or not free
    patterns = pattern_file.read(path)
    explained = signature.differentiable_inputs or explained_layers(layers, config.layers)
    loaded = OnnxModel(model, weights, signature, frozenset(unbatched), fixed, options, layers, patterns, explained)
    loaded.verify()
    loaded.choose_division()
    return loaded


def _converted(model: onnx.ModelProto, weights: Weights, signature: Signature) -> tuple[onnx.ModelProto, Weights]:
    """The model in float16."""
    others = [spec.name for spec in signature.inputs if spec.differentiable and spec.dtype.name != "float32"]
    if others:
        raise ModelRefused(
            "PRECISION_UNAVAILABLE",
            f"{', '.join(others)} is not float32 in the file, which is evaluated as it is; leave the precision out",
            precision=Precision.FLOAT16.value,
        )
    return in_float16(model, weights)


class OnnxModel:
    """A loaded ONNX model; see `contract.LoadedModel`."""

    backend = "onnxruntime"
    runs_ahead = False
    compilation: Compilation | None = None

    def __init__(
        self,
        graph: onnx.ModelProto,
        weights: Weights,
        signature: Signature,
        unbatched: frozenset[str],
        fixed_batch: bool,
        options: LoadOptions,
        layers: tuple[Layer, ...],
        patterns: Mapping[str, NDArray[np.float32]],
        explained: Sequence[str],
    ) -> None:
        """`unbatched` names the inputs and outputs whose arrays in the graph lack the batch axis, `patterns` those of
        linear layers by name; see `OnnxRules` for `explained`.
        """
        self.signature = signature
        self.fixed_batch = fixed_batch
        self.device = options.device
        self.library_versions: Mapping[str, str] = {
            "onnxruntime": onnxruntime.__version__,
            "onnx": onnx.__version__,
        }
        self._weights = weights
        self._held_bytes = weights.byte_count
        self._file_bytes = self._held_bytes + stored_bytes(graph.graph)
        self._options = options
        self._rules = OnnxRules(graph, signature, weights, patterns, options.precision, explained)
        self._functions = OnnxFunctions(graph, weights, signature, unbatched, fixed_batch, options, self._rules)
        self._on_one_thread: OnnxFunctions | None = None
        self._team: Team | None = None
        self.layers = layers
        self.gradient_rules: Mapping[str, str] = self._rules.refusals([layer.name for layer in layers])
        self.layers_refusal = _layers_refusal(unbatched, options.precision)

    @property
    def execution(self) -> str:
        """See `contract.LoadedModel`."""
        if self._team is not None:
            return "divided_rows"
        return {None: "", True: "cuda_graphs", False: "no_cuda_graphs"}[self._functions.records]

    @property
    def gaps(self) -> tuple[OperatorGap, ...]:
        """See `contract.LoadedModel`."""
        return self._functions.gaps

    @property
    def gradient_mode(self) -> str:
        """See `contract.LoadedModel`."""
        return "gradient_graph" if self._functions.differentiable else "black_box"

    def rule_gap(self, rule: str) -> str:
        """See `contract.LoadedModel`."""
        return "" if self._functions.gaps else self._rules.gap(rule)

    def evaluate(self, rows: Rows) -> tuple[SegmentEvaluation, ...]:
        """See `contract.LoadedModel`. Everything about rows is done inside the graph; see `onnx_rows`."""
        self._functions.interruption.begin()
        return tuple(self._evaluations(rows))

    def submit(self, rows: Rows) -> Collect:
        """See `contract.LoadedModel`: onnxruntime returns when it is done."""
        return lambda: self.evaluate(rows)

    def _evaluations(self, rows: Rows) -> list[SegmentEvaluation]:
        """With all threads at each operator, or with some of the rows on each thread."""
        team, alone = self._team, self._on_one_thread
        if team is None or alone is None or rows.row_count < team.least_rows:
            return self._functions.of(rows).evaluations(rows)
        return team.evaluations(rows, alone.of(rows).evaluations)

    def choose_division(self, seconds: Callable[[LoadedModel, Rows], float] = least_seconds) -> None:
        """Divides rows among threads from now on, where that is faster; only of small models, see
        `LARGEST_TWICE_PACKED`.

        Args:
            seconds: measures the evaluation of a micro-batch.
        """
        size = thread_count(self._options) if self.device == "cpu" else 1
        if size == 1 or self.fixed_batch or self._file_bytes > LARGEST_TWICE_PACKED:
            return
        try:
            self._choose_division(size, seconds)
        except EvaluationFailed:  # as of unlucky guesses of free axes
            self._team = self._on_one_thread = None

    def _choose_division(self, size: int, seconds: Callable[[LoadedModel, Rows], float]) -> None:
        row, alone = random_row(self), self._functions.on_one_thread()
        for count in ROWS_PER_THREAD:
            rows = repeated(row, size * count)
            if rows.row_count > MOST_TIMED_ROWS:
                return
            at_once = seconds(self, rows)
            self._team, self._on_one_thread = Team(size, rows.row_count), alone
            if seconds(self, rows) < FASTER * at_once:
                return
            self._team = self._on_one_thread = None

    def peak_bytes(self, rows: Rows) -> int | None:
        """See `contract.LoadedModel`; known on the CPU only. A first evaluation prepares all that is kept for good."""
        if self.device != "cpu":
            return None
        self._functions.interruption.begin_releasing()
        self._evaluations(rows)
        return peak_growth(lambda: self.evaluate(rows))

    def interrupt(self) -> None:
        """See `contract.LoadedModel`."""
        self._functions.interruption.interrupt()

    @property
    def memory(self) -> Memory:
        """See `contract.LoadedModel`."""
        sessions = [own.session_bytes for own in (self._functions, self._on_one_thread) if own is not None]
        known = [count for count in sessions if count is not None]
        return Memory(
            self._file_bytes,
            self._weights.byte_count - self._held_bytes + self._rules.pattern_bytes,
            sum(known) if len(known) == len(sessions) else None,
        )

    def verify(self) -> None:
        """Gives up gradients where the file declares another shape for an output than it computes, and where those of
        its device differ from those on the CPU.
        """
        if not self._functions.differentiable:
            return
        wrt = self.signature.differentiable_inputs
        functions = [Differentiation(name, ScoreHead.IDENTITY, wrt) for name in self.signature.differentiable_outputs]
        gaps = [gap for function in functions for gap in self._misdeclared(function)]
        if not gaps and self.device != "cpu":
            gaps = [gap for function in functions for gap in self._unconfirmed(function)]
        if gaps:
            self._functions.gaps = tuple(gaps)

    def _misdeclared(self, function: Differentiation) -> Iterator[OperatorGap]:
        """The gap of an output whose scores on a random row, where one runs, are not of the declared shape.

        Extents count only where those of the inputs are known: an output may well be declared for others than guessed.
        """
        declared = [axis.size for axis in self.signature.output(function.output).axes[1:]]
        found = self._random_shape(function)
        if found is None:
            return
        guessed = has_free_axes(self.signature)
        if len(found) != len(declared) or not (guessed or all(map(_agree, declared, found))):
            stated = ", ".join("any" if size is None else str(size) for size in declared)
            reason = (
                f"the declared output shape of a row, [{stated}], differs from what the graph computes, {list(found)}"
            )
            yield OperatorGap("", function.output, reason, "declare the output as the graph computes it")

    def _random_shape(self, function: Differentiation) -> tuple[int, ...] | None:
        """Shape of a random row's scores at the first free extents that run; None where none do."""
        for extents in free_extents(self.signature):
            drawn = output_rows(self.signature, sample_instances(self.signature, 1, extents))
            rows = next(rows for rows in drawn if rows.function.output == function.output)
            try:
                return self._functions.at_once(rows.function).scores(rows).shape[1:]
            except EvaluationFailed:
                continue
        return None

    def _unconfirmed(self, function: Differentiation) -> Iterator[OperatorGap]:
        """The gap of an output whose gradient does not run on the device as it does on the CPU."""
        try:
            self._functions.at_once(function)
        except Unsupported as refusal:
            yield OperatorGap("gradient graph", function.output, refusal.message, "serve the model on the CPU")


def _layers_refusal(unbatched: Collection[str], precision: Precision) -> str:
    if precision is Precision.FLOAT16:
        return "the model is evaluated in float16; serve it in float32"
    return f"{', '.join(sorted(unbatched))} has no batch axis; export the model with one" if unbatched else ""


def _agree(declared: int | None, found: int) -> bool:
    return declared is None or declared == found


def _check_opset(model: onnx.ModelProto) -> None:
    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), OLDEST_OPSET)
    if version < OLDEST_OPSET:
        raise ModelRefused(
            "OPSET_TOO_OLD",
            f"the model uses operator set {version}; {OLDEST_OPSET} is the oldest that is evaluated",
            version=version,
        )


def _with_batch_extent(declared: Signature, extent: int | None) -> Signature:
    """States the extent of the batch axis that the loaded model accepts: 1, or None for any."""
    inputs = tuple(
        replace(spec, axes=(Axis(spec.axes[0].name, extent), *spec.axes[1:])) if spec.batched else spec
        for spec in declared.inputs
    )
    outputs = tuple(replace(spec, axes=(Axis(spec.axes[0].name, extent), *spec.axes[1:])) for spec in declared.outputs)
    return replace(declared, inputs=inputs, outputs=outputs)
