"""What a model file says of itself, and a first model.toml for it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from explainserve import backends
from explainserve.backends import LoadOptions, OperatorGap
from explainserve.backends.trial import FATAL, Trials
from explainserve.errors import ModelRefused
from explainserve.model_config import ModelConfig
from explainserve.model_folder import FORMATS
from explainserve.opening import digest, model_files
from explainserve.signature import Axis, InputSpec, Layer, OutputKind, OutputSpec, Signature

_CHANNEL_COUNTS = (1, 3, 4)
_FLOAT = np.dtype(np.float32)
_UNKNOWN = Signature(
    (InputSpec("x", _FLOAT, (Axis("batch"), Axis("", 3), Axis("", 224), Axis("", 224))),),
    (OutputSpec("y", _FLOAT, (Axis("batch"), Axis("", 1000))),),
)
"""Stands in the starter of a file that does not tell its inputs and outputs."""


@dataclass(frozen=True)
class Inspection:
    """What is known of a model file.

    Attributes:
        format: a value of `repository.FORMATS`, or "" where the suffix is none of theirs.
        sha256: as `opening.digest` gives it; "" where the file was refused before.
        signature: inputs and outputs, or None where the file was refused or does not tell them.
        fixed_batch: the file accepts one row at a time only.
        gradient_mode: "gradient_graph", "autograd" or "black_box"; "" where the file was refused.
        undifferentiable_reason: why there is no gradient whatever the operators are, or "".
        operators: how often each operator occurs, the most frequent first; ONNX only.
        gaps: operators that have no gradient.
        layers: floating-point tensors that a person can pick for layer methods; ONNX only.
        refusal: why it cannot be served as it is, or None.
        starter: text of a model.toml to begin with, valid as it stands; "" where no model.toml helps.
    """

    path: Path
    format: str
    sha256: str = ""
    signature: Signature | None = None
    fixed_batch: bool = False
    gradient_mode: str = ""
    undifferentiable_reason: str = ""
    operators: Mapping[str, int] = field(default_factory=dict)
    gaps: tuple[OperatorGap, ...] = ()
    layers: tuple[Layer, ...] = ()
    refusal: ModelRefused | None = None
    starter: str = ""


def inspect_file(path: Path, trials: Trials | None = None) -> Inspection:
    """Reads a model file the way the server would without a model.toml; a refusal is part of the answer.

    Args:
        trials: try the file in another process before it is read in this one; None trusts it.
    """
    found = Inspection(path, FORMATS.get(path.suffix, ""))
    try:
        _check_file(path)
        files = model_files(path, trials)
        found = replace(found, sha256=digest(files))
        _try(files, found.sha256, trials)
        if found.format == "onnx":
            found = _with_graph(found)
        loaded = backends.load(path, ModelConfig(), LoadOptions())
    except ModelRefused as refusal:
        helps = refusal.reason == "SIGNATURE_INCOMPLETE"
        return replace(found, refusal=refusal, starter=_starter(_UNKNOWN, found.sha256) if helps else "")
    return replace(
        found,
        signature=loaded.signature,
        fixed_batch=loaded.fixed_batch,
        gradient_mode=loaded.gradient_mode,
        undifferentiable_reason=loaded.signature.undifferentiable_reason,
        gaps=loaded.gaps,
        layers=loaded.layers,
        starter=_starter(loaded.signature, found.sha256),
    )


def _check_file(path: Path) -> None:
    if not path.is_file() or path.suffix not in FORMATS:
        raise ModelRefused("NO_MODEL_FILE", f"{path.name} is no file ending in {', '.join(FORMATS)}", file=path.name)


def _try(files: Sequence[Path], sha256: str, trials: Trials | None) -> None:
    """Raises what kept another process from answering; any other refusal comes again, when more is known to tell."""
    try:
        if trials is not None:
            trials.check(files, sha256, ModelConfig(), LoadOptions(), "inspect")
    except ModelRefused as refusal:
        if refusal.reason in FATAL:
            raise


def _with_graph(found: Inspection) -> Inspection:
    """Adds what only a readable graph tells."""
    from explainserve.backends import onnx_file, onnx_graph  # servers of torch models have no onnx
    from explainserve.backends.onnx_weights import Weights

    model = onnx_file.read(found.path, Weights())
    return replace(found, operators=onnx_graph.operators(model))


def _starter(signature: Signature, sha256: str) -> str:
    """A model.toml that states what is known, guesses what is likely and says so, and leaves the rest to fill in."""
    head = ["# What the model file cannot say of itself. Correct the guesses; lines that begin with # are optional."]
    if signature is _UNKNOWN:
        head.append("# The file does not tell its inputs and outputs: these are placeholders.")
    if sha256:
        head.append(f"# sha256 = {_quoted(sha256)}")
    inputs = [_input_table(spec) for spec in signature.inputs]
    outputs = [_output_table(spec) for spec in signature.outputs]
    return "\n\n".join("\n".join(lines) for lines in [head, *inputs, *outputs]) + "\n"


def _input_table(spec: InputSpec) -> list[str]:
    table = [
        "[[inputs]]",
        f"name = {_quoted(spec.name)}",
        f'dtype = "{spec.dtype}"',
        f"shape = {_extents(spec.axes)}",
    ]
    layout = _likely_layout(spec)
    if layout:
        table += [
            f'layout = "{layout}"  # a guess from the shape',
            '# channel_order = "RGB"',
            "# value_range = [0.0, 1.0]  # of a pixel before mean and std are applied",
            "# mean = [0.485, 0.456, 0.406]  # per channel, or one for all",
            "# std = [0.229, 0.224, 0.225]",
        ]
    return table


def _output_table(spec: OutputSpec) -> list[str]:
    table = [
        "[[outputs]]",
        f"name = {_quoted(spec.name)}",
        f'dtype = "{spec.dtype}"',
        f"shape = {_extents(spec.axes)}",
        f'kind = "{spec.kind.value}"',
    ]
    labels = '# labels = "labels.txt"  # one a line'
    if spec.kind is OutputKind.PROBABILITIES:
        return [*table, f'activation = "{spec.activation.value}"', labels]
    if np.issubdtype(spec.dtype, np.floating) and len(spec.axes) > 1 and spec.axes[1].size != 1:
        table[-1] += '  # or "logits", where softmax or sigmoid gives probabilities; or "probabilities"'
        return [*table, '# activation = "softmax"  # or "sigmoid"', labels]
    return table


def _likely_layout(spec: InputSpec) -> str:
    if not spec.batched or len(spec.axes) != 4 or not spec.differentiable:
        return ""
    if spec.axes[1].size in _CHANNEL_COUNTS:
        return "NCHW"
    return "NHWC" if spec.axes[3].size in _CHANNEL_COUNTS else ""


def _extents(axes: Iterable[Axis]) -> str:
    extents = [
        _quoted(axis.name or f"axis{position}") if axis.size is None else str(axis.size)
        for position, axis in enumerate(axes)
    ]
    return f"[{', '.join(extents)}]"


def _quoted(text: str) -> str:
    """A TOML basic string. JSON's strings are such strings, but for one control character that JSON leaves as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
