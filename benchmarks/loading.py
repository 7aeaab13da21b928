"""What requests wait while another model is loaded.

    python benchmarks/loading.py [--loads 3] [--threads 2] [-- FLAGS OF THE SERVER]

One client explains pictures with a small model, and another lists models, without pause: first with nothing else going
on, then while a ResNet-50 is loaded, `--loads` times in a row. Writes `benchmarks/results/loading.md`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np

import networks
from explainserve.rpc.tensors import encode
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1 import model_repository_service_pb2 as repository_pb
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceStub
from explainserve.v1.model_repository_service_pb2_grpc import ModelRepositoryServiceStub
from machine import Occupation, machine_lines
from serving import ROOT, serving

HERE = Path(__file__).parent
ASKED, LOADED = "two-digits", "resnet50"
STEPS = 16


def write_models(folder: Path) -> Path:
    """The model that is asked, and the one that is loaded meanwhile."""
    shutil.copytree(ROOT / "examples" / "two_digits" / "models" / ASKED, folder / ASKED)
    networks.write_model(networks.resnet50(), "onnx", folder / LOADED, 224)
    return folder


def explain_request() -> pb.ExplainRequest:
    """A map of few steps of a picture of noise."""
    message = pb.ExplainRequest()
    message.model.named.name = ASKED
    message.inputs["image"].CopyFrom(encode(np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype("f4")))
    message.methods.add().integrated_gradients.step_count = STEPS
    return message


@contextmanager
def asking(calls: dict[str, Callable[[], object]]) -> Iterator[dict[str, list[float]]]:
    """Makes each call over and over in a thread of its own; collects the seconds that each took."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    stopping = threading.Event()

    def ask(name: str) -> None:
        while not stopping.is_set():
            started = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - started)

    threads = [threading.Thread(target=ask, args=(name,), name=name) for name in calls]
    for thread in threads:
        thread.start()
    try:
        yield seconds
    finally:
        stopping.set()
        for thread in threads:
            thread.join()


def measured(address: str, loads: int) -> Iterator[str]:
    """The rows of the table, and how long a load takes."""
    with grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)]) as channel:
        explainer, repository = ExplainerServiceStub(channel), ModelRepositoryServiceStub(channel)
        request, load = explain_request(), repository_pb.LoadModelRequest(model={"name": LOADED})
        calls: dict[str, Callable[[], object]] = {
            "Explain": lambda: explainer.Explain(request, timeout=600),
            "ListModels": lambda: explainer.ListModels(pb.ListModelsRequest(), timeout=600),
        }
        started = time.perf_counter()
        for _ in range(loads):
            repository.LoadModel(load, timeout=600)
        alone = (time.perf_counter() - started) / loads
        with asking(calls) as at_rest:
            time.sleep(10)
        started = time.perf_counter()
        with asking(calls) as meanwhile:
            for _ in range(loads):
                repository.LoadModel(load, timeout=600)
        beside = (time.perf_counter() - started) / loads
    for name in calls:
        yield row(f"{name}, at rest", at_rest[name])
        yield row(f"{name}, while a model loads", meanwhile[name])
    yield f"\nA load took {alone:.1f} s, and {beside:.1f} s beside the requests."


def row(title: str, seconds: list[float]) -> str:
    """Milliseconds: median, 99th percentile, longest."""
    figures = [1e3 * value for value in (*np.quantile(seconds, [0.5, 0.99]), max(seconds))]
    return f"| {title} | {len(seconds)} | " + " | ".join(f"{value:.1f}" for value in figures) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("server", nargs="*", help="flags of the server, after --")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "loading.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models, log = write_models(Path(folder) / "models"), Path(folder) / "log"
        flags = ("--allow-model-control", *arguments.server)
        with serving(models, arguments.threads, log, *flags) as served:
            began = Occupation.now()
            rows = list(measured(served.address, arguments.loads))
    lines = [
        "# What requests wait while another model is loaded",
        "",
        f"Written by `benchmarks/loading.py --loads {arguments.loads}{' '.join(['', *arguments.server])}`: a {LOADED} "
        f"is loaded, {arguments.loads} times in all, {ASKED} explains with {STEPS} steps.",
        "",
        *machine_lines(arguments.threads, Occupation.now().others_share(began)),
        "",
        "| | calls | median, ms | 99th percentile | longest |",
        "|---|---|---|---|---|",
        *rows,
    ]
    arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
