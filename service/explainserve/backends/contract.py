"""What every backend provides: a loaded model that evaluates rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from explainserve.errors import InvalidRequest, Unsupported
from explainserve.model_config import ModelConfig, Precision
from explainserve.plan import Rows, SegmentEvaluation
from explainserve.signature import Layer, Signature


@dataclass(frozen=True)
class LoadOptions:
    """Where and how models are evaluated.

    Attributes:
        device: "cpu", "cuda", "tensorrt" (each also with ":N") or "openvino"; torch has "cpu" and "cuda". Backends are
            given "cpu" for any number: it only tells workers apart, which share one processor.
        allow_fallback: evaluate on the CPU where the device is missing, instead of refusing the model.
        thread_count: threads of one evaluation; 0 means all cores.
        cache: folder for gradient graphs, shared safely by several processes; None builds them at each start.
        share_weights: hold each weight once for all sessions, without the packed copies that compute faster.
        precision: of products; the ONNX loader takes it from the model's configuration.
        captures: record on CUDA what a session runs and run it again as a whole; the ONNX loader decides it.
        channels_last: how a torch model lays images out; None has the loader time both.
        compile_seconds: that compiling a model may take, where its configuration asks for it; 0 compiles none.
    """

    device: str = "cpu"
    allow_fallback: bool = False
    thread_count: int = 0
    cache: Path | None = None
    share_weights: bool = False
    precision: Precision = Precision.FLOAT32
    captures: bool = False
    channels_last: bool | None = None
    compile_seconds: float = 0.0


@dataclass(frozen=True)
class OperatorGap:
    """What keeps a model from having a gradient, mostly an operator between an output and an input without a rule.

    Attributes:
        operator: "" where it is none.
        node: its name, or that of the output that has no gradient; "" where no output has one.
    """

    operator: str
    node: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        """Where the gradient ends, and why."""
        place = f"{self.operator} ({self.node})" if self.operator else self.node
        return f"{place}: {self.reason}" if place else self.reason


@dataclass(frozen=True)
class Memory:
    """Bytes that a loaded model takes.

    Attributes:
        weight_bytes: the initializers of the file; those of 1 KiB and more are held once and shared by all graphs.
        gradient_bytes: what only gradients take: constants of gradient graphs of 1 KiB and more, such as flipped
            kernels, patterns, and weights that LRP merged with what is behind them.
        session_bytes: by how much the process grew when sessions were opened: weights packed for speed, and buffers.
            Measured, so only about right; None where it cannot be. Of torch, what CUDA graphs keep on the device.
    """

    weight_bytes: int
    gradient_bytes: int
    session_bytes: int | None


@dataclass(frozen=True)
class Compilation:
    """What came of compiling a model.

    Attributes:
        map_error: relative L2 error of whole maps of random rows, beside the model as it was before; None where nothing
            compiled runs. See `precision.map_error`.
        refusal: why nothing compiled runs, or "".
    """

    map_error: float | None = None
    refusal: str = ""


NO_RECTIFIERS = "the network has no rectifiers, on which it is defined"
"""Why a model cannot follow a rule for rectifiers."""


NAMED_GAPS = 3
"""Gaps that an error lists; the model's metadata has all of them."""


def no_value_range(signature: Signature) -> str:
    """Why rules that take the bounds of inputs do not get them, or ""."""
    without = [name for name in signature.differentiable_inputs if signature.input(name).bounds is None]
    return f"input {without[0]!r} states no value range; state its value_range in model.toml" if without else ""


def not_differentiable(gaps: Sequence[OperatorGap], reason: str = "") -> Unsupported:
    """NOT_DIFFERENTIABLE, with the first gaps or what else keeps a gradient from being there."""
    first = "; ".join(map(str, gaps[:NAMED_GAPS]))
    text = f"the model has no gradient: {first or reason}"
    return Unsupported("NOT_DIFFERENTIABLE", text, gaps=first, gap_count=len(gaps))


def unknown_layer(name: str) -> InvalidRequest:
    """UNKNOWN_LAYER."""
    return InvalidRequest("UNKNOWN_LAYER", f"the model has no layer {name!r}", layer=name)


def layer_not_on_path(layer: str, output: str) -> InvalidRequest:
    """LAYER_NOT_ON_PATH."""
    text = f"output {output!r} does not depend on layer {layer!r}"
    return InvalidRequest("LAYER_NOT_ON_PATH", text, layer=layer, output=output)


Collect = Callable[[], tuple[SegmentEvaluation, ...]]
"""Waits for rows that were submitted; returns and raises what `LoadedModel.evaluate` does."""


class LoadedModel(Protocol):
    """A model in memory. Used by one thread at a time, but for `interrupt`.

    Attributes:
        backend: "onnxruntime", "torch.export" or "torchscript".
        device: where it really runs, such as "cpu" or "cuda:0".
        signature: inputs and outputs, from the file and its configuration.
        fixed_batch: the file accepts one row at a time only.
        layers: what a person can pick for layer methods, in the order of the graph; empty where the file does not tell.
        gradient_rules: the rules of backward passes that the backend knows, and why this model cannot follow each,
            whatever of it is explained: "" where it can.
        layers_refusal: why layers cannot be tapped, differentiated and cut; "" where they can. Rules that
            `gradient_rules` does not name are refused for the same reason.
        library_versions: of the libraries that compute, by name.
        compilation: what came of compiling it; None where that was not asked for, or the backend has no compiler.
    """

    backend: str
    device: str
    signature: Signature
    fixed_batch: bool
    layers: tuple[Layer, ...]
    gradient_rules: Mapping[str, str]
    layers_refusal: str
    library_versions: Mapping[str, str]
    compilation: Compilation | None

    @property
    def gradient_mode(self) -> str:
        """ "gradient_graph", "autograd" or "black_box"."""
        ...

    @property
    def gaps(self) -> tuple[OperatorGap, ...]:
        """Operators without a gradient; where there are any, only forward-only rows are evaluated."""
        ...

    @property
    def execution(self) -> str:
        """How the backend runs it where it has a choice, made at load for speed; "" where it has none. Results of
        choices differ by rounding.
        """
        ...

    @property
    def runs_ahead(self) -> bool:
        """Whether `submit` returns before the rows are evaluated, so that the next ones can be prepared meanwhile."""
        ...

    @property
    def memory(self) -> Memory | None:
        """What it takes now; None where the backend does not tell."""
        ...

    def rule_gap(self, rule: str) -> str:
        """Why one of these rules ends between the first output and the inputs, such as an operator that does not have
        it, or ""; of a model without a floating-point input, and the layers that are explained in their place.

        Searched when it is first asked for, on any thread: a second in a graph of a hundred layers.
        """
        ...

    def evaluate(self, rows: Rows) -> tuple[SegmentEvaluation, ...]:
        """Interpolates the rows, runs them forward in one batch and backward once per selector, and sums weighted
        gradients per segment.

        Returns:
            One evaluation per segment of `rows` and selector of it, in order: scores, and gradient sums where the
            function is differentiated; score tensors of segments without selectors. Rows of weight 0 are selected out
            of sums, never multiplied by zero. Sums are accumulated in float32 or better.

        Raises:
            EvaluationFailed: the model raised.
            Unsupported: a gradient is asked of a model with gaps (NOT_DIFFERENTIABLE).
            InvalidRequest: a layer does not exist (UNKNOWN_LAYER), or the score does not depend on it
                (LAYER_NOT_ON_PATH).
        """
        ...

    def submit(self, rows: Rows) -> Collect:
        """Begins to `evaluate`; a model that does not run ahead begins when the results are collected.

        What is submitted is evaluated, and to be collected, in its order.

        Raises:
            EvaluationFailed, Unsupported: as `evaluate`.
        """
        ...

    def peak_bytes(self, rows: Rows) -> int | None:
        """Most memory that evaluating the rows takes on the device, beside what the model takes for good; None where it
        cannot be measured.

        Raises:
            EvaluationFailed, Unsupported: as `evaluate`.
        """
        ...

    def interrupt(self) -> None:
        """Asks the evaluation that is in progress on another thread to end; it then raises.

        Has no effect where nothing is in progress, or where the library cannot do it.
        """
        ...


Loader = Callable[[Path, ModelConfig, LoadOptions], LoadedModel]
"""Reads a model file.

Raises:
    ModelRefused: the file cannot be served; the reason says why.
"""
