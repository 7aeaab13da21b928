"""How torch works through micro-batches on a device.

On the CPU whatever is asked for is done when the call returns. A CUDA device works behind the thread that asks it:
copies of what the next micro-batch needs go up beside the computation of this one, which is what streams and pinned
memory are for, and results are there when an event says so.

Pinned memory, of uploads and of downloads, is torch's: its allocator keeps what was given back, and hands it out again
when the copies that used it are over. So two micro-batches on the way have two buffers, which are reused for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from explainserve.backends.torch_graphs import Record, Recorded, Replay

_CAPTURE = threading.Lock()
"""torch captures one graph at a time in a process."""


class Queue(Protocol):
    """What one model asks of its device. Used by one thread at a time.

    Attributes:
        runs_ahead: work is done after the call that asks for it has returned.
        record: how passes are recorded; None where replaying would bring nothing.
    """

    device: torch.device
    runs_ahead: bool
    record: Record | None

    def computing(self) -> AbstractContextManager[object]:
        """The context of everything that is computed."""
        ...

    def staging(self, byte_count: int) -> Tensor:
        """A buffer on the host, uint8, to be filled and sent."""
        ...

    def send(self, host: Tensor) -> Tensor:
        """A copy of the buffer on the device. To be kept until all that uses it has been computed."""
        ...

    def fetch(self, tensor: Tensor) -> Tensor:
        """The tensor on the host, which holds its values when all that was asked for so far is computed."""
        ...

    def finish(self) -> Callable[[], None]:
        """A function that returns when all that was asked for until now is computed."""
        ...


def queue_of(device: torch.device) -> Queue:
    """A queue of a model's own."""
    return CudaQueue(device) if device.type == "cuda" else CpuQueue(device)


class CpuQueue:
    """See `Queue`: nothing waits."""

    runs_ahead = False
    record: Record | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def computing(self) -> AbstractContextManager[object]:
        """Nothing to set."""
        return nullcontext()

    def staging(self, byte_count: int) -> Tensor:
        """Plain memory."""
        return torch.empty(byte_count, dtype=torch.uint8)

    def send(self, host: Tensor) -> Tensor:
        """It is there."""
        return host

    def fetch(self, tensor: Tensor) -> Tensor:
        """It is there."""
        return tensor

    def finish(self) -> Callable[[], None]:
        """It has been computed."""
        return lambda: None


class CudaQueue:
    """See `Queue`: the calling thread has a stream that computes and one that copies to the device.

    They are the thread's own, since what others asked of a stream while it is captured would become part of the graph.
    All of its models share them, and so the memory that torch keeps for each stream.
    """

    runs_ahead = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.record: Record | None = _Capture()

    def computing(self) -> AbstractContextManager[object]:
        """After what the caller asked of torch's usual stream, such as to lay out weights.

        With its stream, torch makes the device the current one of the thread: one thread may have several.
        """
        compute = _STREAMS.of(self.device).compute
        compute.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(compute)

    def staging(self, byte_count: int) -> Tensor:
        """Pinned memory, or copies would wait."""
        return torch.empty(byte_count, dtype=torch.uint8, pin_memory=True)

    def send(self, host: Tensor) -> Tensor:
        """What is computed next waits for the copy, what is computed already does not."""
        streams = _STREAMS.of(self.device)
        with torch.cuda.stream(streams.copies):
            sent = host.to(self.device, non_blocking=True)
        streams.compute.wait_event(streams.copies.record_event())
        return sent

    def fetch(self, tensor: Tensor) -> Tensor:
        """torch pins the memory of copies to the host that do not block."""
        return tensor.to("cpu", non_blocking=True)

    def finish(self) -> Callable[[], None]:
        """An event, for which the thread sleeps."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(_STREAMS.of(self.device).compute)
        return event.synchronize


@dataclass(frozen=True)
class _Streams:
    compute: torch.cuda.Stream
    copies: torch.cuda.Stream


class _ThreadStreams(threading.local):
    """The streams of each thread, by device."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, _Streams] = {}

    def of(self, device: torch.device) -> _Streams:
        """Those of the calling thread."""
        if device not in self._streams:
            compute, copies = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
            self._streams[device] = _Streams(compute, copies)
        return self._streams[device]


_STREAMS = _ThreadStreams()


class _Capture:
    """Records what goes to the stream of the calling thread as a CUDA graph. All graphs share their memory.

    They may, since they run one after the other, and whatever one returns is used before the next one runs.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Recorded]) -> tuple[Recorded, Replay]:
        """Other threads may allocate memory meanwhile: hence thread_local."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        with _CAPTURE, torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            recorded = work()
        return recorded, graph.replay

    @property
    def byte_count(self) -> int:
        """Memory on the device that the graphs keep."""
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        return sum(segment["total_size"] for segment in segments if segment["segment_pool_id"] == self._pool)
