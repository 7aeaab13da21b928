"""ONNX models on onnxruntime; gradients come from graphs that `onnx_vjp` builds, so no torch is needed.

Each pair of score head and differentiated inputs is a function of its own, built when it is first asked for: rows
without a gradient never pay for the backward part, and rows of several targets pay once for the forward part.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from explainserve.backends import onnx_file, onnx_graph, pattern_file
from explainserve.backends.contract import (
    NO_RECTIFIERS,
    Collect,
    LoadedModel,
    LoadOptions,
    Memory,
    OperatorGap,
    layer_not_on_path,
    no_value_range,
    not_differentiable,
    unknown_layer,
)
from explainserve.backends.gradient_cache import GradientCache, cache_key
from explainserve.backends.kept_functions import KeptFunctions
from explainserve.backends.onnx_batch import with_rows
from explainserve.backends.onnx_binding import RUNS_UNTIL_REPLAY, BoundPasses
from explainserve.backends.onnx_blocks import state_block_size
from explainserve.backends.onnx_float16 import in_float16
from explainserve.backends.onnx_function import OnnxFunction
from explainserve.backends.onnx_passes import Passes, SplitPasses, WholePasses
from explainserve.backends.onnx_providers import provider_of, require_precision
from explainserve.backends.onnx_rows import MULTIPLYING, RowGraph, unused_prefix
from explainserve.backends.onnx_session import (
    Interruption,
    available_device,
    memory_of,
    open_session,
    thread_count,
)
from explainserve.backends.onnx_subnormal import flush_subnormals
from explainserve.backends.onnx_suppression import leave_out_suppressed
from explainserve.backends.onnx_verification import LARGEST_DIFFERENCES, largest_difference
from explainserve.backends.onnx_weights import Weights, stored_bytes
from explainserve.backends.probe import (
    FreeExtents,
    free_extents,
    gradient_rows,
    has_free_axes,
    output_rows,
    sample_instances,
)
from explainserve.backends.resident_memory import peak_growth, resident_bytes
from explainserve.backends.row_division import Team
from explainserve.backends.row_feeds import joined, single_rows
from explainserve.backends.timing import least_seconds, random_row, repeated
from explainserve.errors import EvaluationFailed, InvalidRequest, ModelRefused, Unsupported
from explainserve.model_config import ModelConfig, Precision
from explainserve.onnx_vjp import (
    BOX_RULES,
    FIRST_LAYER_RULES,
    GRADIENT_RULES,
    LRP_RULES,
    PATTERN_RULES,
    RECTIFIER_RULES,
    Gap,
    GradientGraph,
    Table,
    UnsupportedOperators,
    append_score_head,
    behind_layers,
    cut,
    find_gaps,
    has_rectifiers,
    input_gradient,
    scaled_gradient,
    split,
)
from explainserve.onnx_vjp.blocked import keep_in_blocks
from explainserve.onnx_vjp.disjoint_windows import unpool_disjoint_windows
from explainserve.onnx_vjp.opset import OLDEST as OLDEST_OPSET
from explainserve.onnx_vjp.routes import dependents
from explainserve.plan import STANDARD, Differentiation, GradientRule, Rows, SegmentEvaluation
from explainserve.signature import Axis, InputSpec, Layer, ScoreHead, Signature

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
    loaded = OnnxModel(model, weights, signature, frozenset(unbatched), fixed, options, layers, patterns)
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
    ) -> None:
        """`unbatched` names the inputs and outputs whose arrays in the graph lack the batch axis, `patterns` those of
        linear layers by name.
        """
        self.signature = signature
        self.fixed_batch = fixed_batch
        self.device = options.device
        self.library_versions: Mapping[str, str] = {
            "onnxruntime": onnxruntime.__version__,
            "onnx": onnx.__version__,
        }
        self._graph = graph
        self._weights = weights
        self._held_bytes = weights.byte_count
        self._file_bytes = self._held_bytes + stored_bytes(graph.graph)
        self._cache = GradientCache(options.cache and options.cache / "gradients")
        self._session_bytes: int | None = 0
        self._unbatched = unbatched
        self._patterns = patterns
        self._options = options
        self._provider = provider_of(options.device)
        self._functions: KeptFunctions[OnnxFunction] = KeptFunctions()
        self._split_functions: KeptFunctions[OnnxFunction] = KeptFunctions()
        self._interruption = Interruption()
        self._team: Team | None = None
        self._on_one_thread: OnnxModel | None = None
        self.gaps = _gaps(graph, signature, weights)
        self.layers = layers
        self.gradient_rules: Mapping[str, str] = self._rules()
        self.layers_refusal = _layers_refusal(unbatched, options.precision)
        self.gradient_mode = "gradient_graph" if self._has_gradient else "black_box"

    @property
    def execution(self) -> str:
        """See `contract.LoadedModel`."""
        if self._team is not None:
            return "divided_rows"
        opened = [function.sessions for function in self._functions.all]
        recording = {sessions.records for sessions in opened if isinstance(sessions, BoundPasses)}
        if not recording or not self._provider.captures:
            return ""
        return "cuda_graphs" if all(recording) else "no_cuda_graphs"

    def evaluate(self, rows: Rows) -> tuple[SegmentEvaluation, ...]:
        """See `contract.LoadedModel`. Everything about rows is done inside the graph; see `onnx_rows`."""
        self._interruption.begin()
        return tuple(self._evaluations(rows))

    def submit(self, rows: Rows) -> Collect:
        """See `contract.LoadedModel`: onnxruntime returns when it is done."""
        return lambda: self.evaluate(rows)

    def _evaluations(self, rows: Rows) -> list[SegmentEvaluation]:
        """With all threads at each operator, or with some of the rows on each thread."""
        team, alone = self._team, self._on_one_thread
        if team is None or alone is None or rows.row_count < team.least_rows:
            return self._at_once(self._function_for(rows), rows)
        return team.evaluations(rows, alone._function_for(rows).evaluations)

    def _at_once(self, function: OnnxFunction, rows: Rows) -> list[SegmentEvaluation]:
        """All rows at once, or one after the other where the file takes one at a time."""
        if not self.fixed_batch or rows.row_count == 1:
            return function.evaluations(rows)
        return [
            joined(parts)
            for segment in rows.segments
            for parts in zip(*(function.evaluations(row) for row in single_rows(segment)), strict=True)
        ]

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
        row, alone = random_row(self), self._with_one_thread()
        for count in ROWS_PER_THREAD:
            rows = repeated(row, size * count)
            if rows.row_count > MOST_TIMED_ROWS:
                return
            at_once = seconds(self, rows)
            self._team, self._on_one_thread = Team(size, rows.row_count), alone
            if seconds(self, rows) < FASTER * at_once:
                return
            self._team = self._on_one_thread = None

    def _with_one_thread(self) -> OnnxModel:
        """The same model, whose sessions have one thread each; to be interrupted with this one."""
        other = copy.copy(self)
        other._options = replace(self._options, thread_count=1)
        other._functions, other._split_functions, other._session_bytes = KeptFunctions(), KeptFunctions(), 0
        other._team = other._on_one_thread = None
        return other

    def peak_bytes(self, rows: Rows) -> int | None:
        """See `contract.LoadedModel`; known on the CPU only. A first evaluation prepares all that is kept for good."""
        if self.device != "cpu":
            return None
        self._interruption.begin_releasing()
        self._evaluations(rows)
        return peak_growth(lambda: self.evaluate(rows))

    def interrupt(self) -> None:
        """See `contract.LoadedModel`."""
        self._interruption.interrupt()

    @property
    def _has_gradient(self) -> bool:
        return not (self.signature.undifferentiable_reason or self.gaps)

    def _function_for(self, rows: Rows) -> OnnxFunction:
        several = len(rows.passes) > 1 and rows.function.wrt and not rows.function.taps
        return self._split_function(rows.function) if several else self._function(rows.function)

    def _function(self, function: Differentiation) -> OnnxFunction:
        return self._functions.get(function, self._gradient if function.wrt else self._forward)

    def _split_function(self, function: Differentiation) -> OnnxFunction:
        """A gradient for rows of several targets: forward and backward apart, or whole where it cannot be parted."""
        return self._split_functions.get(function, self._split_or_whole)

    def _split_or_whole(self, function: Differentiation) -> OnnxFunction:
        try:
            return self._split_gradient(function)
        except (ModelRefused, Unsupported, ValueError) as refusal:
            logger.warning("targets do not share forward passes for %s: %s", function.output, refusal)
            return self._function(function)

    @property
    def memory(self) -> Memory:
        """See `contract.LoadedModel`."""
        sessions = [model._session_bytes for model in (self, self._on_one_thread) if model is not None]
        known = [count for count in sessions if count is not None]
        return Memory(
            self._file_bytes,
            self._weights.byte_count - self._held_bytes,
            sum(known) if len(known) == len(sessions) else None,
        )

    def verify(self) -> None:
        """Gives up gradients where the file declares another shape for an output than it computes, and where those of
        its device differ from those on the CPU.
        """
        if not self._has_gradient:
            return
        wrt = self.signature.differentiable_inputs
        functions = [Differentiation(name, ScoreHead.IDENTITY, wrt) for name in self.signature.differentiable_outputs]
        gaps = [gap for function in functions for gap in self._misdeclared(function)]
        if not gaps and self.device != "cpu":
            gaps = [gap for function in functions for gap in self._unconfirmed(function)]
        if gaps:
            self.gaps, self.gradient_mode = tuple(gaps), "black_box"

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
                return self._function(rows.function).scores(rows).shape[1:]
            except EvaluationFailed:
                continue
        return None

    def _unconfirmed(self, function: Differentiation) -> Iterator[OperatorGap]:
        """The gap of an output whose gradient does not run on the device as it does on the CPU."""
        try:
            self._function(function)
        except Unsupported as refusal:
            yield OperatorGap("gradient graph", function.output, refusal.message, "serve the model on the CPU")

    def _open(
        self, graph: onnx.ModelProto, outputs: Sequence[str], captures: bool = False
    ) -> onnxruntime.InferenceSession:
        if self.device == "cpu":
            flush_subnormals(graph, self._weights.of(graph))
        before = resident_bytes()
        options = replace(self._options, captures=captures)
        session = open_session(onnx_graph.with_outputs(graph, outputs), options, self._weights)
        if before is None or self._session_bytes is None:
            self._session_bytes = None
        else:
            self._session_bytes += max((resident_bytes() or before) - before, 0)
        return session

    def _rules(self) -> dict[str, str]:
        """Every rule, and why the model cannot follow it."""
        if self._options.precision is Precision.FLOAT16:
            return {STANDARD.name: ""}
        unrectified = "" if has_rectifiers(self._graph) else NO_RECTIFIERS
        unbounded = no_value_range(self.signature)
        of_lrp = self._first_gap("lrp_epsilon")
        return {
            STANDARD.name: "",
            "deeplift_rescale": self._first_gap("deeplift_rescale"),
            **dict.fromkeys(RECTIFIER_RULES, unrectified),
            **dict.fromkeys(LRP_RULES, of_lrp),
            **dict.fromkeys(BOX_RULES, of_lrp or unbounded),
            **dict.fromkeys(PATTERN_RULES, self._first_gap("pattern_net") if self._patterns else pattern_file.MISSING),
        }

    def _first_gap(self, rule: str) -> str:
        """Of a rule that not every operator has, or ""; known between inputs and outputs only."""
        if not self._has_gradient:
            return ""
        wrt, weights = self.signature.differentiable_inputs, self._weights.of(self._graph)
        output = self.signature.differentiable_outputs[0]
        try:
            gaps = find_gaps(self._graph, wrt, output, rules=self._table(GradientRule(rule), wrt), weights=weights)
        except ValueError as error:
            return str(error)
        return str(_operator_gaps(gaps[:1])[0]) if gaps else ""

    def _rule_options(self, rule: GradientRule, wrt: Sequence[str]) -> dict[str, Any]:
        """What the table of a rule is made by: its own options, what the model's owner states, what is explained."""
        options: dict[str, Any] = dict(rule.options)
        if rule.name in BOX_RULES:
            stated = {name: self.signature.input(name).bounds for name in self.signature.differentiable_inputs}
            options["bounds"] = {name: [end.tolist() for end in ends] for name, ends in stated.items() if ends}
        if rule.name in FIRST_LAYER_RULES:
            options["hidden"] = self._hidden(wrt)
        if rule.name in PATTERN_RULES:
            options["patterns"] = self._patterns
        return options

    def _hidden(self, wrt: Sequence[str]) -> list[str]:
        """Those among layers that are explained which are behind other ones."""
        inputs = _input_names(self._graph)
        if inputs.issuperset(wrt):
            return []
        behind = behind_layers(self._graph.graph.node, inputs)
        return [name for name in wrt if name in behind]

    def _stated(self, rule: GradientRule, wrt: Sequence[str]) -> tuple[str, dict[str, Any]]:
        """A rule and all that its table is made by, patterns by their digest."""
        options = self._rule_options(rule, wrt)
        if rule.name in PATTERN_RULES:
            options["patterns"] = pattern_file.digest(self._patterns)
        return rule.name, options

    def _table(self, rule: GradientRule, wrt: Sequence[str]) -> Table:
        return GRADIENT_RULES[rule.name](**self._rule_options(rule, wrt))

    def _forward(self, function: Differentiation) -> OnnxFunction:
        graph, score = self._with_head(function)
        self._check_on_path(graph, function, score)
        rows = self._row_graph(graph)
        rows.interpolate(self._moving(function))
        return self._opened(rows, [score, *function.taps], function)

    def _gradient(self, function: Differentiation) -> OnnxFunction:
        graph, score = self._gradient_graph(function)
        self._suit_processor(graph.model)
        rows = self._row_graph(graph.model, self._bare_results(graph, function, score))
        rows.interpolate(self._moving(function) | set(graph.baselines.values()))
        _select_and_reduce(rows, graph, function, score)
        try:
            gradient = self._opened(rows, [*rows.outputs, *function.taps], function, graph.baselines)
        except ModelRefused as refusal:
            text = f"the gradient does not run on {self.device}: {refusal.message}"
            raise Unsupported("NOT_DIFFERENTIABLE", text, device=self.device) from refusal
        if self.device != "cpu" and not function.cut:
            self._check_device(gradient, function)
        return gradient

    def _split_gradient(self, function: Differentiation) -> OnnxFunction:
        """Raises ModelRefused, Unsupported or ValueError where it cannot be parted, or the parts do not run here."""
        graph, score = self._gradient_graph(function)
        if graph.baselines:
            raise ValueError("rules that compare two forward passes go forward for each target")
        if self.device == "cpu":
            flush_subnormals(graph.model, self._weights.of(graph.model))  # of what one part hands to the other, too
        prefix, parts = unused_prefix(graph.model.graph), split(graph)
        for part in (parts.forward, parts.backward):
            self._suit_processor(part)
        if score not in parts.residuals:
            parts.backward.graph.input.extend(value for value in graph.model.graph.output if value.name == score)
        forward = self._row_graph(parts.forward, prefix=prefix)
        forward.interpolate(self._moving(function))
        backward = self._row_graph(parts.backward, self._bare_results(graph, function, score), prefix)
        _select_and_reduce(backward, graph, function, score)
        handed_over = list(dict.fromkeys([score, *parts.residuals]))
        sessions = SplitPasses(
            self._open(parts.forward, handed_over),
            self._open(parts.backward, backward.outputs),
            self.device,
            self._interruption,
        )
        gradient = self._with_sessions(sessions, backward, function)
        if self.device != "cpu" and not function.cut:
            self._check_equal(gradient, self._function(function), function)
        return gradient

    def _gradient_graph(self, function: Differentiation) -> tuple[GradientGraph, str]:
        """The graph, which refers to its weights, and the name of the scores in it."""
        if not (self._has_gradient or function.cut):
            raise not_differentiable(self.gaps, self.signature.undifferentiable_reason)
        graph, score = self._with_head(function)
        self._check_on_path(graph, function, score)
        rule = self._stated(function.rule, function.wrt)
        key = cache_key(graph, function.wrt, score, function.output, self.fixed_batch, rule)
        result = self._cache.get(key, lambda: self._built(graph, function, score))
        self._weights.take(result.model)
        return result, score

    def _suit_processor(self, graph: onnx.ModelProto) -> None:
        """Writes a gradient graph as the CPU provider computes it fastest."""
        if self.device != "cpu":
            return
        unpool_disjoint_windows(graph)
        if not self._options.share_weights:
            keep_in_blocks(graph)
            self._weights.take(graph)

    def _row_graph(self, model: onnx.ModelProto, bare: Collection[str] = (), prefix: str = "") -> RowGraph:
        return RowGraph(model, multiplies=self.device in MULTIPLYING, bare={*self._unbatched, *bare}, prefix=prefix)

    def _bare_results(self, graph: GradientGraph, function: Differentiation, score: str) -> set[str]:
        """Scores and gradients without a batch axis."""
        results = {score: function.output, **{graph.gradients[name]: name for name in function.wrt}}
        return {own for own, name in results.items() if name in self._unbatched}

    def _check_on_path(self, graph: onnx.ModelProto, function: Differentiation, score: str) -> None:
        """Raises InvalidRequest (LAYER_NOT_ON_PATH) for a layer that the score does not depend on."""
        for name in {*function.wrt, *function.taps} - _input_names(graph):
            if score not in dependents(graph.graph.node, name):
                raise layer_not_on_path(name, function.output)

    def _opened(
        self, rows: RowGraph, outputs: Sequence[str], function: Differentiation, starts: Mapping[str, str] | None = None
    ) -> OnnxFunction:
        return self._with_sessions(self._whole(rows.model, outputs), rows, function, starts)

    def _whole(self, graph: onnx.ModelProto, outputs: Sequence[str]) -> Passes:
        if not self._provider.binds:
            return WholePasses(self._open(graph, outputs), self._interruption)
        return BoundPasses(
            lambda captures: self._open(graph, outputs, captures),
            memory_of(self.device),
            self._interruption,
            self._provider.captures,
        )

    def _with_sessions(
        self,
        sessions: Passes,
        rows: RowGraph,
        function: Differentiation,
        starts: Mapping[str, str] | None = None,
    ) -> OnnxFunction:
        return OnnxFunction(
            sessions,
            rows,
            self._inputs(function),
            function.output,
            self._unbatched,
            self._provider.binds,
            function.taps,
            starts or {},
        )

    def _moving(self, function: Differentiation) -> set[str]:
        return {spec.name for spec in self._inputs(function)}

    def _inputs(self, function: Differentiation) -> tuple[InputSpec, ...]:
        """Those of the graph of a function: where it is cut, the layers, and the inputs of the model that are left."""
        if not function.cut:
            return self.signature.inputs
        graph, _ = self._with_head(function)
        left = {value.name: value for value in graph.graph.input}
        layers = [InputSpec(name, onnx_graph.element_type(left[name]), ()) for name in function.cut]
        return (*layers, *(spec for spec in self.signature.inputs if spec.name in left))

    def _built(self, graph: onnx.ModelProto, function: Differentiation, score: str) -> GradientGraph:
        wrt, weights = function.wrt, self._weights.of(graph)
        try:
            if self._options.precision is Precision.FLOAT16:
                return scaled_gradient(graph, wrt, score, function.output, single=self.fixed_batch, weights=weights)
            return input_gradient(graph, wrt, score, rules=self._table(function.rule, wrt), weights=weights)
        except UnsupportedOperators as error:
            raise not_differentiable(_operator_gaps(error.gaps)) from error
        except ValueError as error:
            raise Unsupported("NOT_DIFFERENTIABLE", str(error)) from error

    def _check_device(self, gradient: OnnxFunction, function: Differentiation) -> None:
        """Refuses a gradient that the CPU provider does not confirm."""
        on_cpu = open_session(gradient.graph.model, replace(self._options, device="cpu"), self._weights)
        self._check_equal(gradient, replace(gradient, sessions=WholePasses(on_cpu, self._interruption)), function)

    def _check_equal(self, gradient: OnnxFunction, reference: OnnxFunction, function: Differentiation) -> None:
        """Refuses a gradient that differs from another one on random rows."""
        largest = LARGEST_DIFFERENCES[self._options.precision]
        for extents in free_extents(self.signature):
            rows = self._random_rows(function, extents)
            try:
                difference = max(
                    largest_difference(*(_arrays(self._at_once(own, again)) for own in (gradient, reference)))
                    for again in _in_turn(rows)
                )
            except EvaluationFailed:
                continue
            if difference <= largest:
                return
            raise Unsupported(
                "NOT_DIFFERENTIABLE",
                f"the gradient on {self.device} differs from that on the CPU by a relative {difference:.2g}, "
                f"more than {largest:g}",
                device=self.device,
                difference=f"{difference:.3g}",
            )

    def _random_rows(self, function: Differentiation, extents: FreeExtents) -> Rows:
        instances = sample_instances(self.signature, 2, extents)
        drawn = gradient_rows(self.signature, instances)
        rows = next(rows for rows in drawn if rows.function.output == function.output)
        return Rows(function, tuple(replace(segment, function=function) for segment in rows.segments))

    def _with_head(self, function: Differentiation) -> tuple[onnx.ModelProto, str]:
        output = self.signature.output(function.output)
        axis = output.class_axis if output.class_axis is not None else len(output.axes) - 1
        lacking = output.name in self._unbatched
        graph, score = append_score_head(self._graph, output.name, function.head.value, axis - lacking)
        self._check_layers(graph, function)
        return (_cut(graph, function.cut, score), score) if function.cut else (graph, score)

    def _check_layers(self, graph: onnx.ModelProto, function: Differentiation) -> None:
        """Raises InvalidRequest (UNKNOWN_LAYER)."""
        known = {name for node in graph.graph.node for name in node.output}
        for name in (*function.taps, *function.cut):
            if name not in known:
                raise unknown_layer(name)


def _layers_refusal(unbatched: Collection[str], precision: Precision) -> str:
    if precision is Precision.FLOAT16:
        return "the model is evaluated in float16; serve it in float32"
    return f"{', '.join(sorted(unbatched))} has no batch axis; export the model with one" if unbatched else ""


def _cut(graph: onnx.ModelProto, layers: Sequence[str], score: str) -> onnx.ModelProto:
    """What is behind the layers.

    Raises:
        InvalidRequest: the score does not depend on one of them (LAYER_NOT_ON_PATH), or they cannot be cut together
            (LAYERS_NOT_CUT).
    """
    for name in layers:
        if score not in dependents(graph.graph.node, name):
            raise layer_not_on_path(name, score)
    try:
        return cut(graph, layers).after
    except ValueError as error:
        raise InvalidRequest("LAYERS_NOT_CUT", str(error), layers=", ".join(layers)) from error


def _input_names(graph: onnx.ModelProto) -> set[str]:
    return {value.name for value in graph.graph.input}


def _select_and_reduce(rows: RowGraph, graph: GradientGraph, function: Differentiation, score: str) -> None:
    """Seeds the gradients in a graph with one selector per segment, and sums them per segment."""
    kinds = {value.name: value.type.tensor_type.elem_type for value in rows.model.graph.output}
    rows.select(score, graph.cotangent)
    rows.reduce({name: kinds[name] for name in (graph.gradients[own] for own in function.wrt)})


def _in_turn(rows: Rows) -> Iterator[Rows]:
    """Micro-batches of one size until a recorded run has been started again, each unlike the one before."""
    for run in range(RUNS_UNTIL_REPLAY):
        yield replace(rows, segments=rows.segments[:: -1 if run % 2 else 1])


def _arrays(evaluations: Iterable[SegmentEvaluation]) -> list[Array]:
    return [array for found in evaluations for array in (found.scores, *found.gradient_sums.values())]


def _agree(declared: int | None, found: int) -> bool:
    return declared is None or declared == found


def _gaps(graph: onnx.ModelProto, signature: Signature, weights: Weights) -> tuple[OperatorGap, ...]:
    """All that stands between any floating-point output and the floating-point inputs, each once."""
    wrt = signature.differentiable_inputs
    if signature.undifferentiable_reason:
        return ()
    arrays = weights.of(graph)
    try:
        found = [
            gap for output in signature.differentiable_outputs for gap in find_gaps(graph, wrt, output, weights=arrays)
        ]
    except ValueError as error:  # what onnxruntime evaluates need not be a graph by the rules
        return (OperatorGap("the graph", "", str(error), "check the file with onnx.checker.check_model"),)
    return tuple(dict.fromkeys(_operator_gaps(found)))


def _check_opset(model: onnx.ModelProto) -> None:
    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), OLDEST_OPSET)
    if version < OLDEST_OPSET:
        raise ModelRefused(
            "OPSET_TOO_OLD",
            f"the model uses operator set {version}; {OLDEST_OPSET} is the oldest that is evaluated",
            version=version,
        )


def _operator_gaps(gaps: Iterable[Gap]) -> tuple[OperatorGap, ...]:
    return tuple(
        OperatorGap(f"{gap.domain}.{gap.operator}" if gap.domain else gap.operator, gap.node, gap.reason, gap.remedy)
        for gap in gaps
    )


def _with_batch_extent(declared: Signature, extent: int | None) -> Signature:
    """States the extent of the batch axis that the loaded model accepts: 1, or None for any."""
    inputs = tuple(
        replace(spec, axes=(Axis(spec.axes[0].name, extent), *spec.axes[1:])) if spec.batched else spec
        for spec in declared.inputs
    )
    outputs = tuple(replace(spec, axes=(Axis(spec.axes[0].name, extent), *spec.axes[1:])) for spec in declared.outputs)
    return replace(declared, inputs=inputs, outputs=outputs)
