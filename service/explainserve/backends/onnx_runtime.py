"""ONNX models on onnxruntime; gradients come from graphs that `onnx_vjp` builds, so no torch is needed.

Each pair of score head and differentiated inputs is a session of its own, built when it is first asked for: rows
without a gradient never pay for the backward part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import DTypeLike, NDArray

from explainserve.backends import onnx_file, onnx_graph
from explainserve.backends.contract import LoadOptions, Memory, OperatorGap
from explainserve.backends.gradient_cache import GradientCache, cache_key
from explainserve.backends.onnx_batch import with_rows
from explainserve.backends.onnx_blocks import state_block_size
from explainserve.backends.onnx_session import Interruption, available_device, open_session, resident_bytes
from explainserve.backends.onnx_subnormal import flush_subnormals
from explainserve.backends.onnx_verification import LARGEST_DIFFERENCE, largest_difference
from explainserve.backends.onnx_weights import Weights, stored_bytes
from explainserve.backends.probe import FreeExtents, free_extents, gradient_rows, has_free_axes, sample_instances
from explainserve.errors import EvaluationFailed, ModelRefused, Unsupported, first_line, is_out_of_memory
from explainserve.model_config import ModelConfig
from explainserve.onnx_vjp import Gap, GradientGraph, UnsupportedOperators, append_score_head, find_gaps, input_gradient
from explainserve.onnx_vjp.blocked import keep_in_blocks
from explainserve.onnx_vjp.opset import OLDEST as OLDEST_OPSET
from explainserve.plan import Differentiation, Rows, Segment, SegmentEvaluation, Selector
from explainserve.signature import Axis, InputSpec, ScoreHead, Signature, element_count

Array = NDArray[np.generic]
Blocks = Mapping[str, Array]
"""Arrays by input name with one leading entry per row."""

NAMED_GAPS = 3
"""Gaps that an error lists; the model's metadata has all of them."""


def load(path: Path, config: ModelConfig, options: LoadOptions) -> OnnxModel:
    """Reads an .onnx file.

    Raises:
        ModelRefused: see `onnx_file.read` and `onnx_graph.signature`; also where onnxruntime cannot build the graph
            (MODEL_NOT_RUNNABLE, OPSET_TOO_OLD), the configuration contradicts it (CONFIG_MISMATCH), or the device is
            missing (DEVICE_UNAVAILABLE).
    """
    device = available_device(options)
    options = replace(options, device=device)
    weights = Weights()
    model = onnx_file.read(path, weights)
    _check_opset(model)
    onnx_graph.name_nodes(model.graph)
    state_block_size(model)
    declared, bare_outputs = onnx_graph.signature(model, config)
    weights.take(model)
    model, free = with_rows(model, declared, options, weights)
    signature = config.signature(_with_batch_extent(declared, None if free else 1))
    unbatched = bare_outputs | {spec.name for spec in signature.inputs if not spec.batched}
    loaded = OnnxModel(model, weights, signature, frozenset(unbatched), bool(unbatched) or not free, options)
    loaded.verify()
    return loaded


@dataclass(frozen=True)
class _Function:
    """A session that computes scores, and gradients where it has a cotangent input."""

    session: onnxruntime.InferenceSession
    interruption: Interruption
    cotangent: str = ""

    def __call__(self, feeds: Blocks) -> list[Array]:
        try:
            outputs: list[Array] = self.session.run(None, feeds, self.interruption.options)
        except Exception as error:  # onnxruntime's own exceptions derive from Exception directly
            if is_out_of_memory(error):
                raise EvaluationFailed("OUT_OF_MEMORY", f"no memory is left: {first_line(error)}") from error
            raise EvaluationFailed("MODEL_RAISED", f"onnxruntime raised: {first_line(error)}") from error
        return outputs


class OnnxModel:
    """A loaded ONNX model; see `contract.LoadedModel`."""

    backend = "onnxruntime"
    execution = ""

    def __init__(
        self,
        graph: onnx.ModelProto,
        weights: Weights,
        signature: Signature,
        unbatched: frozenset[str],
        fixed_batch: bool,
        options: LoadOptions,
    ) -> None:
        """`unbatched` names the inputs and outputs whose arrays in the graph lack the batch axis."""
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
        self._options = options
        self._functions: dict[Differentiation, _Function] = {}
        self._interruption = Interruption()
        self._score_shapes: dict[tuple[object, ...], tuple[int, ...]] = {}
        self.gaps = _gaps(graph, signature, weights)
        self.layers = onnx_graph.layers(graph)
        self.gradient_mode = "gradient_graph" if self._has_gradient else "black_box"

    def evaluate(self, rows: Rows) -> tuple[SegmentEvaluation, ...]:
        """See `contract.LoadedModel`. Rows are interpolated on the host, which onnxruntime reads or copies once."""
        self._interruption.begin()
        function = self._function(rows.function)
        blocks = {spec.name: _block(spec, rows) for spec in self.signature.inputs}
        if not rows.function.wrt:
            (scores,) = self._run(function, blocks, rows)
            return tuple(part for segment, piece in _pieces(rows) for part in _forward_parts(segment, scores[piece]))
        found = [self._backward(rows, selectors, function, blocks) for selectors in rows.passes]
        return tuple(part for parts in zip(*found, strict=True) for part in parts)

    def _backward(
        self, rows: Rows, selectors: Sequence[Selector], function: _Function, blocks: Blocks
    ) -> list[SegmentEvaluation]:
        """What comes back for each segment at one selector of it."""
        cotangents = self._cotangents(rows, selectors, blocks)
        scores, *gradients = self._run(function, {**blocks, function.cotangent: cotangents}, rows)
        by_input = dict(zip(rows.function.wrt, gradients, strict=True))
        return [
            SegmentEvaluation(
                _selected(scores[piece], selector),
                {name: _weighted_sum(segment.weights, array[piece]) for name, array in by_input.items()},
            )
            for selector, (segment, piece) in zip(selectors, _pieces(rows), strict=True)
        ]

    def interrupt(self) -> None:
        """See `contract.LoadedModel`."""
        self._interruption.interrupt()

    @property
    def _has_gradient(self) -> bool:
        return not (self.signature.undifferentiable_reason or self.gaps)

    def _function(self, function: Differentiation) -> _Function:
        if function not in self._functions:
            self._functions[function] = self._gradient(function) if function.wrt else self._forward(function)
        return self._functions[function]

    @property
    def memory(self) -> Memory:
        """See `contract.LoadedModel`."""
        return Memory(self._file_bytes, self._weights.byte_count - self._held_bytes, self._session_bytes)

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
            (instance,) = sample_instances(self.signature, 1, extents)
            try:
                return self._measured_shape(function, {name: value[None] for name, value in instance.items()})
            except EvaluationFailed:
                continue
        return None

    def _unconfirmed(self, function: Differentiation) -> Iterator[OperatorGap]:
        """The gap of an output whose gradient does not run on the device as it does on the CPU."""
        try:
            self._function(function)
        except Unsupported as refusal:
            yield OperatorGap("gradient graph", function.output, refusal.message, "serve the model on the CPU")

    def _open(self, graph: onnx.ModelProto, outputs: Sequence[str]) -> onnxruntime.InferenceSession:
        if self.device == "cpu":
            flush_subnormals(graph, self._weights.of(graph))
        before = resident_bytes()
        session = open_session(onnx_graph.with_outputs(graph, outputs), self._options, self._weights)
        if before is None or self._session_bytes is None:
            self._session_bytes = None
        else:
            self._session_bytes += max((resident_bytes() or before) - before, 0)
        return session

    def _forward(self, function: Differentiation) -> _Function:
        graph, score = self._with_head(function)
        return _Function(self._open(graph, [score]), self._interruption)

    def _gradient(self, function: Differentiation) -> _Function:
        if not self._has_gradient:
            raise _not_differentiable(self.gaps, self.signature.undifferentiable_reason)
        graph, score = self._with_head(function)
        result = self._cache.get(cache_key(graph, function.wrt, score), lambda: self._built(graph, function.wrt, score))
        if self.device == "cpu" and not self._options.share_weights:
            keep_in_blocks(result.model)
        self._weights.take(result.model)
        outputs = [score, *(result.gradients[name] for name in function.wrt)]
        try:
            gradient = _Function(self._open(result.model, outputs), self._interruption, result.cotangent)
        except ModelRefused as refusal:
            text = f"the gradient does not run on {self.device}: {refusal.message}"
            raise Unsupported("NOT_DIFFERENTIABLE", text, device=self.device) from refusal
        if self.device != "cpu":
            self._check_device(gradient, result.model, function)
        return gradient

    def _built(self, graph: onnx.ModelProto, wrt: Sequence[str], score: str) -> GradientGraph:
        try:
            return input_gradient(graph, wrt, score, weights=self._weights.of(graph))
        except UnsupportedOperators as error:
            raise _not_differentiable(_operator_gaps(error.gaps)) from error
        except ValueError as error:
            raise Unsupported("NOT_DIFFERENTIABLE", str(error)) from error

    def _check_device(self, gradient: _Function, graph: onnx.ModelProto, function: Differentiation) -> None:
        """Refuses a gradient that the CPU provider does not confirm on random rows."""
        on_cpu = open_session(graph, replace(self._options, device="cpu"), self._weights)
        reference = _Function(on_cpu, self._interruption, gradient.cotangent)
        for extents in free_extents(self.signature):
            try:
                difference = self._difference(gradient, reference, self._random_rows(function, extents))
            except EvaluationFailed:
                continue
            if difference <= LARGEST_DIFFERENCE:
                return
            raise Unsupported(
                "NOT_DIFFERENTIABLE",
                f"the gradient on {self.device} differs from that on the CPU by a relative {difference:.2g}, "
                f"more than {LARGEST_DIFFERENCE:g}",
                device=self.device,
                difference=f"{difference:.3g}",
            )

    def _difference(self, gradient: _Function, reference: _Function, rows: Rows) -> float:
        blocks = {spec.name: _block(spec, rows) for spec in self.signature.inputs}
        (selectors,) = rows.passes
        blocks[gradient.cotangent] = self._cotangents(rows, selectors, blocks)
        return largest_difference(*(self._run(function, blocks, rows) for function in (gradient, reference)))

    def _random_rows(self, function: Differentiation, extents: FreeExtents) -> Rows:
        instances = sample_instances(self.signature, 2, extents)
        drawn = gradient_rows(self.signature, instances)
        rows = next(rows for rows in drawn if rows.function.output == function.output)
        return Rows(function, tuple(replace(segment, function=function) for segment in rows.segments))

    def _with_head(self, function: Differentiation) -> tuple[onnx.ModelProto, str]:
        output = self.signature.output(function.output)
        axis = output.class_axis if output.class_axis is not None else len(output.axes) - 1
        lacking = output.name in self._unbatched
        return append_score_head(self._graph, output.name, function.head.value, axis - lacking)

    def _cotangents(self, rows: Rows, selectors: Sequence[Selector], blocks: Blocks) -> Array:
        """Each segment's selector as dense rows, shape (rows, *score shape)."""
        output = self.signature.output(rows.function.output)
        shape = self._score_shape(rows, blocks)
        dense = np.zeros((rows.row_count, element_count(shape)), output.dtype)
        for selector, (_, piece) in zip(selectors, _pieces(rows), strict=True):
            dense[piece] = _dense(selector, dense.shape[1], output.dtype)
        return dense.reshape(rows.row_count, *shape)

    def _score_shape(self, rows: Rows, blocks: Blocks) -> tuple[int, ...]:
        """Shape of one row's scores; where the graph leaves it open, one forward row tells it."""
        axes = self.signature.output(rows.function.output).axes[1:]
        extents = tuple(axis.size for axis in axes if axis.size is not None)
        if len(extents) == len(axes):
            return extents
        key = (rows.function.output, *((name, block.shape[1:]) for name, block in blocks.items()))
        if key not in self._score_shapes:
            self._score_shapes[key] = self._measured_shape(rows.function, blocks)
        return self._score_shapes[key]

    def _measured_shape(self, function: Differentiation, blocks: Blocks) -> tuple[int, ...]:
        """Shape of the first row's scores, from a forward pass of it."""
        forward = self._function(replace(function, wrt=()))
        first = {name: block[:1] for name, block in blocks.items()}
        return self._run_at_once(forward, first, function)[0].shape[1:]

    def _run(self, function: _Function, blocks: Blocks, rows: Rows) -> list[Array]:
        """Scores and gradients, each with one leading entry per row."""
        count = rows.row_count
        if not self.fixed_batch:
            results = self._run_at_once(function, blocks, rows.function)
        else:
            single = [
                self._run_at_once(function, {name: block[i : i + 1] for name, block in blocks.items()}, rows.function)
                for i in range(count)
            ]
            results = single[0] if count == 1 else [np.concatenate(arrays) for arrays in zip(*single, strict=True)]
        if len(results[0]) != count:
            raise EvaluationFailed("MODEL_RAISED", f"the model returned {len(results[0])} rows for {count}")
        return results

    def _run_at_once(self, function: _Function, blocks: Blocks, computed: Differentiation) -> list[Array]:
        """One call of onnxruntime. Names without a batch axis lose it on the way in and get it on the way out."""
        bare = {*self._unbatched, function.cotangent} if computed.output in self._unbatched else self._unbatched
        results = function({name: block[0, ...] if name in bare else block for name, block in blocks.items()})
        names = (computed.output, *computed.wrt)
        # A forward function has only its scores, whatever is asked of the rows it was called for.
        return [array[None] if name in bare else array for name, array in zip(names, results, strict=False)]


def _block(spec: InputSpec, rows: Rows) -> Array:
    """The values of one input on all rows, shape (rows, *instance shape)."""
    first = rows.segments[0]
    shape = (first.fixed if spec.name in first.fixed else first.end)[spec.name].shape
    block = np.empty((rows.row_count, *shape), spec.dtype)
    for segment, piece in _pieces(rows):
        if spec.name in segment.fixed:
            block[piece] = segment.fixed[spec.name]
        else:
            _interpolate(segment.start[spec.name], segment.end[spec.name], segment.alphas, block[piece])
    return block


def _interpolate(start: Array, end: Array, alphas: NDArray[np.float64], out: NDArray[Any]) -> None:
    """(1 - alpha) x start + alpha x end in float32 or better; exact at both ends, whatever the magnitudes."""
    work = _work_dtype(out.dtype)
    for row, alpha in enumerate(alphas):  # a row at a time stays in the processor's cache
        point = np.multiply(end, alpha, dtype=work)
        point += np.multiply(start, 1.0 - alpha, dtype=work)
        out[row] = point


def _pieces(rows: Rows) -> Iterator[tuple[Segment, slice]]:
    """The segments, each with the positions of its rows in the batch."""
    first = 0
    for segment in rows.segments:
        yield segment, slice(first, first + segment.row_count)
        first += segment.row_count


def _forward_parts(segment: Segment, scores: Array) -> Iterator[SegmentEvaluation]:
    """Scores at each selector of forward-only rows, or their score tensors where there is none."""
    if not segment.selectors:
        yield SegmentEvaluation(np.empty(0, np.float64), outputs=scores)
    for selector in segment.selectors:
        yield SegmentEvaluation(_selected(scores, selector))


def _selected(scores: Array, selector: Selector) -> NDArray[np.float64]:
    """The score of each row at a selector."""
    flat = scores.reshape(len(scores), element_count(scores.shape[1:]))
    if selector.indices.max(initial=-1) >= flat.shape[1]:
        raise EvaluationFailed("MODEL_RAISED", f"the model returned {flat.shape[1]} scores, fewer than it declares")
    values: NDArray[np.float64] = flat[:, selector.indices].astype(np.float64) @ selector.weights.astype(np.float64)
    return values


def _weighted_sum(weights: NDArray[np.float64], gradients: Array) -> NDArray[np.floating]:
    """Sum over rows, in float32 or better. Rows of weight 0 are selected out: 0 x NaN is NaN."""
    shape = gradients.shape[1:]
    used = np.flatnonzero(weights)
    if len(used) < len(weights):
        weights, gradients = weights[used], gradients[used]
    work = _work_dtype(gradients.dtype)
    flat = gradients.reshape(len(used), element_count(shape)).astype(work, copy=False)
    total: NDArray[np.floating] = (weights.astype(work) @ flat).reshape(shape)
    return total


def _dense(selector: Selector, size: int, dtype: DTypeLike) -> Array:
    row = np.zeros(size, dtype)
    np.add.at(row, selector.indices, selector.weights.astype(dtype))
    return row


def _work_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.result_type(dtype, np.float32)


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


def _not_differentiable(gaps: tuple[OperatorGap, ...], reason: str = "") -> Unsupported:
    first = "; ".join(map(str, gaps[:NAMED_GAPS]))
    return Unsupported(
        "NOT_DIFFERENTIABLE",
        f"the model has no gradient: {first or reason}",
        gaps=first,
        gap_count=len(gaps),
    )


def _with_batch_extent(declared: Signature, extent: int | None) -> Signature:
    """States the extent of the batch axis that the loaded model accepts: 1, or None for any."""
    inputs = tuple(
        replace(spec, axes=(Axis(spec.axes[0].name, extent), *spec.axes[1:])) if spec.batched else spec
        for spec in declared.inputs
    )
    outputs = tuple(replace(spec, axes=(Axis(spec.axes[0].name, extent), *spec.axes[1:])) for spec in declared.outputs)
    return Signature(inputs, outputs)
