"""Paths that are walked piece by piece: one gradient for each, and the sum of gradient times way over all.

The pieces follow each other from the start of the path to the instance. Where time ends on the way, the rest of the
path is taken as one piece with the gradient of the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from explainserve.explanation import Attribution, Question, StopReason
from explainserve.plan import SegmentEvaluation, Tensors

Way = Mapping[str, NDArray[np.float64]]


def way(start: Tensors, end: Tensors) -> Way:
    """From one point to another, by input."""
    return {name: end[name].astype(np.float64) - value.astype(np.float64) for name, value in start.items()}


@dataclass(frozen=True, eq=False)
class Walk:
    """The pieces of a path that are done.

    Attributes:
        sums: of gradient x way, by input, float64; empty before the first piece.
        gradient: of the last piece.
        alphas, scores: of the nodes, ascending; with a start that is evaluated by itself.
        piece_count: number of pieces.
    """

    sums: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    gradient: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    alphas: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
    piece_count: int = 0

    def at(self, alpha: float, node: SegmentEvaluation) -> Walk:
        """With the score of a node."""
        return replace(self, alphas=(*self.alphas, alpha), scores=(*self.scores, float(node.scores[0])))

    def along(self, step: Way, gradient: Mapping[str, NDArray[np.floating]]) -> Walk:
        """With one more piece."""
        sums = {name: self.sums.get(name, 0) + change * gradient[name] for name, change in step.items()}
        return replace(self, sums=sums, gradient=gradient, piece_count=self.piece_count + 1)

    def cut_short(self, question: Question, position: Tensors) -> Attribution:
        """The answer if time ends at a position: what is left of the path is one piece."""
        rest = way(position, question.instance.moving)
        answer = self.along(rest, self.gradient).attribution(question)
        return replace(answer, stop_reason=StopReason.TIME_BUDGET, step_count=self.piece_count)

    def attribution(self, question: Question) -> Attribution:
        """The answer at the end of the path, which is the instance."""
        with np.errstate(over="ignore"):
            tensors = {name: total.astype(np.float32) for name, total in self.sums.items()}
        return Attribution(
            tensors,
            self.piece_count,
            alphas=np.array([*self.alphas, 1.0]),
            scores=np.array([*self.scores, question.instance_output_value]),
            baseline_output_value=self.scores[0],
        ).checked()
