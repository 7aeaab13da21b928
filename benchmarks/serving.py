"""A server of ours as a child process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from explainserve_client import Client

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Served:
    """A server and a client of it.

    Attributes:
        address, http_address: "HOST:PORT" of gRPC and of metrics.
        load_seconds: from its start to its readiness: every model read, checked and differentiated.
    """

    client: Client
    process: subprocess.Popen[str]
    address: str
    http_address: str
    load_seconds: float

    @property
    def cpu_seconds(self) -> float:
        """Processor time that the server has used, all threads."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(models: Path, threads: int, log: Path, *flags: str) -> Iterator[Served]:
    """Starts `python -m explainserve serve` on free loopback ports and stops it in the end."""
    command = [sys.executable, "-m", "explainserve", "serve", "--models", str(models), "--port", "0"]
    command += ["--http-port", "0", "--threads", str(threads), *flags]
    paths = [str(ROOT / "service"), str(ROOT / "clients" / "python")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(2)]
            if not lines[0].startswith("gRPC listening on "):
                raise RuntimeError(f"the server did not start; see {log}")
            address, http_address = (line.split()[-1] for line in lines)
            with Client(address, timeout=600.0) as client:
                yield Served(client, process, address, http_address, time.perf_counter() - started)
        finally:
            process.terminate()
