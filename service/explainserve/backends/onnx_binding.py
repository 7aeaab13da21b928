"""Sessions that are fed through buffers on their device, and recorded there where the provider can do it.

Rows come in a few sizes (`row_feeds.fixed_size`), so that few sets of buffers serve all micro-batches. A recorded run,
which CUDA calls a graph, is started by one call in place of one for each operator. It reads and writes the very
addresses that it was recorded with, which is why the buffers stay.

onnxruntime makes the device of a session the current one of the thread at the start of each run, and of an allocation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from explainserve.backends.onnx_passes import Feeds, guarded
from explainserve.backends.onnx_session import Interruption
from explainserve.errors import EvaluationFailed, ModelRefused

logger = logging.getLogger(__name__)

Array = NDArray[np.generic]
Shapes = tuple[tuple[int, ...], ...]
Open = Callable[[bool], onnxruntime.InferenceSession]
"""Opens the session, that records what it runs or does not."""

MAX_SIZES = 32
"""Sets of buffers, and recordings, of one session. Micro-batches of further sizes have buffers for once."""

RUNS_UNTIL_REPLAY = 3
"""Runs of one size until the result is that of a recording: buffers are found in the first, the second is recorded."""


class BoundPasses:
    """One session, which goes forward anew in each pass; see `onnx_passes.Passes`.

    Args:
        memory: kind and number of the memory that the session computes in, as onnxruntime names them.
        interruption: of the evaluation that is in progress.
        records: whether runs should be recorded.

    Attributes:
        records: whether they are; not where the session cannot.
    """

    def __init__(self, open_session: Open, memory: tuple[str, int], interruption: Interruption, records: bool) -> None:
        self.records = records
        self._open = open_session
        self._memory = memory
        self._interruption = interruption
        self._bound: dict[Shapes, _Bound] = {}
        self._session = self._opened()

    def passes(self, feeds: Feeds, seeds: Sequence[Feeds]) -> Iterator[list[Array]]:
        """See `onnx_passes.Passes`."""
        for seed in seeds:
            yield self._run({**feeds, **seed})

    def _opened(self) -> onnxruntime.InferenceSession:
        if self.records:
            try:
                return self._open(True)
            except ModelRefused as refusal:  # nodes on the host, and branches
                self._give_up(refusal)
        return self._open(False)

    def _give_up(self, reason: Exception) -> None:
        logger.warning("what this model runs is not recorded: %s", reason)
        self.records = False

    def _run(self, feeds: Feeds) -> list[Array]:
        bound = self._bound_to(feeds)
        recorded = bound.is_recorded
        try:
            return guarded(bound.run, feeds, self._interruption)
        except EvaluationFailed as failure:
            if not recorded or failure.reason == "OUT_OF_MEMORY" or self._interruption.ended:
                raise
            self._give_up(failure)
        self._bound.clear()
        self._session = self._open(False)
        return guarded(self._bound_to(feeds).run, feeds, self._interruption)

    def _bound_to(self, feeds: Feeds) -> _Bound:
        """The buffers for arrays of these shapes."""
        shapes = tuple(array.shape for array in feeds.values())
        if shapes in self._bound:
            return self._bound[shapes]
        kept = len(self._bound) < MAX_SIZES
        bound = _Bound(self._session, self._memory, len(self._bound) + 1 if kept and self.records else None)
        if kept:
            self._bound[shapes] = bound
        return bound


class _Bound:
    """Buffers for arrays of certain shapes.

    Args:
        number: of the recording, from 1; None where runs are not recorded.

    Attributes:
        is_recorded: whether the next run makes or starts a recording; results have their buffers by then.
    """

    def __init__(self, session: onnxruntime.InferenceSession, memory: tuple[str, int], number: int | None) -> None:
        self.is_recorded = False
        self._session = session
        self._number = number
        self._binding = session.io_binding()
        self._inputs: dict[str, Any] = {}
        self._input_memory = _places(session.get_inputs(), session.get_input_memory_infos(), memory)
        self._output_memory = _places(session.get_outputs(), session.get_output_memory_infos(), memory)

    def run(self, feeds: Feeds, interruption: Interruption) -> list[Array]:
        """The outputs, on the host."""
        self._write(feeds)
        if not self.is_recorded:
            for name, memory in self._output_memory.items():
                self._binding.bind_output(name, *memory)
        options = interruption.begin_recorded(self._number if self.is_recorded else None)
        self._session.run_with_iobinding(self._binding, options)
        outputs = self._binding.get_outputs()
        if self._number is not None and not self.is_recorded:
            self._keep(outputs)
        return [_on_host(value) for value in outputs]

    def _write(self, feeds: Feeds) -> None:
        for name, memory in self._input_memory.items():
            if name in self._inputs:
                self._inputs[name].update_inplace(feeds[name])
            else:
                owned = np.array(feeds[name])  # on the host, the buffer is that of the array
                self._inputs[name] = onnxruntime.OrtValue.ortvalue_from_numpy(owned, *memory)
                self._binding.bind_ortvalue_input(name, self._inputs[name])

    def _keep(self, outputs: Sequence[Any]) -> None:
        """Has all further runs write where this one did."""
        for name, value in zip(self._output_memory, outputs, strict=True):
            self._binding.bind_ortvalue_output(name, value)
        self.is_recorded = True


def _places(values: Sequence[Any], infos: Sequence[Any], memory: tuple[str, int]) -> dict[str, tuple[str, int]]:
    """Where a session wants each of its inputs or outputs: shapes are read and written on the host."""
    return {value.name: ("cpu", 0) if info.name == "Cpu" else memory for value, info in zip(values, infos, strict=True)}


def _on_host(value: Any) -> Array:
    """A copy of a tensor: the next run writes to where it lies."""
    array: Array = value.numpy()
    return array.copy() if value.device_name() == "cpu" else array
