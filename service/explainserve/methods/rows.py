"""Segments of one row: single points, with or without a gradient."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from explainserve.explanation import Question
from explainserve.plan import Differentiation, Segment, SegmentEvaluation, Tensors

_ONE = np.ones(1)
_ONE.setflags(write=False)


def point(question: Question, moving: Tensors, function: Differentiation) -> Segment:
    """One row at given values of the moving inputs: the target's score, and the gradient of a function with a `wrt`.

    Rows at the same arrays are shared with those of other methods and targets.
    """
    selectors = (question.target.selector,)
    return Segment(moving, moving, question.instance.fixed, function, _ONE, _ONE, selectors)


def gradients(evaluated: SegmentEvaluation, question: Question) -> dict[str, NDArray[np.float32]]:
    """Gradients of one row with respect to the moving inputs, float32."""
    return {name: np.asarray(evaluated.gradient_sums[name], np.float32) for name in question.instance.moving}
