"""Forward and backward passes that are recorded once and replayed: CUDA graphs.

A network of many small kernels keeps a processor busy with launching them, not the device with computing them. A
graph is launched as a whole. It has fixed sizes and fixed memory, so micro-batches are filled up to a few sizes, and
are copied to where the graph expects them.

What is recorded was run before, several times: libraries set themselves up in their first runs, which must not be
recorded, and a shape that comes once is not worth a graph. Here the first runs are those of the first micro-batches.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from explainserve.errors import first_line

logger = logging.getLogger(__name__)

WARM_UPS = 3
"""Runs before one is recorded; as many as torch's own `make_graphed_callables` makes."""

MOST_GRAPHS = 16
"""Recorded functions and sizes of one model; beyond, that which was not used for longest is given up."""

Recorded = TypeVar("Recorded")
Replay = Callable[[], None]


class Record(Protocol):
    """Runs something so that it can be run again, without Python, on the same memory."""

    def __call__(self, work: Callable[[], Recorded]) -> tuple[Recorded, Replay]:
        """What `work` returns, whose tensors hold its results after each replay, not before the first."""
        ...

    @property
    def byte_count(self) -> int:
        """Memory that is kept for all that was recorded."""
        ...


class ForwardPass(Protocol):
    """A forward pass of all rows of a micro-batch, to take gradients of."""

    @property
    def scores(self) -> Tensor:
        """Shape (rows, *score shape), without their history."""
        ...

    @property
    def values(self) -> Mapping[str, Tensor]:
        """Of layers, by name, shape (rows, *layer shape), without their history."""
        ...

    def gradients(self, cotangent: Tensor, *, keep: bool) -> Mapping[str, Tensor]:
        """Of every row by input, shape (rows, *instance). What was returned before may be overwritten.

        Args:
            cotangent: of the scores, with the axes of a score tensor or flat.
            keep: leave the pass to further cotangents.
        """
        ...


Forward = Callable[[Mapping[str, Tensor]], ForwardPass]
"""From the points of all rows, by input."""


class Graphs:
    """Recorded passes of one model, whose micro-batches come one after the other.

    A thread has streams of its own, and libraries set themselves up for each. So where another one comes, as after
    loading, all is recorded anew.

    Attributes:
        refusal: why nothing is recorded any more, or "".
    """

    def __init__(self, record: Record, most: int = MOST_GRAPHS) -> None:
        self.refusal = ""
        self._record = record
        self._most = most
        self._thread = threading.get_ident()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    @property
    def byte_count(self) -> int:
        """Memory that is kept: that of the largest pass, and inputs and results of each."""
        inputs = sum(entry.graph.input_bytes for entry in self._entries.values() if entry.graph is not None)
        return inputs + self._record.byte_count

    def passed(
        self, function: Hashable, forward: Forward, points: Mapping[str, Tensor], *, backward: bool
    ) -> ForwardPass:
        """What `forward` makes of the points, recorded and replayed where that pays.

        Args:
            function: stands for `forward`.
            backward: gradients are going to be taken.
        """
        if self.refusal:
            return forward(points)
        if self._thread != threading.get_ident():
            self._entries.clear()
            self._thread = threading.get_ident()
        size = fixed_size(len(next(iter(points.values()))))
        entry = self._entry((function, size, *((p.shape[1:], p.dtype) for p in points.values())))
        if entry.graph is None and entry.run_count >= WARM_UPS:
            entry.graph = self._recorded(forward, points, size, backward)
        entry.run_count += 1
        return forward(points) if entry.graph is None else entry.graph.passed(points)

    def _entry(self, key: Hashable) -> _Entry:
        entry = self._entries.setdefault(key, _Entry())
        self._entries.move_to_end(key)
        if len(self._entries) > self._most:
            self._entries.popitem(last=False)
        return entry

    def _recorded(self, forward: Forward, points: Mapping[str, Tensor], size: int, backward: bool) -> _Graph | None:
        """None where it cannot be recorded: a graph has no room for what waits for the device, or asks it."""
        try:
            return _Graph(self._record, forward, points, size, backward)
        except Exception as error:
            self.refusal = first_line(error)
            self._entries.clear()
            logger.warning("passes cannot be recorded as graphs, so they are run one operator at a time: %s", error)
            return None


def fixed_size(rows: int) -> int:
    """The rows that a recorded micro-batch has: 1, 2, 3, 4, 6, 8, 12, 16...; a third of them is filled up at most."""
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if power >= 4 and rows <= power * 3 // 4 else power


@dataclass(eq=False)
class _Entry:
    run_count: int = 0
    graph: _Graph | None = None


class _Graph:
    """One recorded forward pass, and one backward pass of it."""

    def __init__(
        self, record: Record, forward: Forward, points: Mapping[str, Tensor], size: int, backward: bool
    ) -> None:
        self._points = {name: _filled_up(tensor, size) for name, tensor in points.items()}
        self._forward = forward
        self._history: list[ForwardPass] = []
        self.scores, self.replay_forward = record(self._run_forward)
        if backward:
            self.cotangent = torch.zeros_like(self.scores)
            self.gradients, self.replay_backward = record(self._run_backward)
        self._history.clear()  # its memory is free for other graphs: this one replays both passes in one go

    @property
    def input_bytes(self) -> int:
        """Memory of its inputs, which is kept for it alone."""
        return sum(points.nbytes for points in self._points.values())

    def passed(self, points: Mapping[str, Tensor]) -> ForwardPass:
        """The pass of these points."""
        row_count = len(next(iter(points.values())))
        for name, tensor in points.items():
            self._points[name][:row_count].copy_(tensor)
        self.replay_forward()
        return _ReplayedPass(self, row_count)

    def _run_forward(self) -> Tensor:
        self._history[:] = [self._forward(self._points)]
        return self._history[0].scores

    def _run_backward(self) -> Mapping[str, Tensor]:
        return self._history[0].gradients(self.cotangent, keep=True)


class _ReplayedPass:
    """See `ForwardPass`: the first rows of what was recorded."""

    def __init__(self, graph: _Graph, row_count: int) -> None:
        self._graph = graph
        self._row_count = row_count

    @property
    def scores(self) -> Tensor:
        """Those of rows that only fill up are left out."""
        return self._graph.scores[: self._row_count]

    @property
    def values(self) -> Mapping[str, Tensor]:
        """No layers are reached by what is recorded."""
        return {}

    def gradients(self, cotangent: Tensor, *, keep: bool) -> Mapping[str, Tensor]:
        """See `ForwardPass`."""
        seeded = self._graph.cotangent[: self._row_count]
        seeded.copy_(cotangent.reshape(seeded.shape))
        self._graph.replay_backward()
        return {name: gradients[: self._row_count] for name, gradients in self._graph.gradients.items()}


def _filled_up(points: Tensor, size: int) -> Tensor:
    """Memory for points of so many rows in the same layout; what fills up is zero until it was something else."""
    return torch.empty_strided(
        (size, *points.shape[1:]), points.stride(), dtype=points.dtype, device=points.device
    ).zero_()
