"""A function of an ONNX model on micro-batches: the sessions of a graph that has the rows inside it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from explainserve.backends.onnx_passes import Passes
from explainserve.backends.onnx_rows import RowGraph
from explainserve.backends.row_feeds import (
    Array,
    Feeds,
    RowFeeds,
    ends,
    fixed_size,
    joined,
    selector_feeds,
    single_rows,
    spans,
)
from explainserve.errors import EvaluationFailed
from explainserve.plan import Differentiation, Rows, Segment, SegmentEvaluation, Selector
from explainserve.signature import InputSpec, element_count


@dataclass(frozen=True, eq=False)
class OnnxFunction:
    """Scores of a model, and their gradients where the graph has any.

    Attributes:
        sessions: of `graph`.
        inputs: of the graph: of the model, or layers that stand in their place.
        function: what is computed.
        starts: inputs of the graph that have the value of one of `inputs` at the start of the path, by its name.
        bare: names of inputs and outputs without a batch axis; rows come one at a time then.
        one_row: whether the graph takes one row at a time.
        padded: whether micro-batches are filled up to a few sizes.
    """

    sessions: Passes
    graph: RowGraph
    inputs: tuple[InputSpec, ...]
    function: Differentiation
    bare: Collection[str]
    one_row: bool = False
    padded: bool = False
    starts: Mapping[str, str] = field(default_factory=dict)

    def evaluations(self, rows: Rows) -> list[SegmentEvaluation]:
        """What comes back for each segment at each of its selectors, or without one; see `contract.LoadedModel`.

        Raises:
            EvaluationFailed: the model raised, or returned another number of rows (MODEL_RAISED), or memory ran out
                (OUT_OF_MEMORY).
        """
        if not self.one_row or rows.row_count == 1:
            return self._at_once(rows)
        return [
            joined(parts)
            for segment in rows.segments
            for parts in zip(*(self._at_once(row) for row in single_rows(segment)), strict=True)
        ]

    def _at_once(self, rows: Rows) -> list[SegmentEvaluation]:
        if rows.function.wrt:
            return self._differentiated(rows)
        scores, *tapped = self._results(rows)
        self._check_row_count(len(scores), rows)
        parts = [(part, span) for segment, span in spans(rows) for part in _forward_parts(segment, scores[span])]
        return [replace(part, values=self._values(tapped, span, rows)) if tapped else part for part, span in parts]

    def scores(self, rows: Rows) -> Array:
        """Score tensors of all rows, (rows, *score shape), of a graph without gradients; those filled in come last."""
        return self._results(rows)[0]

    def _results(self, rows: Rows) -> list[Array]:
        """Scores of a graph without gradients, and the values of the taps."""
        ((scores, *tapped),) = self._passes(self._path_feeds(self._feeds(rows)), [{}])
        return [scores[None] if self.function.output in self.bare else scores, *tapped]

    def _values(self, tapped: Sequence[Array], span: slice, rows: Rows) -> dict[str, Array]:
        """Of the taps on the rows of one segment."""
        for array in tapped:
            self._check_row_count(len(array), rows)
        return {name: array[span] for name, array in zip(self.function.taps, tapped, strict=True)}

    def _differentiated(self, rows: Rows) -> list[SegmentEvaluation]:
        own = self._feeds(rows)
        paths = {**self._path_feeds(own), **own.of_segments()}
        seeds = [selector_feeds(selectors, padded=self.padded) for selectors in rows.passes]
        results = self._passes(paths, seeds)
        found = [self._at(rows, selectors, *arrays) for selectors, arrays in zip(rows.passes, results, strict=True)]
        return [evaluation for of_segment in zip(*found, strict=True) for evaluation in of_segment]

    def _at(
        self, rows: Rows, selectors: Sequence[Selector], shape: Array, entries: Array, *sums: Array
    ) -> list[SegmentEvaluation]:
        """What comes back for each segment at one of its selectors."""
        self._check_row_count(1 if self.function.output in self.bare else shape[0], rows)
        wrt = rows.function.wrt
        tapped = sums[len(wrt) :]
        found = []
        for i, (selector, (segment, span)) in enumerate(zip(selectors, spans(rows), strict=True)):
            values = self._values(tapped, span, rows)
            by_tensor = {
                name: of_tensor[i].reshape(_shape(segment, values, name))
                for name, of_tensor in zip(wrt, sums, strict=False)
            }
            scores = _dot(entries[span, : len(selector.indices)], selector)
            found.append(SegmentEvaluation(scores, by_tensor, values=values))
        return found

    def _check_row_count(self, count: int, rows: Rows) -> None:
        expected = fixed_size(rows.row_count) if self.padded else rows.row_count
        if count != expected:
            raise EvaluationFailed("MODEL_RAISED", f"the model returned {count} rows for {expected}")

    def _feeds(self, rows: Rows) -> RowFeeds:
        return RowFeeds(rows, multiplies=self.graph.multiplies, padded=self.padded)

    def _path_feeds(self, feeds: RowFeeds) -> Feeds:
        paths: Feeds = {}
        for spec in self.inputs:
            paths |= feeds.of_input(spec, bare=spec.name in self.bare)
            if spec.name in self.starts:
                paths |= feeds.of_start(spec, self.starts[spec.name])
        return paths

    def _passes(self, feeds: Feeds, seeds: Sequence[Feeds]) -> Iterator[list[Array]]:
        return self.sessions.passes(self._named(feeds), [self._named(seed) for seed in seeds])

    def _named(self, feeds: Feeds) -> Feeds:
        return {self.graph.prefix + name: array for name, array in feeds.items()}


def _shape(segment: Segment, values: Mapping[str, Array], name: str) -> tuple[int, ...]:
    """Of a tensor that is differentiated: a tapped layer, or one that has a value at the ends of the segment."""
    return values[name].shape[1:] if name in values else ends(segment, name)[1].shape


def _forward_parts(segment: Segment, scores: Array) -> Iterator[SegmentEvaluation]:
    """Scores at each selector of forward-only rows, or their score tensors where there is none."""
    if not segment.selectors:
        yield SegmentEvaluation(np.empty(0, np.float64), outputs=scores)
    flat = scores.reshape(len(scores), element_count(scores.shape[1:]))
    for selector in segment.selectors:
        if selector.indices.max(initial=-1) >= flat.shape[1]:
            raise EvaluationFailed("MODEL_RAISED", f"the model returned {flat.shape[1]} scores, fewer than it declares")
        yield SegmentEvaluation(_dot(flat[:, selector.indices], selector))


def _dot(entries: Array, selector: Selector) -> NDArray[np.float64]:
    """The score of each row, of what it has at the entries of a selector."""
    values: NDArray[np.float64] = entries.astype(np.float64) @ selector.weights.astype(np.float64)
    return values
