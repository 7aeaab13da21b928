"""Our gradient graph beside onnxruntime's forward pass and torch's autograd: time per batch, and bytes.

    python benchmarks/onnx_gradient.py [--networks ResNet-50 ...] [--rows 1 8 32] [--seconds 25] [--resume]

Same machine, same threads, same process, contestants in turn. Ours is the model as the service loads it, in
micro-batches of the size that it finds fastest; torch is eager, with frozen parameters, in both of its memory formats,
all rows at once and in the same micro-batches, of which the fastest counts. The floor of a gradient is twice the
forward pass, plus the time to read once what the backward part needs of the forward activations. Exports and
figures are kept in `benchmarks/cache`; with `--resume`, what is already there is not measured again. Writes
`benchmarks/results/onnx_gradient.md` after every measurement.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import networks
from explainserve import backends
from explainserve.backends import batch_size, onnx_graph
from explainserve.backends.batch_size import BatchSize
from explainserve.backends.contract import LoadedModel, LoadOptions
from explainserve.backends.onnx_session import open_session
from explainserve.backends.onnx_subnormal import flush_subnormals
from explainserve.backends.onnx_weights import Weights
from explainserve.backends.resident_memory import resident_bytes
from explainserve.model_config import ModelConfig
from explainserve.onnx_vjp import GradientGraph, input_gradient
from explainserve.onnx_vjp.blocked import keep_in_blocks
from explainserve.onnx_vjp.disjoint_windows import unpool_disjoint_windows
from explainserve.opening import DEFAULT_BATCH_ROWS
from explainserve.plan import Differentiation, Rows, Segment, SegmentEvaluation, Selector
from explainserve.signature import ScoreHead
from machine import Occupation

HERE = Path(__file__).parent
CACHE = HERE / "cache"
FIGURES = CACHE / "onnx_gradient.jsonl"
SIDE = 224
CLASSES = 1000
TARGET = 3
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50": networks.resnet50,
    "VGG-16": networks.vgg16,
    "MobileNetV2": networks.mobilenet_v2,
    "ViT-S/16": networks.vit_small,
    "Swin-T": networks.swin_tiny,
}
AIMS = {"ResNet-50": 1.25, "VGG-16": 1.25, "MobileNetV2": 1.25, "ViT-S/16": 1.5, "Swin-T": 1.5}
"""Time of a gradient over the floor: 1.25 for convolutional networks, 1.5 for transformers."""
LAYOUTS = {"torch": torch.contiguous_format, "torch, channels-last": torch.channels_last}
WARM_UP_SECONDS = 30.0
REST_SECONDS = 0.05
"""Between contestants, so that threads of one that still spin do not take the processor from the next."""

Array = NDArray[Any]


# --- what is measured ------------------------------------------------------------------------------------------------


class Network:
    """A network as torch has it, as a file, and as a gradient graph; everything is made when first needed."""

    def __init__(self, name: str, threads: int) -> None:
        self.name, self.options = name, LoadOptions(thread_count=threads)
        self.weights = Weights()

    @cached_property
    def net(self) -> nn.Module:
        """The torch module, with seeded weights."""
        return NETWORKS[self.name]()

    @cached_property
    def path(self) -> Path:
        """The exported file."""
        folder = CACHE / "onnx_gradient" / self.name.replace("/", "-")
        if not (folder / "1" / "model.onnx").exists():
            networks.write_model(self.net, "onnx", folder, SIDE, CLASSES)
        return folder / "1" / "model.onnx"

    @cached_property
    def forward(self) -> onnx.ModelProto:
        """The model; its weights are references."""
        model = onnx.load(self.path)
        self.weights.take(model)
        return model

    @cached_property
    def gradient(self) -> GradientGraph:
        """The gradient graph as the service builds it."""
        forward = self.forward
        result = input_gradient(forward, ["image"], "logits", weights=self.weights.of(forward))
        unpool_disjoint_windows(result.model)
        keep_in_blocks(result.model)
        self.weights.take(result.model)
        onnx_graph.with_outputs(result.model, ["logits", result.gradients["image"]])
        return result

    def seconds_to_build(self) -> float:
        """Time to make the gradient graph."""
        assert self.forward
        started = time.perf_counter()
        assert self.gradient
        return time.perf_counter() - started

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model as the service loads it."""
        return backends.load(self.path, ModelConfig(), self.options)

    @cached_property
    def batch_size(self) -> BatchSize:
        """The size of micro-batches that the service chooses."""
        return batch_size.fastest(self.loaded, DEFAULT_BATCH_ROWS, WARM_UP_SECONDS)

    def gradient_session(self, pack: bool = True) -> Any:
        """A session of the gradient graph, as the service opens it."""
        model = self.gradient.model
        options = LoadOptions(thread_count=self.options.thread_count, share_weights=not pack)
        flush_subnormals(model, self.weights.of(model))
        return open_session(model, options, self.weights)

    def saved_bytes(self, rows: int) -> int:
        """Bytes of the forward activations that the backward part reads."""
        model = onnx.ModelProto()
        model.CopyFrom(self.gradient.model)
        model.graph.ClearField("value_info")
        for value in model.graph.input:
            value.type.tensor_type.shape.dim[0].dim_value = rows
        types = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.value_info
        sizes = {value.name: _byte_count(value.type.tensor_type) for value in types}
        forward = {name for node in self.forward.graph.node for name in node.output}
        backward = [node for node in model.graph.node if forward.isdisjoint(node.output)]
        return sum(sizes.get(name, 0) for name in {name for node in backward for name in node.input} & forward)


def _byte_count(kind: Any) -> int:
    item = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    return int(np.prod([dim.dim_value for dim in kind.shape.dim], dtype=np.int64)) * item


def images(rows: int) -> Array:
    """Noise, shape (rows, 3, SIDE, SIDE)."""
    return np.random.default_rng(0).standard_normal((rows, 3, SIDE, SIDE)).astype(np.float32)


def one_class(rows: int) -> Array:
    """The cotangent of one class, shape (rows, CLASSES)."""
    cotangent = np.zeros((rows, CLASSES), np.float32)
    cotangent[:, TARGET] = 1
    return cotangent


def micro_batches(image: Array, rows_at_once: int, wrt: tuple[str, ...]) -> list[Rows]:
    """Every image as a row of its own: of its score tensor, or of the gradient of one class."""
    function = Differentiation("logits", ScoreHead.IDENTITY, wrt)
    selectors = (Selector(np.array([TARGET], np.int64), np.ones(1, np.float32)),) if wrt else ()
    points = [{"image": row} for row in image]
    segments = [Segment(point, point, {}, function, np.ones(1), np.ones(1), selectors) for point in points]
    starts = range(0, len(segments), rows_at_once)
    return [Rows(function, tuple(segments[start : start + rows_at_once])) for start in starts]


def ours(network: Network, image: Array, *wrt: str) -> Callable[[], list[SegmentEvaluation]]:
    """The image as the service evaluates it, forward-only or with its gradient."""
    batches = micro_batches(image, network.batch_size.rows, wrt)
    return lambda: [evaluation for rows in batches for evaluation in network.loaded.evaluate(rows)]


def torch_gradient(
    net: nn.Module, image: Array, layout: torch.memory_format, rows_at_once: int
) -> Callable[[], list[Tensor]]:
    """Autograd's gradients in one memory format; parameters are frozen."""
    moved = copy.deepcopy(net).to(memory_format=layout)
    parts = torch.from_numpy(image).contiguous(memory_format=layout).split(rows_at_once)
    cotangents = torch.from_numpy(one_class(len(image))).split(rows_at_once)

    def gradient(part: Tensor, cotangent: Tensor) -> Tensor:
        x = part.detach().requires_grad_(True)
        return torch.autograd.grad(moved(x), x, cotangent)[0]

    return lambda: [gradient(part, cotangent) for part, cotangent in zip(parts, cotangents, strict=True)]


def peers(network: Network, image: Array) -> dict[str, Callable[[], list[Tensor]]]:
    """torch in both memory formats, all rows at once and in our micro-batches."""
    rows, ours_at_once = len(image), network.batch_size.rows
    sizes = {"": rows} if rows <= ours_at_once else {"": rows, f", {ours_at_once} at once": ours_at_once}
    return {
        name + told: torch_gradient(network.net, image, layout, size)
        for name, layout in LAYOUTS.items()
        for told, size in sizes.items()
    }


def read_rate(threads: int) -> float:
    """Bytes per second that all threads together read from memory, by the best of several sums of 256 MiB."""
    torch.set_num_threads(threads)
    values = torch.ones(1 << 26)
    return values.nbytes / min(_timed(values.sum) for _ in range(8))


def _timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


# --- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Wall seconds of one network and batch, per contestant.

    Attributes:
        rows_at_once: of our micro-batches.
        saved_bytes: of forward activations that the backward part reads.
        read_seconds: how long reading them takes here.
        distance: relative L2 distance of our gradient to torch's.
        others_share: of the processor, that other processes took meanwhile.
        execution: how loading chose to run our micro-batches; "" with all threads at each operator.
    """

    network: str
    rows: int
    rows_at_once: int
    seconds: dict[str, list[float]]
    saved_bytes: int
    read_seconds: float
    distance: float
    others_share: float
    execution: str = ""

    def least(self, contestant: str) -> float:
        """The fastest run."""
        return min(self.seconds[contestant])

    def median(self, contestant: str) -> float:
        """The median run."""
        return float(np.median(self.seconds[contestant]))

    @property
    def floor(self) -> float:
        """Seconds that a gradient takes at least."""
        return 2 * self.least("forward") + self.read_seconds

    @property
    def peer(self) -> str:
        """The fastest way of torch."""
        return min((name for name in self.seconds if name.startswith("torch")), key=self.least)


def timing(network: Network, rows: int, seconds: float, rate: float) -> Timing:
    """Runs the contestants in turn for about `seconds`, at least three times each, after one turn that does not
    count.
    """
    image, started = images(rows), Occupation.now()
    contestants: dict[str, Callable[[], Any]] = {
        "forward": ours(network, image),
        "gradient": ours(network, image, "image"),
        **peers(network, image),
    }
    found = np.stack([evaluation.gradient_sums["image"] for evaluation in contestants["gradient"]()])
    expected = torch.cat(contestants["torch"]()).numpy()
    saved = network.saved_bytes(rows)
    return Timing(
        network.name,
        rows,
        network.batch_size.rows,
        _in_turn(contestants, seconds),
        saved,
        saved / rate,
        float(np.linalg.norm(found - expected) / np.linalg.norm(expected)),
        Occupation.now().others_share(started),
        network.loaded.execution,
    )


def _in_turn(contestants: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    first = _timed(lambda: [run() for run in contestants.values()])
    for _ in range(max(3, int(seconds / first))):
        for name, run in contestants.items():
            time.sleep(REST_SECONDS)
            times[name].append(_timed(run))
    return times


# --- bytes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bytes:
    """What a gradient costs to build and to hold.

    Attributes:
        weight_bytes: of the file's own weights, which both graphs share.
        added_bytes: of weights that only the gradient graph has: flipped kernels.
        packed_bytes: that a gradient session with packed weights takes, beside all of those.
        unpacked_bytes: the same of one without.
        seconds: least time of a batch of eight, packed and unpacked.
    """

    network: str
    build_seconds: float
    node_count: int
    weight_bytes: int
    added_bytes: int
    packed_bytes: int
    unpacked_bytes: int
    seconds: dict[str, float]


def measured_bytes(network: Network, seconds: float) -> Bytes:
    """Sessions are opened in processes of their own, where nothing else has left memory to be used again."""
    build_seconds = network.seconds_to_build()
    own = Weights()
    own.take(onnx.load(network.path))
    added = network.weights.byte_count - own.byte_count
    packed, unpacked = (_session_bytes(network, pack) for pack in (True, False))
    batch = {"image": images(8), network.gradient.cotangent: one_class(8)}
    sessions = {str(pack): network.gradient_session(pack) for pack in (True, False)}
    times = _in_turn(
        {pack: lambda session=session: session.run(None, batch) for pack, session in sessions.items()}, seconds
    )
    return Bytes(
        network.name,
        build_seconds,
        len(network.gradient.model.graph.node),
        own.byte_count,
        added,
        packed,
        unpacked,
        {"packed": min(times["True"]), "unpacked": min(times["False"])},
    )


def _session_bytes(network: Network, pack: bool) -> int:
    command = [sys.executable, __file__, "--session", network.name, "--threads", str(network.options.thread_count)]
    answer = subprocess.run([*command, *(["--pack"] if pack else [])], capture_output=True, text=True, check=True)
    return int(answer.stdout.split()[-1])


def print_session_bytes(network: Network, pack: bool) -> None:
    """What the child process does."""
    assert network.gradient
    before = resident_bytes() or 0
    session = network.gradient_session(pack)
    print((resident_bytes() or 0) - before)
    del session


# --- the page --------------------------------------------------------------------------------------------------------


def figures() -> tuple[list[Timing], list[Bytes]]:
    """What is kept of this and earlier runs; of one network and batch, the newest."""
    timings: dict[tuple[str, int], Timing] = {}
    sizes: dict[str, Bytes] = {}
    for line in FIGURES.read_text(encoding="utf-8").splitlines() if FIGURES.exists() else []:
        kind, values = json.loads(line)
        if kind == "timing":
            timings[values["network"], values["rows"]] = Timing(**values)
        else:
            sizes[values["network"]] = Bytes(**values)
    order = list(NETWORKS)
    return sorted(timings.values(), key=lambda t: (order.index(t.network), t.rows)), [
        sizes[name] for name in order if name in sizes
    ]


def keep(kind: str, measured: Timing | Bytes) -> None:
    """Appends a measurement to what is kept."""
    FIGURES.parent.mkdir(parents=True, exist_ok=True)
    with FIGURES.open("a", encoding="utf-8") as file:
        file.write(json.dumps([kind, asdict(measured)]) + "\n")


def page(threads: int) -> str:
    """The results as Markdown."""
    timings, sizes = figures()
    return "\n".join([*_introduction(threads, timings), *_timing_table(timings), *_bytes_table(sizes), ""])


def _introduction(threads: int, timings: list[Timing]) -> Iterator[str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    libraries = ("torch", "onnxruntime", "onnx", "numpy")
    others = max((timing.others_share for timing in timings), default=0.0)
    yield "# The gradient graph beside torch and the forward pass"
    yield ""
    yield "Written by `benchmarks/onnx_gradient.py`. Random weights, 224x224, gradient of one class logit with respect"
    yield "to the image, contestants in turn. Ours, forward and gradient: the model as the service loads and evaluates"
    yield "it, in micro-batches of the size that it finds fastest, with all threads at each operator or (divided_rows)"
    yield "with some of the rows on each. torch: eager, frozen parameters, all threads at each operator, the fastest of"
    yield "its two memory formats, with all rows at once or in our micro-batches. Floor: twice the forward pass, plus"
    yield "reading once what the gradient needs of the forward activations. Ratios are of the fastest runs. Distance:"
    yield "relative L2, to torch's gradient in float32, which is no nearer to the exact one."
    yield ""
    cores = len(os.sched_getaffinity(0))
    yield f"Machine: {cores} cores, {platform.machine()}, {memory:.0f} GiB; {threads} threads for everyone."
    yield f"Other processes took at most {others:.0%} of the processor during a measurement."
    yield f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in libraries) + "."


def _timing_table(timings: list[Timing]) -> Iterator[str]:
    yield ""
    yield "## Time"
    yield ""
    yield "Milliseconds per batch: least (median)."
    yield ""
    heads = ["network", "rows", "at once", "forward", "floor", "of it reading", "ours", "torch", "ours / floor", "aim"]
    yield from _head(*heads, "ours / torch", "distance")
    for t in timings:
        ours = t.least("gradient")
        cells = [
            t.network,
            t.rows,
            _at_once(t),
            _milliseconds(t, "forward"),
            f"{1e3 * t.floor:.0f}",
            f"{1e3 * t.read_seconds:.0f}",
        ]
        cells += [_milliseconds(t, "gradient"), _milliseconds(t, t.peer) + t.peer.removeprefix("torch")]
        cells += [f"{ours / t.floor:.2f}", AIMS[t.network], f"{ours / t.least(t.peer):.2f}", f"{t.distance:.0e}"]
        yield "| " + " | ".join(str(cell) for cell in cells) + " |"


def _at_once(timing: Timing) -> str:
    """Rows of our micro-batches, and how they are run."""
    return ", ".join(filter(None, [str(min(timing.rows, timing.rows_at_once)), timing.execution]))


def _milliseconds(timing: Timing, contestant: str) -> str:
    return f"{1e3 * timing.least(contestant):.0f} ({1e3 * timing.median(contestant):.0f})"


def _bytes_table(sizes: list[Bytes]) -> Iterator[str]:
    yield ""
    yield "## Bytes"
    yield ""
    yield "MiB, and milliseconds per batch of eight. Added: weights that only the gradient graph has (flipped kernels)."
    yield "Session: what a gradient session takes beside the weights; unpacked is with `share_weights`."
    yield ""
    heads = ["network", "seconds to build", "nodes", "weights", "added", "session, packed", "session, unpacked"]
    yield from _head(*heads, "ms packed", "ms unpacked")
    for size in sizes:
        mebibytes = [size.weight_bytes, size.added_bytes, size.packed_bytes, size.unpacked_bytes]
        cells = [
            size.network,
            f"{size.build_seconds:.1f}",
            size.node_count,
            *(f"{count / 2**20:.0f}" for count in mebibytes),
        ]
        cells += [f"{1e3 * seconds:.0f}" for seconds in size.seconds.values()]
        yield "| " + " | ".join(str(cell) for cell in cells) + " |"


def _head(*names: str) -> Iterator[str]:
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)


# --- the command line ------------------------------------------------------------------------------------------------


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=25.0, help="of measuring, per network and batch")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run measured")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "onnx_gradient.md")
    parser.add_argument("--session", choices=NETWORKS, help=argparse.SUPPRESS)
    parser.add_argument("--pack", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.session:
        print_session_bytes(Network(arguments.session, arguments.threads), arguments.pack)
        return
    if not arguments.resume:
        FIGURES.unlink(missing_ok=True)
    measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Everything that is asked for and not kept yet; the page is written anew after each piece."""
    rate = read_rate(arguments.threads)
    timings, sizes = figures()
    known: set[Any] = {*((t.network, t.rows) for t in timings), *(size.network for size in sizes)}
    for name in arguments.networks:
        network = Network(name, arguments.threads)
        if name not in known:
            _record("bytes", measured_bytes(network, arguments.seconds / 2), arguments)
        for rows in arguments.rows:
            if (name, rows) not in known:
                _record("timing", timing(network, rows, arguments.seconds, rate), arguments)


def _record(kind: str, measured: Timing | Bytes, arguments: argparse.Namespace) -> None:
    keep(kind, measured)
    text = page(arguments.threads)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text, encoding="utf-8")
    print(*(line for line in text.splitlines() if line.startswith(f"| {measured.network} |")), sep="\n", flush=True)


if __name__ == "__main__":
    main()
