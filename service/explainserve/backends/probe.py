"""What is found out about a model right after it is loaded, by evaluating a few random rows of it.

Micro-batches assume that rows do not see each other. A model that mixes the rows of its batch (batch statistics, a mean
over the batch, attention across it) would give answers that depend on who else is asking, so it is found here and then
evaluated row by row, and so is a model of which it cannot be found out. The same comparison measures by how much
rounding alone moves a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from explainserve.backends.contract import LoadedModel
from explainserve.errors import EvaluationFailed, ModelRefused, Unsupported, first_line, is_out_of_memory
from explainserve.plan import Differentiation, Rows, Segment, SegmentEvaluation, Selector, Tensors
from explainserve.signature import InputSpec, ScoreHead, Signature, element_count

MIXING_THRESHOLD = 1e-3
"""Relative L2 difference between a row together with others and alone, above which rows see each other."""

_ROWS = 3
_SEED = 20240229
_MAX_SELECTED = 64
_MAX_GUESSED_ELEMENTS = 1 << 22


class FreeExtents(NamedTuple):
    """What stands for the free axes of all inputs while a model is tried."""

    other: int
    spatial: int


LIKELIEST = FreeExtents(8, 32)
_OTHER_GUESSES = tuple(FreeExtents(extent, extent) for extent in (8, 16, 32, 64, 128, 224, 5, 10))


@dataclass(frozen=True)
class ProbeResult:
    """What a model turned out to be.

    Attributes:
        rows_independent: rows may share a batch with any others.
        noise_floor: median relative L2 difference of a row's input gradient together with others and alone; None where
            it was not measured: no gradient, nothing that runs, or every row is evaluated alone anyway.
        warnings: sentences for people.
        precision_map_error: relative L2 error of maps of random rows that the model's precision makes; None in float32,
            and where it was not measured. See `precision.map_error`.
    """

    rows_independent: bool
    noise_floor: float | None
    warnings: tuple[str, ...] = ()
    precision_map_error: float | None = None


def check(model: LoadedModel) -> ProbeResult:
    """Evaluates three random rows together, together again, and each alone, at the first free extents that run.

    Raises:
        ModelRefused: it does not evaluate at its own static shapes (PROBE_FAILED), or two evaluations of the same rows
            differ (TRAINING_MODE).
        MemoryError: memory ran out.
    """
    failures = []
    for extents in free_extents(model.signature):
        try:
            return _compared(model, sample_instances(model.signature, _ROWS, extents))
        except EvaluationFailed as error:
            if error.reason == "OUT_OF_MEMORY":
                raise MemoryError(error.message) from error
            failures.append(error)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise MemoryError(first_line(error)) from error
            told = f"its outputs are not what the file declares ({type(error).__name__}: {first_line(error)})"
            failures.append(EvaluationFailed("MODEL_RAISED", told))
    return _not_compared(model.signature, failures[0])


def free_extents(signature: Signature) -> tuple[FreeExtents, ...]:
    """Guesses for the free axes, the likeliest first; a single one where no axis is free. Huge ones are left out."""
    if not has_free_axes(signature):
        return (LIKELIEST,)
    others = (guess for guess in _OTHER_GUESSES if _guessed_elements(signature, guess) <= _MAX_GUESSED_ELEMENTS)
    return (LIKELIEST, *others)


def sample_instances(
    signature: Signature, count: int, extents: FreeExtents = LIKELIEST
) -> tuple[dict[str, NDArray[np.generic]], ...]:
    """Random instances, the same on every call.

    Floating-point inputs are drawn from their stated range, else from a normal distribution; integers from their stated
    range, else they are zero, which every table of embeddings has.
    """
    random = np.random.default_rng(_SEED)
    return tuple({spec.name: _sample(spec, random, extents) for spec in signature.inputs} for _ in range(count))


def _compared(model: LoadedModel, instances: Sequence[Tensors]) -> ProbeResult:
    outputs = [_Comparison.of(model, rows) for rows in output_rows(model.signature, instances)]
    gradients = list(_gradient_comparisons(model, instances))
    if any(comparison.repeated > MIXING_THRESHOLD for comparison in [*outputs, *gradients]):
        raise ModelRefused(
            "TRAINING_MODE",
            "two evaluations of the same rows differ: the model was exported in training mode, or draws random numbers",
        )
    noise_floor = max((comparison.median for comparison in gradients), default=None)
    independent = max([noise_floor or 0.0, *(comparison.largest for comparison in outputs)]) <= MIXING_THRESHOLD
    measured = independent and not model.fixed_batch
    return ProbeResult(
        independent, noise_floor if measured else None, tuple(_warnings(model, independent, outputs, gradients))
    )


def noise_floor(model: LoadedModel) -> float | None:
    """See `ProbeResult`; None where the model runs at none of the guessed extents."""
    for extents in free_extents(model.signature):
        try:
            compared = _gradient_comparisons(model, sample_instances(model.signature, _ROWS, extents))
            return max((comparison.median for comparison in compared), default=None)
        except EvaluationFailed:
            continue
    return None


def gradient_rows(signature: Signature, instances: Sequence[Tensors]) -> Iterator[Rows]:
    """Per floating-point output, rows that differentiate a random selector of it with respect to all that moves."""
    for spec in signature.outputs:
        if np.issubdtype(spec.dtype, np.floating):
            function = Differentiation(spec.name, ScoreHead.IDENTITY, signature.differentiable_inputs)
            extents = [axis.size for axis in spec.axes[1:]]
            selector = _selector(math.prod(1 if size is None else size for size in extents))
            yield Rows(function, tuple(_one_row(signature, i, function, selector) for i in instances))


def output_rows(signature: Signature, instances: Sequence[Tensors]) -> Iterator[Rows]:
    """Per output, forward-only rows."""
    for spec in signature.outputs:
        function = Differentiation(spec.name, ScoreHead.IDENTITY)
        yield Rows(function, tuple(_one_row(signature, instance, function) for instance in instances))


def _gradient_comparisons(model: LoadedModel, instances: Sequence[Tensors]) -> Iterator[_Comparison]:
    """Comparisons of the outputs that have a gradient."""
    if model.gaps or model.signature.undifferentiable_reason:
        return
    for rows in gradient_rows(model.signature, instances):
        try:
            yield _Comparison.of(model, rows)
        except Unsupported:
            continue


@dataclass(frozen=True)
class _Comparison:
    """Differences of the same rows, relative L2; the values themselves are those of all rows together."""

    values: tuple[NDArray[np.float64], ...]
    alone: tuple[float, ...]
    repeated: float

    @classmethod
    def of(cls, model: LoadedModel, rows: Rows) -> _Comparison:
        together, again = values(model.evaluate(rows)), values(model.evaluate(rows))
        alone = [values(model.evaluate(Rows(rows.function, (segment,))))[0] for segment in rows.segments]
        return cls(
            tuple(together),
            tuple(relative_difference(a, b) for a, b in zip(together, alone, strict=True)),
            max(relative_difference(a, b) for a, b in zip(together, again, strict=True)),
        )

    @property
    def largest(self) -> float:
        return max(self.alone)

    @property
    def median(self) -> float:
        return float(np.median(self.alone))

    @property
    def finite(self) -> bool:
        return all(bool(np.isfinite(value).all()) for value in self.values)

    @property
    def vanishes(self) -> bool:
        return not any(value.any() for value in self.values)


def _one_row(signature: Signature, instance: Tensors, function: Differentiation, *selectors: Selector) -> Segment:
    moving = {name: instance[name] for name in signature.differentiable_inputs}
    fixed = {name: value for name, value in instance.items() if name not in moving}
    return Segment(moving, moving, fixed, function, np.ones(1), np.ones(1), selectors)


def _selector(element_count: int) -> Selector:
    """Random weights on positions spread over the score tensor."""
    indices = np.unique(np.linspace(0, element_count - 1, min(element_count, _MAX_SELECTED)).astype(np.int64))
    weights = np.random.default_rng(_SEED).standard_normal(len(indices)).astype(np.float32)
    return Selector(indices, weights)


def _sample(spec: InputSpec, random: np.random.Generator, extents: FreeExtents) -> NDArray[np.generic]:
    shape = _shape(spec, extents)
    if not spec.differentiable:
        low, high = spec.integer_range or (0, 0)
        return np.asarray(random.integers(low, high, shape, dtype=spec.dtype, endpoint=True))
    if spec.value_range is None:
        return np.asarray(random.standard_normal(shape), spec.dtype)
    return _preprocessed(spec, np.asarray(random.uniform(*spec.value_range, shape))).astype(spec.dtype)


def _preprocessed(spec: InputSpec, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the model gets for values of the stated range, which are its own where no mean and std are stated."""
    if spec.mean is None:
        return values
    if spec.channel_axis is None:
        return spec.model_value(values).reshape(values.shape)
    return np.moveaxis(spec.model_value(np.moveaxis(values, spec.channel_axis, -1)), -1, spec.channel_axis)


def has_free_axes(signature: Signature) -> bool:
    """Whether an input accepts several extents of another axis than the batch."""
    return any(axis.size is None for spec in signature.inputs for axis in spec.instance_axes)


def _guessed_elements(signature: Signature, extents: FreeExtents) -> int:
    """Elements of one instance."""
    return sum(element_count(_shape(spec, extents)) for spec in signature.inputs)


def _shape(spec: InputSpec, extents: FreeExtents) -> tuple[int, ...]:
    """Shape of one instance."""
    axes = spec.instance_axes
    spatial = spec.spatial_axes or ((1, 2) if len(axes) == 3 else ())
    guessed = (extents.spatial if position in spatial else extents.other for position in range(len(axes)))
    return tuple(guess if axis.size is None else axis.size for axis, guess in zip(axes, guessed, strict=True))


def values(evaluations: Iterable[SegmentEvaluation]) -> list[NDArray[np.float64]]:
    """All numbers of each one-row segment: its outputs, or its gradients."""
    return [
        np.concatenate([np.asarray(part, np.float64).ravel() for part in _parts(evaluation)])
        for evaluation in evaluations
    ]


def _parts(evaluation: SegmentEvaluation) -> Iterator[NDArray[np.generic]]:
    yield from evaluation.gradient_sums.values()
    if evaluation.outputs is not None:
        yield evaluation.outputs


def relative_difference(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """|a - b| / |b| over the elements where both are finite; infinite where not the same ones are."""
    finite = np.isfinite(a)
    if a.shape != b.shape or not np.array_equal(finite, np.isfinite(b)):
        return float("inf")
    distance = float(np.linalg.norm(a[finite] - b[finite]))
    scale = float(np.linalg.norm(b[finite]))
    return 0.0 if distance == 0.0 else distance / scale if scale > 0.0 else float("inf")


def _not_compared(signature: Signature, error: EvaluationFailed) -> ProbeResult:
    """A model may well refuse every extent that was guessed for its free axes, but not its own."""
    if not has_free_axes(signature):
        raise ModelRefused(
            "PROBE_FAILED", f"the model does not evaluate a random row of its own shape: {error.message}"
        ) from error
    warning = (
        "whether rows of a batch influence each other could not be checked, since the model runs at none of the "
        "extents guessed for its free axes, so every row is evaluated alone; state the extents in model.toml. "
        f"The first guess failed: {error.message}"
    )
    return ProbeResult(False, None, (warning,))


def _warnings(
    model: LoadedModel, independent: bool, outputs: Sequence[_Comparison], gradients: Sequence[_Comparison]
) -> Iterator[str]:
    if not independent:
        yield "rows of a batch influence each other, so every row is evaluated alone"
    if model.fixed_batch:
        yield "the file accepts one row at a time, so every row is evaluated alone"
    if not all(comparison.finite for comparison in outputs):
        yield "outputs at random inputs are not all finite"
    if not all(comparison.finite for comparison in gradients):
        yield "gradients at random inputs are not all finite"
    if gradients and all(comparison.vanishes for comparison in gradients):
        yield _vanishing(model.signature)


def _vanishing(signature: Signature) -> str:
    """Zeros of an integer input may well be what makes a gradient zero."""
    zeros = [spec.name for spec in signature.inputs if not spec.differentiable and spec.integer_range is None]
    if not zeros:
        return "the gradient is zero at random inputs, so gradient methods will attribute nothing"
    return (
        f"the gradient is zero where {', '.join(zeros)} is zero, which is all that was tried; "
        "state its value_range in model.toml to have others tried"
    )
