"""Rows evaluated by torch autograd: what the backends of `.pt2` and TorchScript files share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explainserve.backends.contract import LoadOptions, OperatorGap
from explainserve.backends.resident_memory import peak_growth
from explainserve.backends.torch_precision import Arithmetic, row_scales
from explainserve.errors import (
    EvaluationFailed,
    ExplainServeError,
    ModelRefused,
    Unsupported,
    first_line,
    is_out_of_memory,
)
from explainserve.plan import STANDARD, Differentiation, Rows, Segment, SegmentEvaluation, Selector
from explainserve.signature import Layer, OutputSpec, ScoreHead, Signature, element_count

Forward = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Outputs of a batch, in the order of the signature, from its inputs in that order."""

_Result = TypeVar("_Result")


class TorchModel:
    """A `contract.LoadedModel` around a differentiable torch function.

    Args:
        backend: "torch.export" or "torchscript".
        forward: the function; none of its parameters requires a gradient.
        arithmetic: its device, and how that computes.
        fixed_batch: `forward` accepts one row at a time; several are then run one after the other.
        memory_format: of the images that `forward` is given.
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
    ) -> None:
        self.backend = backend
        self.signature = signature
        self.device = str(arithmetic.device)
        self.fixed_batch = fixed_batch or not all(spec.batched for spec in signature.inputs)
        self.gaps = gaps
        self.layers: tuple[Layer, ...] = ()
        self.gradient_rules: Mapping[str, str] = {} if gaps else {STANDARD.name: ""}
        self.reaches_layers = False
        self.memory = None
        self.library_versions: Mapping[str, str] = {"torch": str(torch.__version__)}
        self._forward = forward
        self._device = arithmetic.device
        self._arithmetic = arithmetic
        self._memory_format = memory_format

    def in_channels_last(self, forward: Forward) -> TorchModel:
        """The same model around a function whose weights have their channels last; images are laid out alike."""
        other = copy.copy(self)
        other._forward, other._memory_format = forward, torch.channels_last
        return other

    @property
    def execution(self) -> str:
        """See `contract.LoadedModel`."""
        return "channels_last" if self._memory_format is torch.channels_last else "contiguous"

    def evaluate(self, rows: Rows) -> tuple[SegmentEvaluation, ...]:
        """See `contract.LoadedModel.evaluate`; one forward pass of all rows, and a backward pass per
        selector."""
        evaluation = self._gradients if rows.function.wrt else self._scores
        with self._arithmetic.evaluation():
            return _guarded(lambda: evaluation(rows))

    def peak_bytes(self, rows: Rows) -> int | None:
        """See `contract.LoadedModel`. A first evaluation prepares all that is kept for good."""
        self.evaluate(rows)
        if self._device.type != "cuda":
            return peak_growth(lambda: self.evaluate(rows))
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        self.evaluate(rows)
        return torch.cuda.max_memory_allocated(self._device) - before

    def interrupt(self) -> None:
        """See `contract.LoadedModel`: torch cannot."""

    def _scores(self, rows: Rows) -> tuple[SegmentEvaluation, ...]:
        with torch.inference_mode():
            output = self._output(rows.function, self._points(rows, _Uploads(self._device)))
            scores = self._scored(rows.function, output)
            host = scores.to("cpu").numpy()
        pairs = zip(rows.segments, _spans(rows), strict=True)
        return tuple(part for segment, span in pairs for part in _forward_parts(segment, host[span]))

    def _gradients(self, rows: Rows) -> tuple[SegmentEvaluation, ...]:
        if self.gaps:
            raise Unsupported("NOT_DIFFERENTIABLE", self.gaps[0].reason, gap_count=len(self.gaps))
        upload = _Uploads(self._device)
        points = self._points(rows, upload)
        wrt = {name: points[name].requires_grad_() for name in rows.function.wrt}
        with torch.enable_grad():
            output = self._output(rows.function, points)
            scores = self._scored(rows.function, output).reshape(rows.row_count, -1)
        if not scores.requires_grad:
            raise Unsupported(
                "NOT_DIFFERENTIABLE",
                f"output {rows.function.output!r} has no gradient with respect to {', '.join(wrt)}",
                output=rows.function.output,
            )
        last = len(rows.passes) - 1
        forward = _ForwardPass(output, scores, wrt, self._arithmetic.is_narrow)
        found = [self._backward(rows, s, forward, upload, keep=k < last) for k, s in enumerate(rows.passes)]
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return tuple(arriving.evaluation() for parts in zip(*found, strict=True) for arriving in parts)

    def _backward(
        self, rows: Rows, selectors: Sequence[Selector], forward: _ForwardPass, upload: _Uploads, *, keep: bool
    ) -> list[_Arriving]:
        """One backward pass with a selector per segment; `keep` leaves the graph to further ones."""
        scores = forward.scores.detach()
        gradients = forward.gradients(self._cotangent(rows, selectors, scores, upload), keep=keep)
        with torch.no_grad():
            return self._reduced(rows, selectors, scores, gradients, upload)

    def _output(self, function: Differentiation, points: Mapping[str, Tensor]) -> Tensor:
        """The model's output of all rows, in the element type that it states."""
        spec = self.signature.output(function.output)
        position = self.signature.outputs.index(spec)
        inputs = [points[spec.name] for spec in self.signature.inputs]
        with self._arithmetic.forward():
            if not self.fixed_batch:
                return self._forward(inputs)[position].to(torch_dtype(spec.dtype))
            each = [self._forward(self._one_row(inputs, row))[position] for row in range(len(inputs[0]))]
            return torch.cat(each).to(torch_dtype(spec.dtype))

    def _scored(self, function: Differentiation, output: Tensor) -> Tensor:
        """The scores of all rows, shape (rows, *score shape)."""
        return _with_head(output, function.head, self.signature.output(function.output))

    def _one_row(self, inputs: Sequence[Tensor], row: int) -> list[Tensor]:
        specs = self.signature.inputs
        return [t[row : row + 1] if spec.batched else t[row] for spec, t in zip(specs, inputs, strict=True)]

    def _points(self, rows: Rows, upload: _Uploads) -> dict[str, Tensor]:
        """The inputs of all rows, interpolated on the device."""
        points: dict[str, Tensor] = {}
        for spec in self.signature.inputs:
            first = rows.segments[0].start if spec.name in rows.segments[0].start else rows.segments[0].fixed
            shape = (rows.row_count, *first[spec.name].shape)
            points[spec.name] = self._empty(shape, torch_dtype(spec.dtype))
            for segment, span in zip(rows.segments, _spans(rows), strict=True):
                self._interpolate(points[spec.name][span], segment, spec.name, upload)
        return points

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory on the device; a batch of images is laid out as the model computes."""
        layout = self._memory_format if len(shape) == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device=self._device, memory_format=layout)

    def _interpolate(self, points: Tensor, segment: Segment, name: str, upload: _Uploads) -> None:
        """Writes (1 - alpha) x start + alpha x end, which is exact at both ends."""
        if name not in segment.start:
            points.copy_(upload(segment.fixed[name]))
            return
        start, end = segment.start[name], segment.end[name]
        if start is end:
            points.copy_(upload(end))
            return
        shape = (-1, *[1] * end.ndim)
        to_end = torch.tensor(segment.alphas, dtype=points.dtype, device=self._device).reshape(shape)
        to_start = torch.tensor(1.0 - segment.alphas, dtype=points.dtype, device=self._device).reshape(shape)
        torch.mul(upload(start), to_start, out=points)
        points.addcmul_(upload(end), to_end)

    def _cotangent(self, rows: Rows, selectors: Sequence[Selector], scores: Tensor, upload: _Uploads) -> Tensor:
        """Each segment's selector on its rows, shape (rows, elements of a score tensor)."""
        cotangent = torch.zeros_like(scores)
        for selector, span in zip(selectors, _spans(rows), strict=True):
            indices, weights = upload(selector.indices), upload(selector.weights).to(scores.dtype)
            part = cotangent[span]
            part.index_add_(1, indices, weights.expand(len(part), -1))
        return cotangent

    def _reduced(
        self,
        rows: Rows,
        selectors: Sequence[Selector],
        scores: Tensor,
        gradients: Mapping[str, Tensor],
        upload: _Uploads,
    ) -> list[_Arriving]:
        """Scores and weighted sums per segment."""
        return [
            _Arriving(
                self._download(self._selected(scores[span], selector, upload)),
                {name: self._download(self._weighted_sum(g[span], segment)) for name, g in gradients.items()},
            )
            for segment, selector, span in zip(rows.segments, selectors, _spans(rows), strict=True)
        ]

    def _selected(self, scores: Tensor, selector: Selector, upload: _Uploads) -> Tensor:
        """Score of each row at the selector, float64."""
        return scores[:, upload(selector.indices)].double() @ upload(selector.weights).double()

    def _weighted_sum(self, gradients: Tensor, segment: Segment) -> Tensor:
        """Sum over rows of weight x gradient; rows of weight 0 are left out, for 0 x NaN is NaN."""
        kept = np.flatnonzero(segment.weights)
        if len(kept) < len(gradients):
            gradients = gradients[torch.from_numpy(kept).to(self._device)]
        precise = gradients.dtype if gradients.dtype is torch.float64 else torch.float32
        weights = torch.tensor(segment.weights[kept], dtype=precise, device=self._device)
        shape = gradients.shape[1:]
        return (weights @ gradients.to(precise).reshape(len(gradients), element_count(shape))).reshape(shape)

    def _download(self, tensor: Tensor) -> Tensor:
        return tensor.to("cpu", non_blocking=True)


class _Uploads:
    """Copies on a device of the arrays of one micro-batch, one of each object: all segments of a path have its ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: dict[int, tuple[NDArray[np.generic], Tensor]] = {}

    def __call__(self, array: NDArray[np.generic]) -> Tensor:
        """The copy, which may be used on the device only, and not changed."""
        if id(array) not in self._copies:
            self._copies[id(array)] = array, self._copy(array)  # with the array, lest another one gets its id
        return self._copies[id(array)][1]

    def _copy(self, array: NDArray[np.generic]) -> Tensor:
        """The array may be read-only, which torch does not know."""
        copy = torch.empty(array.shape, dtype=torch_dtype(array.dtype), pin_memory=self._device.type == "cuda")
        copy.numpy()[...] = array
        return copy.to(self._device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class _ForwardPass:
    """A forward pass of all rows, to take gradients of.

    Attributes:
        scores: shape (rows, elements of a score tensor).
        scaled: go down from the output with scaled cotangents, which sixteen bits can hold.
    """

    output: Tensor
    scores: Tensor
    wrt: Mapping[str, Tensor]
    scaled: bool

    def gradients(self, cotangent: Tensor, *, keep: bool) -> dict[str, Tensor]:
        """Of every row; `keep` leaves the graph to further backward passes."""
        if not self.scaled:
            return self._down(self.scores, cotangent, keep)
        (at_output,) = torch.autograd.grad(self.scores, self.output, cotangent, retain_graph=True)
        scales = row_scales(at_output)
        gradients = self._down(self.output, at_output * scales.reshape(-1, *[1] * (at_output.ndim - 1)), keep)
        return {name: g / scales.reshape(-1, *[1] * (g.ndim - 1)) for name, g in gradients.items()}

    def _down(self, of: Tensor, cotangent: Tensor, keep: bool) -> dict[str, Tensor]:
        found = torch.autograd.grad(
            of, list(self.wrt.values()), cotangent, retain_graph=keep, allow_unused=True, materialize_grads=True
        )
        return dict(zip(self.wrt, found, strict=True))


@dataclass(frozen=True, eq=False)
class _Arriving:
    """Tensors on their way to the host, which hold their values once the device is synchronised."""

    scores: Tensor
    gradient_sums: Mapping[str, Tensor]

    def evaluation(self) -> SegmentEvaluation:
        return SegmentEvaluation(self.scores.numpy(), {name: sums.numpy() for name, sums in self.gradient_sums.items()})


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


def torch_dtype(dtype: np.dtype[np.generic]) -> torch.dtype:
    """torch's name for an element type of numpy."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


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


def _spans(rows: Rows) -> list[slice]:
    """Where each segment's rows lie in the batch."""
    ends = np.cumsum([segment.row_count for segment in rows.segments]).tolist()
    return [slice(end - segment.row_count, end) for segment, end in zip(rows.segments, ends, strict=True)]


def _forward_parts(segment: Segment, scores: NDArray[np.generic]) -> Iterator[SegmentEvaluation]:
    """Scores at each selector of forward-only rows, or their score tensors where there is none."""
    if not segment.selectors:
        yield SegmentEvaluation(np.empty(0), outputs=scores)
    for selector in segment.selectors:
        yield SegmentEvaluation(np.array([selector.value(row) for row in scores], np.float64))


def _with_head(output: Tensor, head: ScoreHead, spec: OutputSpec) -> Tensor:
    axis = -1 if spec.class_axis is None else spec.class_axis
    match head:
        case ScoreHead.IDENTITY:
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
