"""Rows evaluated by torch autograd: what the backends of `.pt2` and TorchScript files share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from explainserve.backends import torch_deeplift
from explainserve.backends.contract import Collect, Compilation, LoadOptions, Memory, OperatorGap
from explainserve.backends.exported_function import GraphFunction, NamedGraph
from explainserve.backends.exported_rules import HANDED_DOWN
from explainserve.backends.resident_memory import peak_growth
from explainserve.backends.row_feeds import joined, single_rows
from explainserve.backends.torch_batch import ArrivingScores, ArrivingSums, DeviceRows, torch_dtype
from explainserve.backends.torch_graphs import ForwardPass, Graphs
from explainserve.backends.torch_precision import Arithmetic, row_scales
from explainserve.backends.torch_queue import Queue, queue_of
from explainserve.errors import (
    EvaluationFailed,
    ExplainServeError,
    ModelRefused,
    Unsupported,
    first_line,
    is_out_of_memory,
)
from explainserve.plan import STANDARD, Differentiation, Rows, SegmentEvaluation, Selector
from explainserve.signature import Layer, OutputSpec, ScoreHead, Signature, explained_layers

Forward = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Outputs of a batch, in the order of the signature, from its inputs in that order."""

Compiler = Callable[[Forward, Sequence[Tensor]], Forward]
"""A function that computes the same, from a function and inputs that have the layout of all that it will be given."""

_EXAMPLE_ROWS = 2

_UNNAMED = (
    "a TorchScript file does not name its tensors for others to reach; export the model with torch.export, or to ONNX"
)

_NARROW = "the model is evaluated in sixteen bits; serve it in float32"

MOST_EXPLAINED = 8
"""Layers in the place of inputs from which rules are searched for gaps."""

_AT_START = " at the start"
"""Marks what an input or layer is at the start of the path."""

_Result = TypeVar("_Result")


class TorchModel:
    """A `contract.LoadedModel` around a differentiable torch function.

    Args:
        backend: "torch.export" or "torchscript".
        forward: the function; none of its parameters requires a gradient.
        arithmetic: its device, and how that computes.
        fixed_batch: `forward` accepts one row at a time; several are then run one after the other.
        queue: of its device.
        weight_bytes: what it holds for good.
        named: the graph of `forward`, where the file tells it, for functions that reach layers or follow a rule.
        pre_activations: the same as `forward` without the softmax or sigmoid in which outputs end, where the file shows
            it without a graph.
        configured_layers: those that the model's owner picked.
        memory_format: of the images that `forward` is given.

    Attributes:
        compilation: see `contract.LoadedModel`.
    """

    gradient_mode = "autograd"

    def __init__(
        self,
        backend: str,
        signature: Signature,
        forward: Forward,
        arithmetic: Arithmetic,
        fixed_batch: bool,
        gaps: tuple[OperatorGap, ...] = (),
        memory_format: torch.memory_format = torch.contiguous_format,
        queue: Queue | None = None,
        weight_bytes: int = 0,
        named: NamedGraph | None = None,
        pre_activations: Forward | None = None,
        configured_layers: Sequence[str] = (),
    ) -> None:
        self.backend = backend
        self.signature = signature
        self.device = str(arithmetic.device)
        self.fixed_batch = fixed_batch or not all(spec.batched for spec in signature.inputs)
        self.gaps = gaps
        self._arithmetic = arithmetic
        self.layers: tuple[Layer, ...] = named.layers(signature) if named else ()
        self.gradient_rules: Mapping[str, str] = {STANDARD.name: ""} if named is None else self._rules(named)
        self._explained = explained_layers(self.layers, configured_layers)[:MOST_EXPLAINED]
        self.layers_refusal = _UNNAMED if named is None else _unbatched(signature)
        self.library_versions: Mapping[str, str] = {"torch": str(torch.__version__)}
        self._weight_bytes = weight_bytes
        self._forward = forward
        self._named = named
        self._pre_activations = pre_activations
        self._memory_format = memory_format
        self._compiled = False
        self.compilation: Compilation | None = None
        self._queue = queue or queue_of(arithmetic.device)
        self._graphs = self._new_graphs()

    def in_channels_last(
        self, forward: Forward, named: NamedGraph | None = None, pre_activations: Forward | None = None
    ) -> TorchModel:
        """The same model around a function whose weights have their channels last; images are laid out alike."""
        other = copy.copy(self)
        other._forward, other._named, other._pre_activations = forward, named, pre_activations
        other._memory_format = torch.channels_last
        other._graphs = other._new_graphs()
        return other

    def compiled(self, compiler: Compiler) -> TorchModel:
        """The same model around what a compiler makes of its function.

        Raises:
            Exception: whatever the compiler raises.
        """
        other = copy.copy(self)
        with self._arithmetic.evaluation(), self._arithmetic.forward():
            other._forward, other._compiled = compiler(self._forward, self._examples()), True
        other._graphs = other._new_graphs()
        return other

    def _examples(self) -> list[Tensor]:
        """Inputs of the function as it is given them, without values."""
        inputs = [
            self._empty((_EXAMPLE_ROWS, *(axis.size or 1 for axis in spec.instance_axes)), torch_dtype(spec.dtype))
            for spec in self.signature.inputs
        ]
        return self._one_row(inputs, 0) if self.fixed_batch else inputs

    @property
    def channels_last(self) -> bool:
        """How images are laid out."""
        return self._memory_format is torch.channels_last

    def _rules(self, named: NamedGraph) -> dict[str, str]:
        """Every rule of the graph, and why the model cannot follow it."""
        rules = named.gradient_rules(self.signature)
        if self._arithmetic.is_narrow:
            rules |= dict.fromkeys({torch_deeplift.RULE, *HANDED_DOWN}, _NARROW)
        if self.fixed_batch:
            rules[torch_deeplift.RULE] = "the file takes one row at a time, and the rule compares two at once"
        return rules

    def rule_gap(self, rule: str) -> str:
        """See `contract.LoadedModel`."""
        return "" if self._named is None else self._named.rule_gap(rule, self.signature, self._explained)

    def _new_graphs(self) -> Graphs | None:
        return None if self._queue.record is None else Graphs(self._queue.record)

    @property
    def execution(self) -> str:
        """See `contract.LoadedModel`."""
        parts = ["channels_last" if self.channels_last else "contiguous"]
        if self._compiled:
            parts.append("compiled")
        if self._graphs is not None:
            parts.append("no_cuda_graphs" if self._graphs.refusal else "cuda_graphs")
        return "+".join(parts)

    @property
    def memory(self) -> Memory:
        """See `contract.LoadedModel`: the only sessions are what is recorded."""
        of_rules = 0 if self._named is None else self._named.gradient_bytes
        return Memory(self._weight_bytes, of_rules, 0 if self._graphs is None else self._graphs.byte_count)

    @property
    def runs_ahead(self) -> bool:
        """See `contract.LoadedModel`."""
        return self._queue.runs_ahead

    def evaluate(self, rows: Rows) -> tuple[SegmentEvaluation, ...]:
        """See `contract.LoadedModel.evaluate`; one forward pass of all rows, and a backward pass per
        selector."""
        return self._begun(rows)()

    def submit(self, rows: Rows) -> Collect:
        """See `contract.LoadedModel`."""
        return self._begun(rows) if self.runs_ahead else lambda: self.evaluate(rows)

    def _begun(self, rows: Rows) -> Collect:
        if self.fixed_batch and rows.row_count > 1 and not self._is_plain(rows.function):
            return self._begun_each(rows)
        with self._queue.computing(), self._arithmetic.evaluation():
            return _guarded(lambda: self._gradients(rows) if rows.function.wrt else self._scores(rows))

    def _begun_each(self, rows: Rows) -> Collect:
        """Each row alone: what a layer holds of several rows is no tensor of the graph."""
        begun = [[self._begun(row) for row in single_rows(segment)] for segment in rows.segments]
        return lambda: tuple(
            joined(parts) for each in begun for parts in zip(*(collect() for collect in each), strict=True)
        )

    def peak_bytes(self, rows: Rows) -> int | None:
        """See `contract.LoadedModel`. A first evaluation prepares all that is kept for good; graphs keep as much again,
        and are not counted here.
        """
        eager = copy.copy(self)
        eager._graphs = None
        eager.evaluate(rows)
        device = self._queue.device
        if device.type != "cuda":
            return peak_growth(lambda: eager.evaluate(rows))
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        eager.evaluate(rows)
        return torch.cuda.max_memory_allocated(device) - before

    def interrupt(self) -> None:
        """See `contract.LoadedModel`: torch cannot."""

    def _scores(self, rows: Rows) -> Collect:
        with torch.inference_mode():
            batch = DeviceRows(rows, self._queue, self._empty)
            forward = self._passed(rows.function, self._points(rows.function, batch))
            values = self._values(rows, forward)
            arriving = ArrivingScores(rows, batch.spans, self._queue.fetch(forward.scores), values)
            return _Pending(batch, (arriving,), self._queue.finish())

    def _gradients(self, rows: Rows) -> Collect:
        if self.gaps and not rows.function.cut:
            raise Unsupported("NOT_DIFFERENTIABLE", self.gaps[0].reason, gap_count=len(self.gaps))
        batch = DeviceRows(rows, self._queue, self._empty)
        forward = self._passed(rows.function, self._points(rows.function, batch))
        last = len(rows.passes) - 1
        found = [self._backward(batch, s, forward, keep=k < last) for k, s in enumerate(rows.passes)]
        values = self._values(rows, forward)
        by_segment = tuple(
            sums.with_values(values, span)
            for parts, span in zip(zip(*found, strict=True), batch.spans, strict=True)
            for sums in parts
        )
        return _Pending(batch, by_segment, self._queue.finish())

    def _values(self, rows: Rows, forward: ForwardPass) -> dict[str, Tensor]:
        """Those of the taps on all rows, on their way to the host."""
        if not rows.function.taps:
            return {}
        types, values = self._of_graph(rows.function).layers, forward.values
        for name in rows.function.taps:
            if values[name].ndim == 0 or len(values[name]) != rows.row_count:
                text = f"layer {name!r} has shape {tuple(values[name].shape)} for {rows.row_count} rows"
                raise EvaluationFailed("MODEL_RAISED", text)
        return {name: self._queue.fetch(values[name].to(types[name]).contiguous()) for name in rows.function.taps}

    def _backward(
        self, batch: DeviceRows, selectors: Sequence[Selector], forward: ForwardPass, *, keep: bool
    ) -> list[ArrivingSums]:
        """One backward pass with a selector per segment; `keep` leaves the graph to further ones."""
        scores = forward.scores.reshape(batch.row_count, -1)
        gradients = forward.gradients(batch.cotangent(selectors, scores), keep=keep)
        with torch.no_grad():
            return batch.sums(selectors, scores, gradients)

    def _passed(self, function: Differentiation, points: Mapping[str, Tensor]) -> ForwardPass:
        """The forward pass, replayed where it is recorded; those that reach layers or follow a rule are not."""
        if self._graphs is None or not self._is_plain(function):
            return self._forward_pass(function, points)
        forward = functools.partial(self._forward_pass, function)
        return self._graphs.passed(function, forward, points, backward=bool(function.wrt))

    def _forward_pass(self, function: Differentiation, points: Mapping[str, Tensor]) -> _ForwardPass:
        """One forward pass, with its history where it is going to be differentiated."""
        leaves = {name: points[name].detach().requires_grad_() for name in function.wrt if name in points}
        with torch.set_grad_enabled(bool(function.wrt)):
            output, values = self._output(function, {**points, **leaves})
            scores = self._scored(function, output)
        wrt = {name: leaves[name] if name in leaves else values[name] for name in function.wrt}
        if wrt and not scores.requires_grad:
            raise Unsupported(
                "NOT_DIFFERENTIABLE",
                f"output {function.output!r} has no gradient with respect to {', '.join(wrt)}",
                output=function.output,
            )
        return _ForwardPass(output, scores, wrt, self._arithmetic.is_narrow, values)

    def _output(self, function: Differentiation, points: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The model's output of all rows, in the element type that it states, and the values of layers."""
        spec, values = self.signature.output(function.output), dict[str, Tensor]()
        with self._arithmetic.forward():
            if self._is_plain(function):
                output = self._plain_output(self._forward_of(function), self.signature.outputs.index(spec), points)
            else:
                taken = _with_starts(points) if _compares(function) else self._as_taken(points)
                output, values = self._of_graph(function)(taken)
            return output.to(torch_dtype(spec.dtype)), values

    def _forward_of(self, function: Differentiation) -> Forward:
        own = self._pre_activations if function.head is ScoreHead.PRE_ACTIVATION else self._forward
        assert own is not None, "A score that the file does not show was asked of it. This is a bug."
        return own

    def _plain_output(self, forward: Forward, position: int, points: Mapping[str, Tensor]) -> Tensor:
        inputs = [points[spec.name] for spec in self.signature.inputs]
        if not self.fixed_batch:
            return forward(inputs)[position]
        return torch.cat([forward(self._one_row(inputs, row))[position] for row in range(len(inputs[0]))])

    def _scored(self, function: Differentiation, output: Tensor) -> Tensor:
        """The score tensors of all rows."""
        spec = self.signature.output(function.output)
        if not _compares(function):
            return _with_head(output, function.head, spec)
        return torch_deeplift.headed(output, function.head, _class_axis(spec))[: len(output) // 2]

    def _is_plain(self, function: Differentiation) -> bool:
        """Whether the model is evaluated as it is, from its inputs to its outputs."""
        inputs = {spec.name for spec in self.signature.inputs}
        whole = function.rule == STANDARD and (self._named is None or function.head is not ScoreHead.PRE_ACTIVATION)
        return whole and not function.taps and not function.cut and inputs.issuperset(function.wrt)

    def _of_graph(self, function: Differentiation) -> GraphFunction:
        assert self._named is not None, "A capability that the model lacks was asked of it. This is a bug."
        return self._named.function(function)

    def _as_taken(self, points: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The points of one row where an input has no batch axis."""
        bare = {spec.name for spec in self.signature.inputs if not spec.batched}
        return {name: tensor[0] if name in bare else tensor for name, tensor in points.items()}

    def _one_row(self, inputs: Sequence[Tensor], row: int) -> list[Tensor]:
        specs = self.signature.inputs
        return [t[row : row + 1] if spec.batched else t[row] for spec, t in zip(specs, inputs, strict=True)]

    def _points(self, function: Differentiation, batch: DeviceRows) -> dict[str, Tensor]:
        """What the function takes, of all rows: the inputs, and layers that stand in their place."""
        if self._is_plain(function):
            return {spec.name: batch.points(spec.name, torch_dtype(spec.dtype)) for spec in self.signature.inputs}
        taken = self._of_graph(function).inputs
        points = {name: batch.points(name, dtype) for name, dtype in taken.items()}
        if not _compares(function):
            return points
        return {**points, **{name + _AT_START: batch.starts(name, dtype) for name, dtype in taken.items()}}

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory on the device; a batch of images is laid out as the model computes."""
        layout = self._memory_format if len(shape) == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device=self._queue.device, memory_format=layout)


@dataclass(frozen=True, eq=False)
class _Pending:
    """Results on their way; called, it waits for them.

    Attributes:
        batch: holds what was uploaded, which the device may still need.
    """

    batch: DeviceRows
    arriving: Sequence[ArrivingScores | ArrivingSums]
    finish: Callable[[], None]

    def __call__(self) -> tuple[SegmentEvaluation, ...]:
        _guarded(self.finish)
        return tuple(part for each in self.arriving for part in each.evaluations())


@dataclass(frozen=True, eq=False)
class _ForwardPass:
    """See `torch_graphs.ForwardPass`.

    Attributes:
        history: the scores, of which gradients are taken.
        scaled: go down from the output with scaled cotangents, which sixteen bits can hold.
        layers: values by name, with their history.
    """

    output: Tensor
    history: Tensor
    wrt: Mapping[str, Tensor]
    scaled: bool
    layers: Mapping[str, Tensor]

    @property
    def scores(self) -> Tensor:
        """See `torch_graphs.ForwardPass`."""
        return self.history.detach()

    @property
    def values(self) -> dict[str, Tensor]:
        """See `torch_graphs.ForwardPass`."""
        return {name: value.detach() for name, value in self.layers.items()}

    def gradients(self, cotangent: Tensor, *, keep: bool) -> dict[str, Tensor]:
        """See `torch_graphs.ForwardPass`."""
        cotangent = cotangent.reshape(self.history.shape)
        if not self.scaled:
            return self._down(self.history, cotangent, keep)
        (at_output,) = torch.autograd.grad(self.history, self.output, cotangent, retain_graph=True)
        scales = row_scales(at_output)
        gradients = self._down(self.output, at_output * scales.reshape(-1, *[1] * (at_output.ndim - 1)), keep)
        return {name: g / scales.reshape(-1, *[1] * (g.ndim - 1)) for name, g in gradients.items()}

    def _down(self, of: Tensor, cotangent: Tensor, keep: bool) -> dict[str, Tensor]:
        found = torch.autograd.grad(
            of, list(self.wrt.values()), cotangent, retain_graph=keep, allow_unused=True, materialize_grads=True
        )
        return dict(zip(self.wrt, found, strict=True))


def _unbatched(signature: Signature) -> str:
    """Why layers are not reached of rows that the model does not take together, or ""."""
    bare = [spec.name for spec in signature.inputs if not spec.batched]
    return f"{', '.join(bare)} has no batch axis; export the model with one" if bare else ""


def resolve_device(options: LoadOptions) -> torch.device:
    """The device of the options.

    Raises:
        ModelRefused: it is missing, and falling back to the CPU is not allowed (DEVICE_UNAVAILABLE).
    """
    name, _, index = options.device.partition(":")
    if options.device == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and (index or "0").isdigit() and int(index or "0") < found:
        return torch.device("cuda", int(index or "0"))
    if options.allow_fallback:
        return torch.device("cpu")
    raise ModelRefused(
        "DEVICE_UNAVAILABLE",
        f"torch {torch.__version__} finds {found} CUDA devices here, and {options.device!r} is none of them",
        device=options.device,
        cuda_device_count=found,
    )


@functools.cache
def use_threads(count: int) -> None:
    """Sets torch's threads once per process; 0 keeps torch's own choice, which is all cores."""
    if count:
        torch.set_num_threads(count)


def _guarded(call: Callable[[], _Result]) -> _Result:
    """Turns whatever a model raises into EvaluationFailed."""
    try:
        return call()
    except ExplainServeError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise EvaluationFailed("OUT_OF_MEMORY", f"the device has no memory left: {first_line(error)}") from error
        raise EvaluationFailed("MODEL_RAISED", f"the model raised: {first_line(error)}") from error


def _compares(function: Differentiation) -> bool:
    """Whether rows are compared with the starts of their paths."""
    return function.rule.name == torch_deeplift.RULE


def _with_starts(points: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The points of all rows, and behind them the starts of their paths."""
    starts = {name: points[name + _AT_START] for name in points if name + _AT_START in points}
    return {name: torch.cat([points[name], start]) for name, start in starts.items()}


def _class_axis(spec: OutputSpec) -> int:
    return -1 if spec.class_axis is None else spec.class_axis


def _with_head(output: Tensor, head: ScoreHead, spec: OutputSpec) -> Tensor:
    axis = _class_axis(spec)
    match head:
        case ScoreHead.IDENTITY | ScoreHead.PRE_ACTIVATION:
            return output
        case ScoreHead.SOFTMAX:
            return output.softmax(axis)
        case ScoreHead.LOG_SOFTMAX:
            return output.log_softmax(axis)
        case ScoreHead.SIGMOID:
            return output.sigmoid()
        case ScoreHead.LOG_SIGMOID:
            return torch.nn.functional.logsigmoid(output)
        case ScoreHead.LOG:
            return output.log()
