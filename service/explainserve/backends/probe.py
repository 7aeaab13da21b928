"""What is found out about a model right after it is loaded, by evaluating a few random rows of it.

Micro-batches assume that rows do not see each other. A model that mixes the rows of its batch (batch statistics, a mean
over the batch, attention across it) would give answers that depend on who else is asking, so it is found here and then
evaluated row by row. The same comparison measures by how much rounding alone moves a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from explainserve.backends.contract import LoadedModel
from explainserve.errors import EvaluationFailed, ModelRefused, Unsupported
from explainserve.plan import Differentiation, Rows, Segment, SegmentEvaluation, Selector, Tensors
from explainserve.signature import InputSpec, ScoreHead, Signature

MIXING_THRESHOLD = 1e-3
"""Relative L2 difference between a row together with others and alone, above which rows see each other."""

_ROWS = 3
_SEED = 20240229
_FREE_EXTENT = 8
_FREE_SPATIAL_EXTENT = 32
_MAX_SELECTED = 64


@dataclass(frozen=True)
class ProbeResult:
    """What a model turned out to be.

    Attributes:
        rows_independent: rows may share a batch with any others.
        noise_floor: median relative L2 difference of a row's input gradient together with others and alone; 0 where it
            was not measured, or where every row is evaluated alone.
        warnings: sentences for people.
    """

    rows_independent: bool
    noise_floor: float
    warnings: tuple[str, ...] = ()


def check(model: LoadedModel) -> ProbeResult:
    """Evaluates three random rows together, together again, and each alone.

    Raises:
        ModelRefused: it does not evaluate at its own static shapes (PROBE_FAILED), or two evaluations of the same rows
            differ (TRAINING_MODE).
    """
    instances = sample_instances(model.signature, _ROWS)
    try:
        outputs = [_Comparison.of(model, rows) for rows in _output_rows(model.signature, instances)]
        gradients = list(_gradient_comparisons(model, instances))
    except EvaluationFailed as error:
        return _not_probed(model.signature, error)
    if any(comparison.repeated > MIXING_THRESHOLD for comparison in [*outputs, *gradients]):
        raise ModelRefused(
            "TRAINING_MODE",
            "two evaluations of the same rows differ: the model was exported in training mode, or draws random numbers",
        )
    noise_floor = max((comparison.median for comparison in gradients), default=0.0)
    independent = max([noise_floor, *(comparison.largest for comparison in outputs)]) <= MIXING_THRESHOLD
    return ProbeResult(
        independent, noise_floor if independent else 0.0, tuple(_warnings(model, independent, outputs, gradients))
    )


def sample_instances(signature: Signature, count: int) -> tuple[dict[str, NDArray[np.generic]], ...]:
    """Random instances, the same on every call: floating-point inputs in their stated range, else normal; others zero.

    A free axis gets a small extent, the same wherever its name appears.
    """
    random = np.random.default_rng(_SEED)
    return tuple({spec.name: _sample(spec, random) for spec in signature.inputs} for _ in range(count))


def gradient_rows(signature: Signature, instances: Sequence[Tensors]) -> Iterator[Rows]:
    """Per floating-point output, rows that differentiate a random selector of it with respect to all that moves."""
    for spec in signature.outputs:
        if np.issubdtype(spec.dtype, np.floating):
            function = Differentiation(spec.name, ScoreHead.IDENTITY, signature.differentiable_inputs)
            extents = [axis.size for axis in spec.axes[1:]]
            selector = _selector(int(np.prod([1 if size is None else size for size in extents])))
            yield Rows(function, tuple(_one_row(signature, i, function, selector) for i in instances))


@dataclass(frozen=True)
class _Comparison:
    """Differences of the same rows, relative L2; the values themselves are those of all rows together."""

    values: tuple[NDArray[np.float64], ...]
    alone: tuple[float, ...]
    repeated: float

    @classmethod
    def of(cls, model: LoadedModel, rows: Rows) -> _Comparison:
        together, again = _values(model.evaluate(rows)), _values(model.evaluate(rows))
        alone = [_values(model.evaluate(Rows(rows.function, (segment,))))[0] for segment in rows.segments]
        return cls(
            tuple(together),
            tuple(_difference(a, b) for a, b in zip(together, alone, strict=True)),
            max(_difference(a, b) for a, b in zip(together, again, strict=True)),
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


def _output_rows(signature: Signature, instances: Sequence[Tensors]) -> Iterator[Rows]:
    for spec in signature.outputs:
        function = Differentiation(spec.name, ScoreHead.IDENTITY)
        yield Rows(function, tuple(_one_row(signature, instance, function, None) for instance in instances))


def _gradient_comparisons(model: LoadedModel, instances: Sequence[Tensors]) -> Iterator[_Comparison]:
    """Comparisons of the outputs that have a gradient."""
    if model.gaps or not model.signature.differentiable_inputs:
        return
    for rows in gradient_rows(model.signature, instances):
        try:
            yield _Comparison.of(model, rows)
        except Unsupported:
            continue


def _one_row(signature: Signature, instance: Tensors, function: Differentiation, selector: Selector | None) -> Segment:
    moving = {name: instance[name] for name in signature.differentiable_inputs}
    fixed = {name: value for name, value in instance.items() if name not in moving}
    return Segment(moving, moving, fixed, function, np.ones(1), np.ones(1), selector)


def _selector(element_count: int) -> Selector:
    """Random weights on positions spread over the score tensor."""
    indices = np.unique(np.linspace(0, element_count - 1, min(element_count, _MAX_SELECTED)).astype(np.int64))
    weights = np.random.default_rng(_SEED).standard_normal(len(indices)).astype(np.float32)
    return Selector(indices, weights)


def _sample(spec: InputSpec, random: np.random.Generator) -> NDArray[np.generic]:
    shape = tuple(_extent(spec, position) for position in range(len(spec.instance_axes)))
    if not spec.differentiable:
        return np.zeros(shape, spec.dtype)
    if spec.value_range is None:
        return random.standard_normal(shape).astype(spec.dtype)
    values = random.uniform(*spec.value_range, shape)
    return _preprocessed(spec, values).astype(spec.dtype)


def _preprocessed(spec: InputSpec, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(value - mean) / std along the channel axis."""
    if spec.mean is None or spec.std is None:
        return values
    along = [1] * values.ndim
    if spec.channel_axis is not None:
        along[spec.channel_axis] = -1
    mean, std = (np.asarray(v).reshape(along if len(v) > 1 else -1) for v in (spec.mean, spec.std))
    return np.asarray((values - mean) / std, np.float64)


def _extent(spec: InputSpec, position: int) -> int:
    axes = spec.instance_axes
    if (size := axes[position].size) is not None:
        return size
    spatial = spec.spatial_axes or ((1, 2) if len(axes) == 3 else ())
    return _FREE_SPATIAL_EXTENT if position in spatial else _FREE_EXTENT


def _values(evaluations: Iterable[SegmentEvaluation]) -> list[NDArray[np.float64]]:
    """All numbers of each one-row segment: its outputs, or its gradients."""
    return [
        np.concatenate([np.asarray(part, np.float64).ravel() for part in _parts(evaluation)])
        for evaluation in evaluations
    ]


def _parts(evaluation: SegmentEvaluation) -> Iterator[NDArray[np.generic]]:
    yield from evaluation.gradient_sums.values()
    if evaluation.outputs is not None:
        yield evaluation.outputs


def _difference(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """|a - b| / |b| over the elements where both are finite; infinite where not the same ones are."""
    finite = np.isfinite(a)
    if a.shape != b.shape or not np.array_equal(finite, np.isfinite(b)):
        return float("inf")
    distance = float(np.linalg.norm(a[finite] - b[finite]))
    scale = float(np.linalg.norm(b[finite]))
    return 0.0 if distance == 0.0 else distance / scale if scale > 0.0 else float("inf")


def _not_probed(signature: Signature, error: EvaluationFailed) -> ProbeResult:
    """A model may well refuse the extents that were guessed for its free axes, but not its own."""
    if all(axis.size is not None for spec in signature.inputs for axis in spec.instance_axes):
        raise ModelRefused(
            "PROBE_FAILED", f"the model does not evaluate a random row of its own shape: {error.message}"
        ) from error
    return ProbeResult(True, 0.0, (f"not probed at guessed extents of the free axes: {error.message}",))


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
        yield "the gradient is zero at random inputs, so gradient methods will attribute nothing"
