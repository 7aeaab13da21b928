"""What is evaluated: segments of paths, the rows on them, and the sums that come back.

This is where methods, scheduling and backends meet; none of them knows another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from explainserve.signature import ScoreHead

Tensors = Mapping[str, NDArray[np.generic]]
"""Arrays of one instance by input name, without the batch axis."""


@dataclass(frozen=True, eq=False)
class Selector:
    """What a target is over the score tensor of one row: a constant sparse linear form.

    Attributes:
        indices: flat row-major positions in the score tensor without the batch axis, int64, shape (k,).
        weights: float32, shape (k,).
    """

    indices: NDArray[np.int64]
    weights: NDArray[np.float32]

    def value(self, scores: NDArray[np.generic]) -> float:
        """The score of one row, in float64.

        Args:
            scores: score tensor of the row, any shape.
        """
        picked = scores.reshape(-1)[self.indices].astype(np.float64)
        return float(picked @ self.weights.astype(np.float64))


@dataclass(frozen=True)
class GradientRule:
    """How the backward pass treats operators.

    Attributes:
        name: "standard" for derivatives, or that of a rule that alters the backward pass.
        options: of the rule, by name.
    """

    name: str = "standard"
    options: tuple[tuple[str, float], ...] = ()


STANDARD = GradientRule()


@dataclass(frozen=True)
class Differentiation:
    """Which function of a model rows evaluate, and with respect to what.

    Attributes:
        output: name of the output.
        head: appended to it.
        wrt: names of the tensors that are differentiated, inputs, or layers too; () for forward-only rows.
        rule: of the backward pass.
        taps: names of layers whose values come back, for each row.
        cut: names of layers that stand where inputs stand: the ends of a segment give their values, and nothing before
            them is evaluated but what other routes need.
    """

    output: str
    head: ScoreHead
    wrt: tuple[str, ...] = ()
    rule: GradientRule = STANDARD
    taps: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Segment:
    """A straight piece of a path with the rows on it: points (1 - alpha) x start + alpha x end.

    Attributes:
        start, end: the moving inputs at alpha = 0 and 1.
        fixed: inputs that keep their value.
        function: what is evaluated; forward-only where its `wrt` is empty.
        alphas: float64, shape (rows,), each in [0, 1].
        weights: of the gradients in the sum, float64, shape (rows,); rows of weight 0 are left out of it.
        selectors: the scores that are computed, and differentiated where the function has a `wrt`: one backward pass
            each, after one forward pass for all. () only where it has none: whole score tensors come back.
    """

    start: Tensors
    end: Tensors
    fixed: Tensors
    function: Differentiation
    alphas: NDArray[np.float64]
    weights: NDArray[np.float64]
    selectors: tuple[Selector, ...] = ()

    @property
    def row_count(self) -> int:
        """Number of rows, each with one forward pass."""
        return len(self.alphas)

    @property
    def backward_count(self) -> int:
        """Number of backward passes of rows."""
        return self.row_count * len(self.selectors) if self.function.wrt else 0

    @property
    def evaluation_count(self) -> int:
        """Number of `SegmentEvaluation`s that come back: one per selector, or one with the score tensors."""
        return max(1, len(self.selectors))


@dataclass(frozen=True, eq=False)
class Plan:
    """Segments to evaluate; their rows are independent of each other and may share micro-batches with any others."""

    segments: tuple[Segment, ...]

    @property
    def row_count(self) -> int:
        """Number of rows of all segments."""
        return sum(segment.row_count for segment in self.segments)

    @property
    def backward_count(self) -> int:
        """Number of backward passes of all rows."""
        return sum(segment.backward_count for segment in self.segments)


@dataclass(frozen=True, eq=False)
class SegmentEvaluation:
    """What came back for one selector of a segment, or of consecutive rows of it; or for a segment without one.

    Attributes:
        scores: of each row at the selector, float64, shape (rows,); empty without a selector.
        gradient_sums: per differentiated input the sum over rows of weight x gradient, in the input's shape.
        outputs: score tensors of rows without a selector, shape (rows, *score shape); None otherwise.
        values: per tapped layer its value at each row, shape (rows, *layer shape).
    """

    scores: NDArray[np.float64]
    gradient_sums: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    outputs: NDArray[np.generic] | None = None
    values: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Evaluations of a plan's segments, in order; those of one segment in the order of its selectors."""

    segments: tuple[SegmentEvaluation, ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """One micro-batch: slices of segments that share function, shapes and number of selectors.

    Attributes:
        function: what is evaluated.
        segments: each with only the rows of this micro-batch, at least one.
    """

    function: Differentiation
    segments: tuple[Segment, ...]

    @property
    def row_count(self) -> int:
        """Number of rows."""
        return sum(segment.row_count for segment in self.segments)

    @property
    def backward_count(self) -> int:
        """Number of backward passes of all rows."""
        return sum(segment.backward_count for segment in self.segments)

    @property
    def passes(self) -> list[tuple[Selector, ...]]:
        """The selectors of each backward pass, one per segment."""
        return list(zip(*(segment.selectors for segment in self.segments), strict=True))


def by_segment(
    segments: Sequence[Segment], evaluations: Sequence[SegmentEvaluation]
) -> Iterator[tuple[SegmentEvaluation, ...]]:
    """Groups evaluations, which come one per selector, by segment.

    Raises:
        ValueError: there are too many or too few.
    """
    expected = sum(segment.evaluation_count for segment in segments)
    if len(evaluations) != expected:
        raise ValueError(f"{len(evaluations)} evaluations came back, expected {expected}")
    arrived = iter(evaluations)
    for segment in segments:
        yield tuple(islice(arrived, segment.evaluation_count))
