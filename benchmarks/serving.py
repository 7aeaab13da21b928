"""A server of ours as a child process, and clocks that count what both processes use."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from explainserve_client import Client

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Served:
    """A server and a client of it.

    Attributes:
        process_id: of the server.
        load_seconds: from its start to its readiness: every model read, checked and differentiated.
    """

    client: Client
    process_id: int
    load_seconds: float

    @property
    def cpu_seconds(self) -> float:
        """Processor time that the server has used, all threads."""
        stat = Path(f"/proc/{self.process_id}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(models: Path, threads: int, log: Path) -> Iterator[Served]:
    """Starts `python -m explainserve serve` on a free loopback port and stops it in the end."""
    command = [sys.executable, "-m", "explainserve", "serve", "--models", str(models), "--port", "0"]
    command += ["--http-port", "0", "--threads", str(threads)]
    paths = [str(ROOT / "service"), str(ROOT / "clients" / "python")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("gRPC listening on "):
                raise RuntimeError(f"the server did not start; see {log}")
            with Client(line.split()[-1], timeout=600.0) as client:
                yield Served(client, process.pid, time.perf_counter() - started)
        finally:
            process.terminate()


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


@dataclass
class Times:
    """Wall and processor seconds of the runs of one contestant; processor time is of both processes."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median of wall seconds."""
        return float(np.median(self.wall))

    @property
    def fastest(self) -> float:
        """Least of wall seconds: what is left where other work on the machine disturbs."""
        return min(self.wall)

    @property
    def median_cpu(self) -> float:
        """Median of processor seconds."""
        return float(np.median(self.cpu))


def interleaved(contestants: Mapping[str, Callable[[], Any]], rounds: int, served: Served) -> dict[str, Times]:
    """Runs every contestant in turn, `rounds` times, after one round that does not count.

    What else happens on the machine then meets all of them alike.
    """
    times = {name: Times() for name in contestants}
    for index in range(rounds + 1):
        for name, run in contestants.items():
            wall, cpu = time.perf_counter(), time.process_time() + served.cpu_seconds
            run()
            if index:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() + served.cpu_seconds - cpu)
    return times
