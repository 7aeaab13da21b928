"""What serving costs beside the model: shares of a request, statistics per view, and health checks under load.

    python benchmarks/serving_cost.py [--rows 32] [--requests 5] [--clients 16] [--seconds 10] [--rounds 3]

A server process as `explainserve serve` starts it, with onnxruntime. A ResNet-50 answers requests one at a time; a
small network, whose rows take less than their replies, answers `--clients` clients at once while health checks go to
the server and to a bare grpc.aio health server in turn. Exports are kept in `benchmarks/cache`. Writes
`benchmarks/results/serving_cost.md`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc
import numpy as np
import torch
from google.protobuf.duration_pb2 import Duration
from numpy.typing import NDArray
from torch import nn

import networks
from explainserve.normalization import normalizations
from explainserve.rpc.tensors import decode, encode
from explainserve.statistics import View, reduce_to_view, statistics
from explainserve.v1 import explainer_service_pb2 as pb
from health_checks import EXPLAIN, Checks, bare_server, checks, clients
from machine import Occupation, machine_lines
from serving import serving

T = TypeVar("T")

HERE = Path(__file__).parent
CACHE = HERE / "cache" / "serving_cost"
SIDE = 224
TARGET = 3
LIGHT_ROWS = 4
"""Gradient rows of a request to the small network: few, so that replies come as fast as they can."""
WARM_SECONDS = 2.0


def light() -> nn.Module:
    """A small residual network: a row takes about as long as a reply."""
    torch.manual_seed(4)
    return networks.calibrated(networks.ResNet((1, 1, 1, 1), 1, width=8), SIDE)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet50": networks.resnet50, "light": light}


@dataclass(frozen=True)
class Parts:
    """Seconds of one request, as the client sees it, and of its parts."""

    total: float
    decode: float
    queue: float
    compute: float
    figures: float
    encode: float

    @property
    def rest(self) -> float:
        """Connection, threads, and what methods do on the host."""
        return self.total - self.decode - self.queue - self.compute - self.figures - self.encode

    @property
    def share(self) -> float:
        """Of the time that is not the model's."""
        return 1 - self.compute / self.total


def requested(model: str, row_count: int) -> bytes:
    """An Explain request for one picture of noise, serialized."""
    picture = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)
    message = pb.ExplainRequest()
    message.model.named.name = model
    message.inputs["image"].CopyFrom(encode(picture))
    message.targets.add().element.index.indices.append(TARGET)
    message.methods.add().integrated_gradients.step_count = row_count
    return message.SerializeToString()


def request_parts(address: str, request: bytes, count: int) -> list[Parts]:
    """Parts of `count` requests, one at a time, after one that does not count."""
    with grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)]) as channel:
        explain = channel.unary_unary(EXPLAIN)
        explain(request)
        return [_parts(explain, request) for _ in range(count)]


def _parts(explain: Callable[[bytes], bytes], request: bytes) -> Parts:
    total, data = timed(lambda: explain(request))
    reply = pb.ExplainResponse.FromString(data)
    told = reply.provenance
    return Parts(
        total=total,
        decode=timed(lambda: _read(request))[0],
        queue=_seconds(told.queue_duration),
        compute=_seconds(told.compute_duration),
        figures=_seconds(told.serialize_duration),
        encode=timed(reply.SerializeToString)[0],
    )


def _read(request: bytes) -> None:
    for name, tensor in pb.ExplainRequest.FromString(request).inputs.items():
        np.isfinite(decode(name, tensor)).all()


def _seconds(duration: Duration) -> float:
    return duration.ToTimedelta().total_seconds()


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of a call, and what it returned."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def view_seconds(rounds: int = 60) -> dict[str, NDArray[np.float64]]:
    """Times of the figures and recipes of each view of a map, by view, shape (rounds,)."""
    tensor = (np.random.default_rng(0).standard_normal((3, SIDE, SIDE)) ** 3).astype(np.float32)

    def figures(view: View) -> None:
        normalizations(statistics(reduce_to_view(tensor, view, 0), view))

    return {view.name: np.array([timed(lambda v=view: figures(v))[0] for _ in range(rounds)]) for view in View}


def health_rounds(address: str, run: argparse.Namespace) -> Iterator[tuple[str, Checks]]:
    """Checks without load, then rounds of checks under load."""
    request = requested("light", LIGHT_ROWS)
    with bare_server() as bare:
        for title, count in [("none", 0), *[(f"{run.clients} clients", run.clients)] * run.rounds]:
            with clients(address, request, count) as load:
                time.sleep(WARM_SECONDS)
                yield title, checks(address, bare, load, run.seconds)


def models() -> Path:
    """The model folder, written where it is not there yet."""
    for name, build in NETWORKS.items():
        if not (CACHE / name / "1" / "model.onnx").exists():
            networks.write_model(build(), "onnx", CACHE / name, SIDE)
    return CACHE


# --- the page --------------------------------------------------------------------------------------------------------


def page(
    run: argparse.Namespace,
    parts: Sequence[Parts],
    views: dict[str, NDArray[np.float64]],
    rounds: Sequence[tuple[str, Checks]],
    others: float,
) -> str:
    """The whole result, as Markdown."""
    return "\n".join([*_head(others), *_parts_table(run, parts), *_views_table(views), *_health_table(rounds), ""])


def _head(others: float) -> list[str]:
    return [
        "# What serving costs beside the model",
        "",
        "Written by `benchmarks/serving_cost.py`. A server process on a loopback connection, onnxruntime, pictures of",
        "224x224x3. `docs/threads.md` says which threads do what.",
        "",
        *machine_lines(len(os.sched_getaffinity(0)), others),
        "",
    ]


def _parts_table(run: argparse.Namespace, parts: Sequence[Parts]) -> list[str]:
    def line(name: str, of: Callable[[Parts], float]) -> str:
        values = [of(each) for each in parts]
        share = np.median([of(each) / each.total for each in parts])
        return f"| {name} | {np.median(values) * 1e3:.1f} ({min(values) * 1e3:.1f}) | {share:.2%} |"

    return [
        f"## One request of {run.rows} rows to a ResNet-50",
        "",
        f"Milliseconds, median (least) of {len(parts)} requests, one at a time. Queue, model and statistics as the",
        "response states them; reading and writing messages timed by themselves, on the same messages; the rest is",
        "what is left of the client's time: the connection, threads, and what methods do on the host.",
        "",
        "| part | ms | share |",
        "|---|---|---|",
        line("read the request", lambda each: each.decode),
        line("wait in the queue", lambda each: each.queue),
        line("model", lambda each: each.compute),
        line("statistics and the response", lambda each: each.figures),
        line("write the response", lambda each: each.encode),
        line("rest", lambda each: each.rest),
        line("total", lambda each: each.total),
        "",
        f"Not the model: {np.median([each.share for each in parts]):.2%}; the aim is below 5%.",
        "",
    ]


def _views_table(views: dict[str, NDArray[np.float64]]) -> list[str]:
    lines = [f"| {name} | {np.median(t) * 1e3:.2f} | {t.min() * 1e3:.2f} |" for name, t in views.items()]
    median, least = (sum(of(times) for times in views.values()) * 1e3 for of in (np.median, np.min))
    return [
        "## Statistics of one map",
        "",
        "Milliseconds on one core, reduction to the view and recipes included; the aim is below 12 for all four.",
        "",
        "| view | median | least |",
        "|---|---|---|",
        *lines,
        f"| all four | {median:.2f} | {least:.2f} |",
        "",
    ]


def _health_table(rounds: Sequence[tuple[str, Checks]]) -> list[str]:
    loaded = [found.ratio for title, found in rounds if title != "none"]
    return [
        "## Health checks under load",
        "",
        "Clients repeat a request to a small network as soon as it is answered, and receive maps of 600 KB. Meanwhile",
        "health checks go to this server and to a bare grpc.aio health server in a process of its own, in turn.",
        "Milliseconds of a round trip.",
        "",
        "| load | replies/s | checks | ours p50 | bare p50 | ours p99 | bare p99 | ours / bare, p99 |",
        "|---|---|---|---|---|---|---|---|",
        *(_health_line(title, found) for title, found in rounds),
        "",
        f"Under load the p99 is {np.median(loaded):.1f} times that of the bare server, median of {len(loaded)} rounds;",
        "the aim is at most 3.",
    ]


def _health_line(title: str, found: Checks) -> str:
    (own50, own99), (bare50, bare99) = (np.quantile(t, (0.5, 0.99)) * 1e3 for t in (found.ours, found.bare))
    return (
        f"| {title} | {found.replies_per_second:.1f} | {len(found.ours)} | {own50:.2f} | {bare50:.2f} "
        f"| {own99:.2f} | {bare99:.2f} | {found.ratio:.2f} |"
    )


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="gradient rows of a request")
    parser.add_argument("--requests", type=int, default=5)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one round of health checks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "serving_cost.md")
    return parser.parse_args()


def main() -> None:
    """Measures everything and writes the page."""
    run, folder = arguments(), models()
    started = Occupation.now()
    with serving(folder, 0, CACHE / "server.log") as served:
        parts = request_parts(served.address, requested("resnet50", run.rows), run.requests)
        rounds = list(health_rounds(served.address, run))
    others = Occupation.now().others_share(started)
    text = page(run, parts, view_seconds(), rounds, others)
    run.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
