"""The rows of one micro-batch on the device: interpolated there, seeded with their selectors, summed by segment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explainserve.backends.torch_queue import Queue
from explainserve.plan import Rows, Segment, SegmentEvaluation, Selector
from explainserve.signature import element_count

Array = NDArray[np.generic]

_ALIGNMENT = 64
"""Bytes; that of torch's own memory on the CPU."""


class Uploads:
    """Copies on a device of the arrays of one micro-batch, one of each object: all segments of a path have its ends.

    All of them lie in one buffer, which goes up in one copy.
    """

    def __init__(self, arrays: Iterable[Array], queue: Queue) -> None:
        self._arrays = {id(array): array for array in arrays}  # held, lest another one gets an id
        sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in self._arrays.values()]
        self._starts = dict(zip(self._arrays, accumulate(sizes, initial=0), strict=False))
        self._copies: dict[int, Tensor] = {}
        host = queue.staging(sum(sizes))
        for array in self._arrays.values():
            self._part(host, array).numpy()[...] = array
        self._buffer = queue.send(host)

    def __call__(self, array: Array) -> Tensor:
        """The copy, which may be used on the device only, and not changed."""
        if id(array) not in self._copies:
            self._copies[id(array)] = self._part(self._buffer, array)
        return self._copies[id(array)]

    def _part(self, buffer: Tensor, array: Array) -> Tensor:
        start = self._starts[id(array)]
        return buffer[start : start + array.nbytes].view(torch_dtype(array.dtype)).reshape(array.shape)


class DeviceRows:
    """A micro-batch on its way through a device.

    Attributes:
        spans: where the rows of each segment lie.

    Args:
        empty: memory of the device for the points of one input, of a shape and an element type.
    """

    def __init__(self, rows: Rows, queue: Queue, empty: Callable[[Sequence[int], torch.dtype], Tensor]) -> None:
        self._rows, self._queue, self._empty = rows, queue, empty
        self.row_count = rows.row_count
        ends = list(accumulate(segment.row_count for segment in rows.segments))
        self.spans = [slice(end - segment.row_count, end) for segment, end in zip(rows.segments, ends, strict=True)]
        self._to_end = np.concatenate([segment.alphas for segment in rows.segments])
        self._to_start = 1.0 - self._to_end
        self._weights = np.concatenate([segment.weights for segment in rows.segments])
        self._kept = [_kept(segment) for segment in rows.segments]
        self._upload = Uploads(self._arrays(), queue)

    def _arrays(self) -> Iterator[Array]:
        """All that the device needs to know."""
        yield from (self._to_end, self._to_start, self._weights)
        yield from (kept for kept in self._kept if kept is not None)
        for segment in self._rows.segments:
            for tensors in (segment.start, segment.end, segment.fixed):
                yield from tensors.values()
            for selector in segment.selectors if self._rows.function.wrt else ():
                yield from (selector.indices, selector.weights)

    def points(self, name: str, dtype: torch.dtype) -> Tensor:
        """An input of all rows, interpolated: (1 - alpha) x start + alpha x end, which is exact at both ends."""
        first = self._rows.segments[0]
        instance = first.start[name] if name in first.start else first.fixed[name]
        points = self._empty((self.row_count, *instance.shape), dtype)
        to_start, to_end = (
            self._upload(factors).to(dtype).reshape(-1, *[1] * instance.ndim)
            for factors in (self._to_start, self._to_end)
        )
        for segment, span in zip(self._rows.segments, self.spans, strict=True):
            if name not in segment.start:
                points[span].copy_(self._upload(segment.fixed[name]))
            elif segment.start[name] is segment.end[name]:
                points[span].copy_(self._upload(segment.end[name]))
            else:
                torch.mul(self._upload(segment.start[name]), to_start[span], out=points[span])
                points[span].addcmul_(self._upload(segment.end[name]), to_end[span])
        return points

    def starts(self, name: str, dtype: torch.dtype) -> Tensor:
        """What an input is at the start of each row's path."""
        first = self._rows.segments[0]
        ends = first.start if name in first.start else first.fixed
        starts = self._empty((self.row_count, *ends[name].shape), dtype)
        for segment, span in zip(self._rows.segments, self.spans, strict=True):
            starts[span].copy_(self._upload((segment.start if name in segment.start else segment.fixed)[name]))
        return starts

    def cotangent(self, selectors: Sequence[Selector], scores: Tensor) -> Tensor:
        """Each segment's selector on its rows, in the shape of the scores: (rows, elements of a score tensor)."""
        cotangent = torch.zeros_like(scores)
        for selector, span in zip(selectors, self.spans, strict=True):
            indices, weights = self._upload(selector.indices), self._upload(selector.weights).to(scores.dtype)
            part = cotangent[span]
            part.index_add_(1, indices, weights.expand(len(part), -1))
        return cotangent

    def sums(
        self, selectors: Sequence[Selector], scores: Tensor, gradients: Mapping[str, Tensor]
    ) -> list[ArrivingSums]:
        """Scores at the selectors, float64, and weighted sums of gradients, by segment."""
        weights = self._upload(self._weights)
        return [
            ArrivingSums(
                self._queue.fetch(self._selected(scores[span], selector)),
                {
                    name: self._queue.fetch(self._weighted_sum(g[span], weights[span], kept))
                    for name, g in gradients.items()
                },
            )
            for selector, span, kept in zip(selectors, self.spans, self._kept, strict=True)
        ]

    def _selected(self, scores: Tensor, selector: Selector) -> Tensor:
        return scores[:, self._upload(selector.indices)].double() @ self._upload(selector.weights).double()

    def _weighted_sum(self, gradients: Tensor, weights: Tensor, kept: Array | None) -> Tensor:
        """Sum over rows of weight x gradient; rows of weight 0 are left out, for 0 x NaN is NaN."""
        if kept is not None:
            gradients, weights = gradients[self._upload(kept)], weights[self._upload(kept)]
        precise = gradients.dtype if gradients.dtype is torch.float64 else torch.float32
        shape = gradients.shape[1:]
        flat = gradients.to(precise).reshape(len(gradients), element_count(shape))
        return (weights.to(precise) @ flat).reshape(shape)


@dataclass(frozen=True, eq=False)
class ArrivingSums:
    """Tensors on their way to the host, of one segment and selector."""

    scores: Tensor
    gradient_sums: Mapping[str, Tensor]
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def with_values(self, values: Mapping[str, Tensor], span: slice) -> ArrivingSums:
        """With the values of layers on the rows of the segment, of those on all rows."""
        return replace(self, values={name: of_rows[span] for name, of_rows in values.items()})

    def evaluations(self) -> Iterator[SegmentEvaluation]:
        """What they hold when they have arrived."""
        sums, values = ({name: t.numpy() for name, t in own.items()} for own in (self.gradient_sums, self.values))
        yield SegmentEvaluation(self.scores.numpy(), sums, values=values)


@dataclass(frozen=True, eq=False)
class ArrivingScores:
    """Scores, and values of layers, of all rows on their way to the host, of segments that are not differentiated."""

    rows: Rows
    spans: Sequence[slice]
    scores: Tensor
    values: Mapping[str, Tensor]

    def evaluations(self) -> Iterator[SegmentEvaluation]:
        """Scores at each selector, or score tensors where there is none, when they have arrived."""
        host = self.scores.numpy()
        for segment, span in zip(self.rows.segments, self.spans, strict=True):
            values = {name: of_rows[span].numpy() for name, of_rows in self.values.items()}
            if not segment.selectors:
                yield SegmentEvaluation(np.empty(0), outputs=host[span], values=values)
            for selector in segment.selectors:
                scores = np.array([selector.value(row) for row in host[span]], np.float64)
                yield SegmentEvaluation(scores, values=values)


def torch_dtype(dtype: np.dtype[np.generic]) -> torch.dtype:
    """torch's name for an element type of numpy."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _kept(segment: Segment) -> Array | None:
    """Positions of the rows that are summed; None where all are."""
    kept = np.flatnonzero(segment.weights)
    return None if len(kept) == segment.row_count else kept
