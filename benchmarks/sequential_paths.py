"""Guided Integrated Gradients for several clients at once: do steps that cannot be split share micro-batches?

    python benchmarks/sequential_paths.py [--clients 1 2 8] [--steps 60] [--side 112] [--networks two-digits ResNet-18]

Each step of such a path is one row that waits for the one before. One server over gRPC on loopback; each client has a
connection and asks for a picture of its own. Beside the wall time stand the floor, which is all rows at the time of a
row in the largest micro-batch that the model takes, and the rows of the micro-batches that were formed. Exports are
kept in `benchmarks/cache`. Writes `benchmarks/results/sequential_paths.md`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

import networks
from explainserve_client import Client, GuidedIntegratedGradients
from machine import Occupation, machine_lines
from serving import ROOT, Served, serving

HERE = Path(__file__).parent
DEMO, RESNET = "two-digits", "ResNet-18"


@dataclass(frozen=True)
class Counted:
    """What the server has counted of one model: micro-batches, their rows and their seconds."""

    batches: float
    rows: float
    seconds: float

    @classmethod
    def read(cls, served: Served, model: str) -> Counted:
        """As `/metrics` tells."""
        text = urllib.request.urlopen(f"http://{served.http_address}/metrics").read().decode()
        samples = {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels.get("model") == model
        }
        names = ("batch_rows_count", "batch_rows_sum", "compute_seconds_sum")
        return cls(*(samples.get(f"explainserve_{name}", 0.0) for name in names))

    def __sub__(self, other: Counted) -> Counted:
        return Counted(self.batches - other.batches, self.rows - other.rows, self.seconds - other.seconds)


def model_folder(network: str, side: int) -> Path:
    """A folder with one model."""
    folder = HERE / "cache" / f"sequential_paths-{side}" / network
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        if network == DEMO:
            shutil.copytree(ROOT / "examples" / "two_digits" / "models" / DEMO, folder / network)
        else:
            networks.write_model(networks.resnet18(side), "onnx", folder / network, side)
        (folder / "done").touch()
    return folder


def measured(served: Served, network: str, client_count: int, steps: int, side: int) -> tuple[float, Counted]:
    """Wall seconds of one request of each client, all at once, and what the server counted meanwhile."""
    pictures = np.random.default_rng(0).standard_normal((client_count, 3, side, side)).astype(np.float32)
    method = GuidedIntegratedGradients(step_count=steps)

    def ask(picture: np.ndarray) -> None:
        with Client(served.address, timeout=600.0) as client:
            client.explain(network, picture, targets=3, baselines="zeros", method=method)

    before, started = Counted.read(served, network), time.perf_counter()
    with ThreadPoolExecutor(client_count) as clients:
        list(clients.map(ask, pictures))
    return time.perf_counter() - started, Counted.read(served, network) - before


def lines(network: str, arguments: argparse.Namespace, threads: int) -> list[str]:
    """The table's lines of one network."""
    side = 64 if network == DEMO else arguments.side
    folder = model_folder(network, arguments.side)
    found = []
    with serving(folder, threads, folder / "server.log") as served:
        per_row = served.client.model(network).seconds_per_row
        most = served.client.model(network).max_batch_rows
        measured(served, network, 1, 3, side)
        for count in arguments.clients:
            cpu = served.cpu_seconds
            wall, counted = measured(served, network, count, arguments.steps, side)
            floor = count * arguments.steps * per_row
            cells = [network, most, f"{per_row * 1000:.2f}", count, f"{wall:.2f}", f"{floor:.2f}"]
            cells += [
                f"{counted.seconds:.2f}",
                f"{counted.rows / counted.batches:.1f}",
                f"{served.cpu_seconds - cpu:.2f}",
            ]
            found.append(f"| {' | '.join(map(str, cells))} |")
            print(found[-1], flush=True)
    return found


def page(arguments: argparse.Namespace, threads: int, table: Sequence[str], others: float) -> str:
    """The whole page."""
    machine = "\n".join(machine_lines(threads, others))
    return (
        f"""# Paths whose steps follow each other

Written by `benchmarks/sequential_paths.py`: Guided Integrated Gradients of {arguments.steps} steps, one request of each
client at the same time, over gRPC.

{machine}

| network | most rows | ms per row | clients | wall s | floor s | device s | rows per micro-batch | processor s |
|---|---|---|---|---|---|---|---|---|
"""
        + "\n".join(table)
        + "\n"
    )


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--side", type=int, default=112)
    parser.add_argument("--networks", nargs="+", choices=[DEMO, RESNET], default=[DEMO, RESNET])
    parser.add_argument("--output", type=Path, default=HERE / "results" / "sequential_paths.md")
    arguments = parser.parse_args()
    threads, before = len(os.sched_getaffinity(0)), Occupation.now()
    table = [line for network in arguments.networks for line in lines(network, arguments, threads)]
    arguments.output.write_text(page(arguments, threads, table, Occupation.now().others_share(before)), "utf-8")


if __name__ == "__main__":
    main()
