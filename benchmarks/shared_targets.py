"""Several targets in one request beside a request for each: what the shared forward pass saves, over gRPC.

    python benchmarks/shared_targets.py [--targets 1 2 5 10] [--steps 4] [--side 160]
        [--formats onnx pt2 pt] [--rounds 2]

One server process and one client, in turn, same threads. Networks have random weights; the rule is midpoint, from
zeros to one picture, so that both sides take the same points and return the same maps, which is checked. Exports are
kept in `benchmarks/cache`. Writes `benchmarks/results/shared_targets.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import networks
from explainserve_client import IntegratedGradients
from machine import Occupation, machine_lines
from serving import serving

HERE = Path(__file__).parent
NETS: dict[str, Callable[[int], nn.Module]] = {"ResNet-50": networks.resnet50, "ViT-S/16": networks.vit_small}
TITLES = {"onnx": "ONNX", "pt2": ".pt2", "pt": "TorchScript"}
SAME = 1e-4
"""Relative L2 distance of maps that are the same up to rounding."""

Explain = Callable[[Sequence[int]], Any]
Times = dict[str, list[float]]
"""Wall seconds of the runs of each contestant."""


def compared(explain: Explain, counts: Sequence[int], rounds: int) -> Times:
    """Times of k targets together and apart, for each k."""
    contestants: dict[str, Callable[[], Any]] = {}
    for count in counts:
        contestants[_together(count)] = partial(explain, range(count))
        contestants[_apart(count)] = partial(_one_by_one, explain, count)
    return interleaved(contestants, rounds)


def interleaved(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> Times:
    """Runs every contestant in turn, after one round that does not count: what disturbs meets all of them alike."""
    times: Times = {name: [] for name in contestants}
    for index in range(rounds + 1):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            if index:
                times[name].append(time.perf_counter() - started)
    return times


def check_same(explain: Explain, count: int) -> None:
    """Maps of targets asked together are those of each asked alone, and the forward passes those of one.

    Raises:
        RuntimeError: they are not.
    """
    together, alone = explain(range(count)), _one_by_one(explain, count)
    for found, own in zip(together.attributions, alone, strict=True):
        distance = _distance(found.tensor, own.attributions[0].tensor)
        if distance > SAME:
            raise RuntimeError(f"maps of targets together and alone differ by {distance:.2g}")
    if together.provenance.forward_count != alone[0].provenance.forward_count:
        raise RuntimeError("targets did not share their forward passes")


def lines(times: Times, counts: Sequence[int], network: str, title: str) -> list[str]:
    """Lines of the table."""
    found = []
    for count in counts:
        together, apart = times[_together(count)], times[_apart(count)]
        per_target = [f"{_milliseconds(own, count)}" for own in (together, apart)]
        ratios = f"{np.median(together) / np.median(apart):.2f} ({min(together) / min(apart):.2f})"
        found.append(f"| {network} | {title} | {count} | {' | '.join(per_target)} | {ratios} |")
    return found


def _one_by_one(explain: Explain, count: int) -> list[Any]:
    return [explain([target]) for target in range(count)]


def _together(count: int) -> str:
    return f"{count} together"


def _apart(count: int) -> str:
    return f"{count} apart"


def _milliseconds(times: Sequence[float], count: int) -> str:
    wall = [seconds / count * 1000 for seconds in times]
    return f"{np.median(wall):.0f} ({min(wall):.0f} to {max(wall):.0f})"


def _distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


def model_folder(network: str, suffix: str, side: int) -> Path:
    """A model folder with one network in one format, exported once per version of its source and of torch."""
    sources = (HERE / "networks.py").read_bytes() + f"{torch.__version__} {side}".encode()
    folder = HERE / "cache" / f"shared_targets-{hashlib.sha256(sources).hexdigest()[:12]}" / f"{network[:3]}-{suffix}"
    if not (folder / "done").exists():
        print(f"exporting {network} as {TITLES[suffix]}", flush=True)
        networks.write_model(NETS[network](side), suffix, folder / "model", side)
        (folder / "done").touch()
    return folder


def measure(arguments: argparse.Namespace, threads: int) -> list[str]:
    """The table's lines, printed as they come."""
    table = []
    method = IntegratedGradients(step_count=arguments.steps)
    x = np.random.default_rng(0).standard_normal((3, arguments.side, arguments.side)).astype(np.float32)
    for network in NETS:
        for suffix in arguments.formats:
            folder = model_folder(network, suffix, arguments.side)
            with serving(folder, threads, folder / "server.log") as served:
                explain: Explain = lambda targets, client=served.client: client.explain(  # noqa: E731
                    "model", x, targets=list(targets), baselines="zeros", method=method
                )
                check_same(explain, 3)
                times = compared(explain, arguments.targets, arguments.rounds)
            table += lines(times, arguments.targets, network, TITLES[suffix])
            print("\n".join(table[-len(arguments.targets) :]), flush=True)
    return table


def page(arguments: argparse.Namespace, threads: int, table: Sequence[str], others: float) -> str:
    """The whole page."""
    machine = "\n".join(machine_lines(threads, others))
    size = f"{arguments.side}x{arguments.side}"
    text = f"""# Several targets in one request

Written by `benchmarks/shared_targets.py`. k targets of one picture in one request, which share forward passes,
beside k requests, one after the other. One server process and one client over gRPC on loopback, in turn,
{arguments.rounds} rounds after one that does not count; random weights, {size}, midpoint rule with
{arguments.steps} steps from zeros. Both return the same maps.

{machine}

| network | format | k | ms per target, together: median (min to max) | apart | together / apart (of the fastest) |
|---|---|---|---|---|---|
"""
    return text + "\n".join(table) + "\n"


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", type=int, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--side", type=int, default=160)
    parser.add_argument("--formats", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "shared_targets.md")
    arguments = parser.parse_args()
    threads, before = len(os.sched_getaffinity(0)), Occupation.now()
    table = measure(arguments, threads)
    arguments.output.write_text(page(arguments, threads, table, Occupation.now().others_share(before)), "utf-8")


if __name__ == "__main__":
    main()
