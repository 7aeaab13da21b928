"""Sessions of onnxruntime that run once per seed on the same feeds.

Where each row has one target, that is one session. Where several targets share rows, it is two: one that goes forward
once and leaves on the device what the other reads of it, which goes backward once per target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from explainserve.backends.onnx_session import Interruption, memory_of
from explainserve.errors import EvaluationFailed, first_line, is_out_of_memory

Array = NDArray[np.generic]
Feeds = Mapping[str, Array]
"""Arrays by name of the graph's input."""
Memory = tuple[str, int]
"""Of which device, as onnxruntime names them: kind and number."""
OrtValues = dict[str, Any]
"""Tensors of onnxruntime by name, wherever they are."""

_Result = TypeVar("_Result")


class Passes(Protocol):
    """A graph, or the parts of one."""

    def passes(self, feeds: Feeds, seeds: Sequence[Feeds]) -> Iterator[list[Array]]:
        """The outputs of each pass.

        Args:
            feeds: what all passes read.
            seeds: what each of them reads besides.

        Raises:
            EvaluationFailed: onnxruntime raised (MODEL_RAISED), or memory ran out (OUT_OF_MEMORY).
        """
        ...


@dataclass(frozen=True, eq=False)
class WholePasses:
    """One session, which goes forward anew in each pass.

    Attributes:
        interruption: of the evaluation that is in progress.
    """

    session: onnxruntime.InferenceSession
    interruption: Interruption

    def passes(self, feeds: Feeds, seeds: Sequence[Feeds]) -> Iterator[list[Array]]:
        """See `Passes`."""
        for seed in seeds:
            yield guarded(self.session.run, None, {**feeds, **seed}, self.interruption.options)


@dataclass(frozen=True, eq=False)
class SplitPasses:
    """A session for what does not depend on the seed, and one that goes on from there.

    Attributes:
        device: where the results of `forward` stay.
        interruption: of the evaluation that is in progress.

    Raises:
        ValueError: what `forward` hands over is no tensor.
    """

    forward: onnxruntime.InferenceSession
    backward: onnxruntime.InferenceSession
    device: str
    interruption: Interruption

    def __post_init__(self) -> None:
        for value in self.forward.get_outputs():
            if not value.type.startswith("tensor("):
                raise ValueError(f"{value.name!r} is no tensor, but {value.type}")

    def passes(self, feeds: Feeds, seeds: Sequence[Feeds]) -> Iterator[list[Array]]:
        """See `Passes`."""
        memory = memory_of(self.device)
        shared = _moved(feeds, memory)
        shared |= guarded(self._run, self.forward, shared, memory)
        for seed in seeds:
            results = guarded(self._run, self.backward, shared | _moved(seed, memory), memory)
            yield [result.numpy() for result in results.values()]

    def _run(self, session: onnxruntime.InferenceSession, values: OrtValues, memory: Memory) -> OrtValues:
        """Outputs of a session, in the memory where its inputs are."""
        binding = session.io_binding()
        for value in session.get_inputs():
            binding.bind_ortvalue_input(value.name, values[value.name])
        outputs = [value.name for value in session.get_outputs()]
        for name in outputs:
            binding.bind_output(name, *memory)
        session.run_with_iobinding(binding, self.interruption.options)
        return dict(zip(outputs, binding.get_outputs(), strict=True))


def _moved(feeds: Feeds, memory: Memory) -> OrtValues:
    """Arrays in the memory of a device; on the host they are not copied."""
    return {name: onnxruntime.OrtValue.ortvalue_from_numpy(array, *memory) for name, array in feeds.items()}


def guarded(call: Callable[..., _Result], *arguments: Any) -> _Result:
    """Turns whatever onnxruntime raises into EvaluationFailed."""
    try:
        return call(*arguments)
    except Exception as error:  # onnxruntime's own exceptions derive from Exception directly
        if is_out_of_memory(error):
            raise EvaluationFailed("OUT_OF_MEMORY", f"no memory is left: {first_line(error)}") from error
        raise EvaluationFailed("MODEL_RAISED", f"onnxruntime raised: {first_line(error)}") from error
