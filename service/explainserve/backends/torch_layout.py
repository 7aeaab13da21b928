"""In which order the numbers of images lie in memory: contiguous, or with the channels last.

Convolutions of most processors compute fastest with the channels last, but not of all models: each change between the
two is a copy. So both are timed at load, and the faster stays. They differ by rounding alone; where a graph reads
memory in an order of its own, so that scores differ by more, the contiguous one stays. (Gradients may well differ by
more, where rounding moves a point over a corner of a ReLU.)
"""

from __future__ import annotations

from collections.abc import Callable

from explainserve.backends.contract import LoadedModel
from explainserve.backends.probe import output_rows, relative_difference, sample_instances, values
from explainserve.backends.timing import least_seconds, random_row, repeated
from explainserve.backends.torch_rows import TorchModel
from explainserve.errors import EvaluationFailed
from explainserve.plan import Rows

LARGEST_DIFFERENCE = 5e-2
"""Relative L2 difference of scores that is taken for rounding, in any precision."""

_TIMED_ROWS = 4


def in_faster_layout(
    contiguous: TorchModel,
    with_channels_last: Callable[[], TorchModel],
    seconds: Callable[[LoadedModel, Rows], float] = least_seconds,
) -> TorchModel:
    """The faster of two forms of a model.

    Args:
        with_channels_last: makes the other form, of a model with convolutions of images.
        seconds: measures the evaluation of a micro-batch.
    """
    try:
        rows = repeated(random_row(contiguous), 1 if contiguous.fixed_batch else _TIMED_ROWS)
        other = with_channels_last()
        if _agree(contiguous, other) and seconds(other, rows) < seconds(contiguous, rows):
            return other
    except EvaluationFailed:  # as of views that a layout does not allow, or of unlucky guesses of free axes
        pass
    return contiguous


def _agree(one: TorchModel, other: TorchModel) -> bool:
    """Whether all scores of a random row are the same but for rounding."""
    return all(
        relative_difference(*(values(model.evaluate(rows))[0] for model in (one, other))) <= LARGEST_DIFFERENCE
        for rows in output_rows(one.signature, sample_instances(one.signature, 1))
    )
