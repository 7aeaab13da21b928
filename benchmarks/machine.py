"""What a benchmark ran on, and how quiet it was there."""

from __future__ import annotations

import os
import platform
import resource
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

LIBRARIES = ("torch", "captum", "onnxruntime", "onnx", "grpcio", "protobuf", "numpy")


@dataclass(frozen=True)
class Occupation:
    """Processor seconds since the machine started: of everything, and of this process and its ended children."""

    at: float
    busy: float
    own: float

    @classmethod
    def now(cls) -> Occupation:
        """Reads the clocks; servers that still run do not count."""
        ticks = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        own = time.process_time() + children.ru_utime + children.ru_stime
        idle = ticks[3] + ticks[4]
        return cls(time.perf_counter(), (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK"), own)

    def others_share(self, since: Occupation) -> float:
        """Processor time that went to others, of all there was: more than a few percent and the figures mean little."""
        others = (self.busy - since.busy) - (self.own - since.own)
        return max(0.0, others) / ((self.at - since.at) * (os.cpu_count() or 1))


def machine_lines(threads: int, others_share: float) -> list[str]:
    """Two sentences for a page of results."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return [
        f"Machine: {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, {platform.machine()}, {memory:.0f} GiB; "
        f"{threads} threads for everyone.",
        f"Other processes took {others_share:.0%} of all processor time meanwhile.",
        f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in LIBRARIES) + ".",
    ]


def reset_peak(process_id: int) -> None:
    """Starts to measure anew; see `peak_bytes`."""
    Path(f"/proc/{process_id}/clear_refs").write_text("5")


def peak_bytes(process_id: int) -> int:
    """Most resident memory of a process since `reset_peak`."""
    status = Path(f"/proc/{process_id}/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
