"""The functions of an ONNX model: sessions of graphs that are built when they are first asked for."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import onnx
import onnxruntime

from explainserve.backends import onnx_graph
from explainserve.backends.contract import (
    LoadOptions,
    layer_not_on_path,
    not_differentiable,
    unknown_layer,
)
from explainserve.backends.gradient_cache import GradientCache, cache_key
from explainserve.backends.kept_functions import KeptFunctions
from explainserve.backends.onnx_binding import BoundPasses
from explainserve.backends.onnx_function import OnnxFunction
from explainserve.backends.onnx_passes import Passes, SplitPasses, WholePasses
from explainserve.backends.onnx_providers import provider_of
from explainserve.backends.onnx_rows import MULTIPLYING, RowGraph, unused_prefix
from explainserve.backends.onnx_rules import OnnxRules, gradient_gaps, operator_gaps
from explainserve.backends.onnx_session import (
    Interruption,
    memory_of,
    open_session,
)
from explainserve.backends.onnx_subnormal import flush_subnormals
from explainserve.backends.onnx_verification import check_equal
from explainserve.backends.onnx_weights import Weights
from explainserve.backends.resident_memory import resident_bytes
from explainserve.errors import InvalidRequest, ModelRefused, Unsupported
from explainserve.model_config import Precision
from explainserve.onnx_vjp import (
    GradientGraph,
    UnsupportedOperators,
    append_score_head,
    cut,
    input_gradient,
    scaled_gradient,
    split,
)
from explainserve.onnx_vjp.blocked import keep_in_blocks
from explainserve.onnx_vjp.disjoint_windows import unpool_disjoint_windows
from explainserve.onnx_vjp.routes import dependents
from explainserve.plan import Differentiation, Rows
from explainserve.signature import InputSpec, Signature

logger = logging.getLogger(__name__)


class OnnxFunctions:
    """Pairs of score head and differentiated tensors, each a function of its own.

    Attributes:
        gaps: what stands between the outputs and the inputs; no gradient is built while there are any.
    """

    def __init__(
        self,
        graph: onnx.ModelProto,
        weights: Weights,
        signature: Signature,
        unbatched: frozenset[str],
        fixed_batch: bool,
        options: LoadOptions,
        rules: OnnxRules,
    ) -> None:
        """`unbatched` names the inputs and outputs whose arrays in the graph lack the batch axis."""
        self.gaps = gradient_gaps(graph, signature, weights)
        self.interruption = Interruption()
        self._graph = graph
        self._weights = weights
        self._signature = signature
        self._unbatched = unbatched
        self._fixed_batch = fixed_batch
        self._options = options
        self._rules = rules
        self._provider = provider_of(options.device)
        self._cache = GradientCache(options.cache and options.cache / "gradients")
        self._at_once: KeptFunctions[OnnxFunction] = KeptFunctions()
        self._parted: KeptFunctions[OnnxFunction] = KeptFunctions()
        self.session_bytes: int | None = 0

    def on_one_thread(self) -> OnnxFunctions:
        """The same functions, whose sessions have one thread each; to be interrupted with these."""
        other = copy.copy(self)
        other._options = replace(self._options, thread_count=1)
        other._at_once, other._parted, other.session_bytes = KeptFunctions(), KeptFunctions(), 0
        return other

    @property
    def differentiable(self) -> bool:
        """Whether the floating-point inputs have gradients."""
        return not (self._signature.undifferentiable_reason or self.gaps)

    @property
    def records(self) -> bool | None:
        """Whether all that was built starts recorded runs again; None where the device records none, or before."""
        opened = [function.sessions for function in self._at_once.all]
        recording = {sessions.records for sessions in opened if isinstance(sessions, BoundPasses)}
        return all(recording) if recording and self._provider.captures else None

    def of(self, rows: Rows) -> OnnxFunction:
        """The function for rows: for several targets, with forward and backward pass apart."""
        several = len(rows.passes) > 1 and rows.function.wrt and not rows.function.taps
        return self._parted.get(rows.function, self._parted_or_at_once) if several else self.at_once(rows.function)

    def at_once(self, function: Differentiation) -> OnnxFunction:
        """The function as one graph.

        Raises:
            InvalidRequest: a layer is unknown (UNKNOWN_LAYER), not on the path (LAYER_NOT_ON_PATH), or cannot be cut
                with the others (LAYERS_NOT_CUT).
            Unsupported: there is no such gradient, or not on this device (NOT_DIFFERENTIABLE).
        """
        return self._at_once.get(function, self._gradient if function.wrt else self._forward)

    def _parted_or_at_once(self, function: Differentiation) -> OnnxFunction:
        try:
            return self._parted_gradient(function)
        except (ModelRefused, Unsupported, ValueError) as refusal:
            logger.warning("targets do not share forward passes for %s: %s", function.output, refusal)
            return self.at_once(function)

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
            text = f"the gradient does not run on {self._options.device}: {refusal.message}"
            raise Unsupported("NOT_DIFFERENTIABLE", text, device=self._options.device) from refusal
        if self._options.device != "cpu" and not function.cut:
            self._check_device(gradient)
        return gradient

    def _parted_gradient(self, function: Differentiation) -> OnnxFunction:
        """Raises ModelRefused, Unsupported or ValueError where it cannot be parted, or the parts do not run here."""
        graph, score = self._gradient_graph(function)
        if graph.baselines:
            raise ValueError("rules that compare two forward passes go forward for each target")
        if self._options.device == "cpu":
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
            self._options.device,
            self.interruption,
        )
        gradient = self._with_sessions(sessions, backward, function)
        if self._options.device != "cpu" and not function.cut:
            self._check_equal(gradient, self.at_once(function))
        return gradient

    def _gradient_graph(self, function: Differentiation) -> tuple[GradientGraph, str]:
        """The graph, which refers to its weights, and the name of the scores in it."""
        if not (self.differentiable or function.cut):
            raise not_differentiable(self.gaps, self._signature.undifferentiable_reason)
        graph, score = self._with_head(function)
        self._check_on_path(graph, function, score)
        rule = self._rules.stated(function.rule, function.wrt)
        key = cache_key(graph, function.wrt, score, function.output, self._fixed_batch, rule)
        result = self._cache.get(key, lambda: self._built(graph, function, score))
        self._weights.take(result.model)
        return result, score

    def _built(self, graph: onnx.ModelProto, function: Differentiation, score: str) -> GradientGraph:
        wrt, weights = function.wrt, self._weights.of(graph)
        try:
            if self._options.precision is Precision.FLOAT16:
                return scaled_gradient(graph, wrt, score, function.output, single=self._fixed_batch, weights=weights)
            return input_gradient(graph, wrt, score, rules=self._rules.table(function.rule, wrt), weights=weights)
        except UnsupportedOperators as error:
            raise not_differentiable(operator_gaps(error.gaps)) from error
        except ValueError as error:
            raise Unsupported("NOT_DIFFERENTIABLE", str(error)) from error

    def _suit_processor(self, graph: onnx.ModelProto) -> None:
        """Writes a gradient graph as the CPU provider computes it fastest."""
        if self._options.device != "cpu":
            return
        unpool_disjoint_windows(graph)
        if not self._options.share_weights:
            keep_in_blocks(graph)
            self._weights.take(graph)

    def _row_graph(self, model: onnx.ModelProto, bare: Collection[str] = (), prefix: str = "") -> RowGraph:
        return RowGraph(
            model, multiplies=self._options.device in MULTIPLYING, bare={*self._unbatched, *bare}, prefix=prefix
        )

    def _bare_results(self, graph: GradientGraph, function: Differentiation, score: str) -> set[str]:
        """Scores and gradients without a batch axis."""
        results = {score: function.output, **{graph.gradients[name]: name for name in function.wrt}}
        return {own for own, name in results.items() if name in self._unbatched}

    def _opened(
        self, rows: RowGraph, outputs: Sequence[str], function: Differentiation, starts: Mapping[str, str] | None = None
    ) -> OnnxFunction:
        return self._with_sessions(self._passes(rows.model, outputs), rows, function, starts)

    def _passes(self, graph: onnx.ModelProto, outputs: Sequence[str]) -> Passes:
        if not self._provider.binds:
            return WholePasses(self._open(graph, outputs), self.interruption)
        return BoundPasses(
            lambda captures: self._open(graph, outputs, captures),
            memory_of(self._options.device),
            self.interruption,
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
            function,
            self._unbatched,
            self._fixed_batch,
            self._provider.binds,
            starts or {},
        )

    def _open(
        self, graph: onnx.ModelProto, outputs: Sequence[str], captures: bool = False
    ) -> onnxruntime.InferenceSession:
        if self._options.device == "cpu":
            flush_subnormals(graph, self._weights.of(graph))
        before = resident_bytes()
        options = replace(self._options, captures=captures)
        session = open_session(onnx_graph.with_outputs(graph, outputs), options, self._weights)
        if before is None or self.session_bytes is None:
            self.session_bytes = None
        else:
            self.session_bytes += max((resident_bytes() or before) - before, 0)
        return session

    def _moving(self, function: Differentiation) -> set[str]:
        return {spec.name for spec in self._inputs(function)}

    def _inputs(self, function: Differentiation) -> tuple[InputSpec, ...]:
        """Those of the graph of a function: where it is cut, the layers, and the inputs of the model that are left."""
        if not function.cut:
            return self._signature.inputs
        graph, _ = self._with_head(function)
        left = {value.name: value for value in graph.graph.input}
        layers = [InputSpec(name, onnx_graph.element_type(left[name]), ()) for name in function.cut]
        return (*layers, *(spec for spec in self._signature.inputs if spec.name in left))

    def _with_head(self, function: Differentiation) -> tuple[onnx.ModelProto, str]:
        output = self._signature.output(function.output)
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

    def _check_on_path(self, graph: onnx.ModelProto, function: Differentiation, score: str) -> None:
        """Raises InvalidRequest (LAYER_NOT_ON_PATH) for a layer that the score does not depend on."""
        for name in {*function.wrt, *function.taps} - {value.name for value in graph.graph.input}:
            if score not in dependents(graph.graph.node, name):
                raise layer_not_on_path(name, function.output)

    def _check_device(self, gradient: OnnxFunction) -> None:
        """Refuses a gradient that the CPU provider does not confirm."""
        on_cpu = open_session(gradient.graph.model, replace(self._options, device="cpu"), self._weights)
        self._check_equal(gradient, replace(gradient, sessions=WholePasses(on_cpu, self.interruption)))

    def _check_equal(self, gradient: OnnxFunction, reference: OnnxFunction) -> None:
        check_equal(gradient, reference, self._signature, self._options.precision, self._options.device)


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


def _select_and_reduce(rows: RowGraph, graph: GradientGraph, function: Differentiation, score: str) -> None:
    """Seeds the gradients in a graph with one selector per segment, and sums them per segment."""
    kinds = {value.name: value.type.tensor_type.elem_type for value in rows.model.graph.output}
    rows.select(score, graph.cotangent)
    rows.reduce({name: kinds[name] for name in (graph.gradients[own] for own in function.wrt)})
