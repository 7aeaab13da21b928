"""What a server process holds, and whether its memory grows."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

GROWTH_LIMIT = 0.02
"""Most growth of memory per minute, as a share of what is held."""

SETTLING_SHARE = 0.2
"""Of the soak, at its start: every buffer meets its first large request, and fills."""

STRETCH_SECONDS = 10.0
"""Maps on their way to slow readers come and go within seconds, by a tenth of all memory, so what is held beside them
is the least in a stretch of this length. A minute tells nothing: of servers whose memory was flat over seven of them,
single ones rose by 106 MiB and fell by 48.
"""


@dataclass(frozen=True)
class Holding:
    """What the server process holds at one moment."""

    at: float
    resident_bytes: int
    thread_count: int
    file_count: int

    @classmethod
    def now(cls, process_id: int) -> Holding:
        """Reads it from the system."""
        folder = Path(f"/proc/{process_id}")
        resident = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return cls(time.monotonic(), resident, len(os.listdir(folder / "task")), len(os.listdir(folder / "fd")))


@contextmanager
def watching(process_id: int) -> Iterator[list[Holding]]:
    """What it holds, every half second."""
    seen, stopping = [Holding.now(process_id)], threading.Event()

    def watch() -> None:
        while not stopping.wait(0.5):
            seen.append(Holding.now(process_id))

    thread = threading.Thread(target=watch, name="watch")
    thread.start()
    try:
        yield seen
    finally:
        stopping.set()
        thread.join()


@dataclass(frozen=True)
class Growth:
    """Slope of a straight line through what a server held, once it had settled.

    Attributes:
        per_minute: as a share of the memory in the middle of the line.
        error: twice its standard error; infinite where there are too few stretches for a line.
    """

    per_minute: float
    error: float

    @classmethod
    def of(cls, seen: Sequence[Holding]) -> Growth:
        """Through the least of each stretch."""
        stretches: dict[int, list[int]] = {}
        settled_at = seen[0].at + SETTLING_SHARE * (seen[-1].at - seen[0].at)
        for each in seen:
            if each.at >= settled_at:
                stretches.setdefault(int((each.at - settled_at) / STRETCH_SECONDS), []).append(each.resident_bytes)
        if len(stretches) < 4:
            return cls(0.0, np.inf)
        minutes = np.array(list(stretches)) * STRETCH_SECONDS / 60
        line, covariance = np.polyfit(minutes - minutes.mean(), [min(own) for own in stretches.values()], 1, cov=True)
        return cls(float(line[0] / line[1]), float(2 * np.sqrt(covariance[0, 0]) / line[1]))

    @property
    def failure(self) -> str:
        """Why it must not be, or ""."""
        if self.per_minute - self.error > GROWTH_LIMIT:
            return f"memory grows by {self}, allowed {GROWTH_LIMIT:.0%}"
        if self.per_minute + self.error > GROWTH_LIMIT:
            return f"memory grows by {self}, which does not tell whether {GROWTH_LIMIT:.0%} are kept: soak for longer"
        return ""

    def __str__(self) -> str:
        return f"{self.per_minute:.1%} ± {self.error:.1%} per minute"
