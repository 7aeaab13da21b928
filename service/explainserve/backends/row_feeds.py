"""What graphs with `onnx_rows` in them are fed for a micro-batch: arrays per segment, by name."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explainserve.plan import Rows, Segment, SegmentEvaluation, Selector
from explainserve.signature import InputSpec, element_count

Array = NDArray[np.generic]
Places = NDArray[np.int64]
Feeds = dict[str, Array]


def spans(rows: Rows) -> Iterator[tuple[Segment, slice]]:
    """The segments, each with the positions of its rows in the micro-batch."""
    first = 0
    for segment in rows.segments:
        yield segment, slice(first, first + segment.row_count)
        first += segment.row_count


def single_rows(segment: Segment) -> Iterator[Rows]:
    """Each row of a segment as a micro-batch of its own."""
    for row in range(segment.row_count):
        own = slice(row, row + 1)
        yield Rows(segment.function, (replace(segment, alphas=segment.alphas[own], weights=segment.weights[own]),))


def joined(parts: Sequence[SegmentEvaluation]) -> SegmentEvaluation:
    """What came back for consecutive rows of a segment, as one evaluation of them."""
    outputs = [part.outputs for part in parts if part.outputs is not None]
    values = {name: np.concatenate([part.values[name] for part in parts]) for name in parts[0].values}
    sums = {
        name: functools.reduce(np.add, [part.gradient_sums[name] for part in parts]) for name in parts[0].gradient_sums
    }
    return SegmentEvaluation(
        np.concatenate([part.scores for part in parts]), sums, np.concatenate(outputs) if outputs else None, values
    )


def fixed_size(count: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24... that is not below a count."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power > 2 and count <= power * 3 // 4 else power


class RowFeeds:
    """The feeds of one micro-batch.

    Args:
        multiplies: see `onnx_rows.RowGraph`.
        padded: fill rows, segments and ends up to a `fixed_size`. Rows that are filled in repeat the last one, and have
            weight 0.
    """

    def __init__(self, rows: Rows, *, multiplies: bool, padded: bool = False) -> None:
        self._segments = rows.segments
        self._multiplies = multiplies
        self._size = fixed_size if padded else int
        self._rows = np.arange(self._size(rows.row_count))
        self._segment = self._filled(
            np.arange(len(rows.segments)).repeat([segment.row_count for segment in rows.segments])
        )
        self._alphas = self._filled(np.concatenate([segment.alphas for segment in rows.segments]))

    def of_segments(self) -> Feeds:
        """The segment of each row, and the weight that each row has in the sum of each segment, (segments, rows)."""
        own = np.concatenate([segment.weights for segment in self._segments])
        weights = np.zeros((self._size(len(self._segments)), len(self._rows)))
        weights[self._segment[: len(own)], self._rows[: len(own)]] = own
        return {"segment": self._segment, "weights": weights}

    def of_input(self, spec: InputSpec, *, bare: bool = False) -> Feeds:
        """One input of the model. Arrays that are one object, as the ends of all segments of a path are, go in once.

        Args:
            bare: the model takes it without a batch axis; there is a single row then.
        """
        return self._of_ends(spec, [ends(segment, spec.name) for segment in self._segments], bare)

    def of_start(self, spec: InputSpec, name: str) -> Feeds:
        """An input of that name that has the value of one of the model at the start of the path, on every row."""
        starts = [ends(segment, spec.name)[0] for segment in self._segments]
        return self._of_ends(replace(spec, name=name), [(start, start) for start in starts], bare=False)

    def _of_ends(self, spec: InputSpec, pairs: Sequence[tuple[Array, Array]], bare: bool) -> Feeds:
        distinct = {id(array): array for pair in pairs for array in pair}
        places = {key: place for place, key in enumerate(distinct)}
        start, end = np.array([[places[id(array)] for array in pair] for pair in pairs])[self._segment].T
        arrays = self._filled(np.array(list(distinct.values()), spec.dtype))
        if spec.differentiable:
            feeds = self._points(arrays, start, end, bare)
        else:
            feeds = {"values": arrays, "places": end[0, ...] if bare else end}
        return {f"{name}/{spec.name}": array for name, array in feeds.items()}

    def _filled(self, array: Any) -> Any:
        """With its last row repeated."""
        missing = self._size(len(array)) - len(array)
        return np.concatenate([array, np.repeat(array[-1:], missing, 0)]) if missing else array

    def _points(self, arrays: Array, start: Places, end: Places, bare: bool) -> Feeds:
        """The ends of all paths, flat, what of them makes each row, and the shape of the batch."""
        ends = arrays.reshape(len(arrays), element_count(arrays.shape[1:]))
        shape = arrays.shape[1:] if bare else (len(self._rows), *arrays.shape[1:])
        to_end = np.where(start == end, 1.0, self._alphas)  # what does not move is at its end
        mixture = self._shares if self._multiplies else self._terms
        return {"ends": ends, "shape": np.array(shape, np.int64), **mixture(ends, start, end, to_end)}

    def _shares(self, ends: Array, start: Places, end: Places, to_end: NDArray[np.float64]) -> Feeds:
        """The share of each end in each row, (rows, ends)."""
        shares = np.zeros((len(self._rows), len(ends)), _work(ends))
        shares[self._rows, start] = 1.0 - to_end
        shares[self._rows, end] = to_end
        return {"shares": shares}

    def _terms(self, ends: Array, start: Places, end: Places, to_end: NDArray[np.float64]) -> Feeds:
        """The same as two terms per row. `candidate` is the place of a row that moves among their sums, and behind
        these the place of the end where it does not.
        """
        return {
            "start": start,
            "end": end,
            "to_start": (1.0 - to_end).astype(_work(ends))[:, None],
            "to_end": to_end.astype(_work(ends))[:, None],
            "candidate": np.where(start == end, len(self._rows) + end, self._rows),
        }


def selector_feeds(selectors: Sequence[Selector], *, padded: bool = False) -> Feeds:
    """The entries of one selector per segment and their weights, (segments, most entries); what a selector lacks is
    filled up with entry 0 of weight 0. See `RowFeeds` for `padded`.
    """
    size = fixed_size if padded else int
    shape = (size(len(selectors)), size(max(1, *(len(selector.indices) for selector in selectors))))
    entries, weights = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    for position, selector in enumerate(selectors):
        entries[position, : len(selector.indices)] = selector.indices
        weights[position, : len(selector.weights)] = selector.weights
    return {"entries": entries, "entry_weights": weights}


def ends(segment: Segment, name: str) -> tuple[Array, Array]:
    """The values of an input at the start and at the end of a segment."""
    if name in segment.fixed:
        return segment.fixed[name], segment.fixed[name]
    return segment.start[name], segment.end[name]


def _work(array: Array) -> np.dtype[Any]:
    """The type that shares of numbers have: float32 or better."""
    return np.result_type(array.dtype, np.float32)
