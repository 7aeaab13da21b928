"""Whether an execution provider computes what the CPU provider computes.

Providers can be wrong: a release for another processor returned a gradient that differed by more than its own size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from explainserve.backends.onnx_binding import RUNS_UNTIL_REPLAY
from explainserve.backends.onnx_function import OnnxFunction
from explainserve.backends.probe import FreeExtents, free_extents, gradient_rows, relative_difference, sample_instances
from explainserve.errors import EvaluationFailed, Unsupported
from explainserve.model_config import Precision
from explainserve.plan import Differentiation, Rows, SegmentEvaluation
from explainserve.signature import Signature

Array = NDArray[np.generic]

LARGEST_DIFFERENCES = {
    Precision.FLOAT32: 1e-2,
    Precision.TF32: 0.1,
    Precision.FLOAT16: 0.1,
    Precision.BFLOAT16: 0.5,
}
"""Relative L2 difference to the CPU provider up to which a provider is believed. Rounding of deep networks stays well
below: float32 has 24 bits, TensorFloat-32 and float16 have 11, bfloat16 has 8."""


def largest_difference(found: Sequence[Array], expected: Sequence[Array]) -> float:
    """The largest relative L2 difference among outputs; infinite where not the same elements are finite."""
    pairs = zip(found, expected, strict=True)
    return max(relative_difference(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs)


def check_equal(
    gradient: OnnxFunction, reference: OnnxFunction, signature: Signature, precision: Precision, device: str
) -> None:
    """Compares a gradient with another one of the same function on random rows.

    Raises:
        Unsupported: they differ by more than `LARGEST_DIFFERENCES` (NOT_DIFFERENTIABLE).
    """
    largest = LARGEST_DIFFERENCES[precision]
    for extents in free_extents(signature):
        rows = _random_rows(gradient.function, signature, extents)
        try:
            difference = max(
                largest_difference(*(_arrays(own.evaluations(again)) for own in (gradient, reference)))
                for again in _in_turn(rows)
            )
        except EvaluationFailed:
            continue
        if difference <= largest:
            return
        raise Unsupported(
            "NOT_DIFFERENTIABLE",
            f"the gradient on {device} differs from that on the CPU by a relative {difference:.2g}, "
            f"more than {largest:g}",
            device=device,
            difference=f"{difference:.3g}",
        )


def _random_rows(function: Differentiation, signature: Signature, extents: FreeExtents) -> Rows:
    drawn = gradient_rows(signature, sample_instances(signature, 2, extents))
    rows = next(rows for rows in drawn if rows.function.output == function.output)
    return Rows(function, tuple(replace(segment, function=function) for segment in rows.segments))


def _in_turn(rows: Rows) -> Iterator[Rows]:
    """Micro-batches of one size until a recorded run has been started again, each unlike the one before."""
    for run in range(RUNS_UNTIL_REPLAY):
        yield replace(rows, segments=rows.segments[:: -1 if run % 2 else 1])


def _arrays(evaluations: Iterable[SegmentEvaluation]) -> list[Array]:
    return [array for found in evaluations for array in (found.scores, *found.gradient_sums.values())]
