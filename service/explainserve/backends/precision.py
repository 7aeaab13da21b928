"""What a reduced precision costs: by how much a whole map changes, measured at load beside the same model in float32.

The adaptive rule cannot see this error: it is in every gradient, however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from explainserve.backends import probe
from explainserve.backends.contract import LoadedModel, LoadOptions
from explainserve.backends.probe import ProbeResult, free_extents, gradient_rows, relative_difference, sample_instances
from explainserve.errors import EvaluationFailed, ModelRefused, Unsupported
from explainserve.plan import Rows, Segment

LARGEST_MAP_ERROR = 0.5
"""Relative L2 error above which a map says more about the precision than about the model."""

_INSTANCES = 3
STEPS = 16
"""Rows of the path of a map."""


def check(model: LoadedModel, reference: LoadedModel, precision: str) -> ProbeResult:
    """What `probe.check` finds, of a model that has also been loaded in float32.

    Whether rows see each other is found out in float32, where rounding is not taken for it.

    Raises:
        ModelRefused: as `probe.check`; or maps are not usable in this precision (PRECISION_UNUSABLE).
        MemoryError: memory ran out.
    """
    found = probe.check(reference)
    error = map_error(model, reference)
    if error is not None and not error <= LARGEST_MAP_ERROR:
        raise ModelRefused(
            "PRECISION_UNUSABLE",
            f"maps of random rows in {precision} differ from those in float32 by a relative {error:.2g}, "
            f"more than {LARGEST_MAP_ERROR:g}; serve the model in another precision",
            precision=precision,
            map_error=f"{error:.3g}",
        )
    measured = None if found.noise_floor is None else probe.noise_floor(model)
    return replace(found, noise_floor=measured, precision_map_error=error)


def reference_options(options: LoadOptions) -> LoadOptions:
    """Those of the same model in float32: on the CPU where a device has only less."""
    return replace(options, device="cpu") if options.device.startswith("tensorrt") else options


def map_error(model: LoadedModel, reference: LoadedModel) -> float | None:
    """Relative L2 difference of Integrated Gradients maps of random rows from zeros, midpoint rule of 16 steps.

    Returns:
        The median over rows, of the output where it is largest; None where there is no gradient, or the model runs at
        none of the extents that are guessed for its free axes.
    """
    if reference.gaps or reference.signature.undifferentiable_reason:
        return None
    for extents in free_extents(reference.signature):
        try:
            return max(_errors(model, reference, extents), default=None)
        except EvaluationFailed as failure:
            if failure.reason == "OUT_OF_MEMORY":
                raise MemoryError(failure.message) from failure
    return None


def _errors(model: LoadedModel, reference: LoadedModel, extents: probe.FreeExtents) -> Iterator[float]:
    """The median error of each output that has a gradient."""
    for rows in gradient_rows(reference.signature, sample_instances(reference.signature, _INSTANCES, extents)):
        paths = [_path(segment) for segment in rows.segments]
        try:
            exact = [_map(reference, path) for path in paths]
            found = [_in_precision(model, path) for path in paths]
        except Unsupported:
            continue
        yield float(np.median([relative_difference(*pair) for pair in zip(found, exact, strict=True)]))


def _in_precision(model: LoadedModel, path: Segment) -> NDArray[np.float64]:
    """The map of a path that runs in float32.

    Raises:
        ModelRefused: it does not run in the precision of the model (PRECISION_UNUSABLE).
        EvaluationFailed: memory ran out.
    """
    try:
        return _map(model, path)
    except EvaluationFailed as failure:
        if failure.reason == "OUT_OF_MEMORY":
            raise
        text = f"what runs in float32 does not run in this precision: {failure.message}"
        raise ModelRefused("PRECISION_UNUSABLE", text) from failure


def _path(point: Segment) -> Segment:
    """The straight path from zeros to a point."""
    alphas = (np.arange(STEPS) + 0.5) / STEPS
    zeros = {name: np.zeros_like(value) for name, value in point.end.items()}
    return replace(point, start=zeros, alphas=alphas, weights=np.full(STEPS, 1 / STEPS))


def _map(model: LoadedModel, path: Segment) -> NDArray[np.float64]:
    """Integrated Gradients of all moving inputs, flat."""
    (evaluation,) = model.evaluate(Rows(path.function, (path,)))
    maps = [path.end[name] * evaluation.gradient_sums[name].astype(np.float64) for name in path.end]
    return np.concatenate([values.ravel() for values in maps])
