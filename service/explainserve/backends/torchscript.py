"""TorchScript files (`.pt`, `.ts`): autograd through the script module.

A TorchScript file tells neither shapes nor element types, so model.toml states them: inputs in the order of `forward`,
outputs by key where `forward` returns a dict, in order otherwise.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from explainserve.backends.contract import LoadedModel, LoadOptions
from explainserve.backends.probe import LIKELIEST, FreeExtents, free_extents, sample_instances
from explainserve.backends.scripted_activation import with_kinds, without_activations
from explainserve.backends.torch_archive import require_torchscript
from explainserve.backends.torch_gradient import gradient_gaps
from explainserve.backends.torch_layout import in_faster_layout
from explainserve.backends.torch_precision import Arithmetic
from explainserve.backends.torch_rows import TorchModel, resolve_device, use_threads
from explainserve.errors import ModelRefused, first_line, is_out_of_memory
from explainserve.model_config import ModelConfig
from explainserve.signature import Signature

_TRAINING_ARGUMENTS = {"aten::batch_norm": 5, "aten::dropout": 2, "aten::feature_dropout": 2, "aten::alpha_dropout": 2}
_CONVOLUTIONS = ("aten::conv2d", "aten::_convolution", "aten::convolution", "aten::conv_transpose2d")
_FREEZING_TOLERANCE = 1e-3

Module = torch.jit.ScriptModule


def load(path: Path, config: ModelConfig, options: LoadOptions) -> LoadedModel:
    """Reads a TorchScript file.

    Raises:
        ModelRefused: the file is damaged or unsafe (see `torch_archive`), model.toml does not state the signature
            (SIGNATURE_INCOMPLETE) or another one than `forward` has (CONFIG_MISMATCH), an output is no tensor
            (UNSUPPORTED_OUTPUT), it was traced in training mode (TRAINING_MODE) or runs without gradients
            (NO_GRADIENT), or its device or precision is missing (DEVICE_UNAVAILABLE, PRECISION_UNAVAILABLE).
    """
    device = resolve_device(options)
    source = require_torchscript(path)
    use_threads(options.thread_count)
    signature = _stated_signature(path, config)
    arithmetic = Arithmetic.of(config.precision, device, signature)
    with warnings.catch_warnings():
        # torch announces the end of TorchScript on every use; whoever serves such a file cannot change it here.
        warnings.simplefilter("ignore", DeprecationWarning)
        script = _read(path, device)
        _require_arity(script, signature)
        trial = _Trial.of(_Forward.of(script, signature), signature, device)
        return _model(script, trial, arithmetic, config, "no_grad" in source)


def _model(
    script: Module, trial: _Trial, arithmetic: Arithmetic, config: ModelConfig, captured_no_grad: bool
) -> LoadedModel:
    """The model as it is served: frozen, and in the layout that is faster."""
    frozen = _frozen(script, trial)
    _require_evaluation_mode(frozen)
    signature = config.signature(with_kinds(trial.signature, frozen))
    forward = _Forward.of(frozen, signature)
    fixed_batch = not _accepts_two_rows(forward, trial)
    model = TorchModel(
        "torchscript",
        signature,
        forward,
        arithmetic,
        fixed_batch,
        weight_bytes=sum(weights.nbytes for weights in script.state_dict().values()),
        pre_activations=_before_activations(frozen, signature),
    )
    model.gaps = gradient_gaps(model, captured_no_grad)
    if not _has_convolutions(frozen):
        return model
    return in_faster_layout(model, lambda: _in_channels_last(model, script, trial))


@dataclass(frozen=True, eq=False)
class _Forward:
    """Calls the module, or a function made of it, with tensors in order."""

    module: Callable[..., Any]
    names: tuple[str, ...]

    @classmethod
    def of(cls, module: Callable[..., Any], signature: Signature) -> _Forward:
        return cls(module, tuple(spec.name for spec in signature.outputs))

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        # The optimizer of TorchScript compiles anew for each shape, and its gradients of parts that it fuses are slower
        # than autograd's: a row of a ResNet-50 took 1.1 times as long.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            outputs: Any = self.module(*inputs)
        if isinstance(outputs, dict):
            named = set(self.names) <= set(outputs)
            outputs = [outputs[name] for name in self.names] if named else list(outputs.values())
        values = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        for value in values:
            if not isinstance(value, torch.Tensor):
                raise _no_tensor(value)
        return list(values)


def _no_tensor(value: Any) -> ModelRefused:
    found = type(value).__name__
    return ModelRefused(
        "UNSUPPORTED_OUTPUT",
        f"forward returns a {found} among its outputs; return a tensor, or one tuple, list or dict of tensors",
        type=found,
    )


@dataclass(frozen=True)
class _Trial:
    """Random rows at extents at which the module runs, or at the likeliest where it runs at none of the guesses."""

    signature: Signature
    device: torch.device
    extents: FreeExtents

    @classmethod
    def of(cls, forward: _Forward, signature: Signature, device: torch.device) -> _Trial:
        trials = (cls(signature, device, extents) for extents in free_extents(signature))
        return next((trial for trial in trials if trial.runs(forward)), cls(signature, device, LIKELIEST))

    def inputs(self, count: int) -> list[torch.Tensor]:
        """`count` rows of every input, in order."""
        instances = sample_instances(self.signature, count, self.extents)
        stacked = [
            np.stack([instance[spec.name] for instance in instances]) if spec.batched else instances[0][spec.name]
            for spec in self.signature.inputs
        ]
        return [torch.from_numpy(array).to(self.device) for array in stacked]

    def runs(self, forward: _Forward) -> bool:
        """Whether one row does not raise."""
        try:
            with torch.no_grad():
                forward(self.inputs(1))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise MemoryError(first_line(error)) from error
            return False
        return True


def _stated_signature(path: Path, config: ModelConfig) -> Signature:
    if not config.inputs or not config.outputs:
        raise ModelRefused(
            "SIGNATURE_INCOMPLETE",
            f"{path.name} is TorchScript, which does not tell its signature; state in model.toml an [[inputs]] table "
            'per argument of forward (name, dtype, shape such as ["batch", 3, 224, 224]) and an [[outputs]] table per '
            "output",
            file=path.name,
        )
    return config.signature(None)


def _read(path: Path, device: torch.device) -> Module:
    try:
        read: Callable[..., Module] = torch.jit.load
        script = read(str(path), map_location=device)
    except Exception as error:
        raise ModelRefused(
            "MODEL_FILE_CORRUPT",
            f"{path.name} cannot be read by torch {torch.__version__}: {first_line(error)}",
            file=path.name,
        ) from error
    script.eval()
    for parameter in script.parameters():
        parameter.requires_grad_(False)
    return script


def _require_arity(script: Module, signature: Signature) -> None:
    forward: Any = script.forward
    arguments = forward.schema.arguments[1:]
    required = sum(not argument.has_default_value() for argument in arguments)
    if not required <= len(signature.inputs) <= len(arguments):
        raise ModelRefused(
            "CONFIG_MISMATCH",
            f"model.toml states {len(signature.inputs)} inputs, forward takes {', '.join(a.name for a in arguments)}",
            expected=len(arguments),
            actual=len(signature.inputs),
        )


def _frozen(script: Module, trial: _Trial) -> Module:
    """The module with constants folded in, batch normalization into convolutions, where that changes nothing else."""
    try:
        frozen: Module = torch.jit.freeze(script)
        before, after = (_values(_Forward.of(module, trial.signature), trial) for module in (script, frozen))
    except RuntimeError:
        return script
    same = torch.allclose(before, after, rtol=_FREEZING_TOLERANCE, atol=_FREEZING_TOLERANCE, equal_nan=True)
    return frozen if same else script


def _in_channels_last(model: TorchModel, script: Module, trial: _Trial) -> TorchModel:
    """The model on weights with their channels last, which a file that was frozen before keeps as they are."""
    copied: Any = copy.deepcopy(script)
    copied.to(memory_format=torch.channels_last)
    copied.eval()  # copying forgets the mode of a module that was frozen
    frozen, signature = _frozen(copied, trial), model.signature
    return model.in_channels_last(
        _Forward.of(frozen, signature), pre_activations=_before_activations(frozen, signature)
    )


def _before_activations(frozen: Module, signature: Signature) -> _Forward | None:
    """The module without the softmax or sigmoid in which outputs end; None where none does."""
    shown = any(spec.pre_activation for spec in signature.outputs)
    return _Forward.of(without_activations(frozen), signature) if shown else None


def _has_convolutions(module: Module) -> bool:
    """Whether it may convolve images: a traced convolution does not tell of how many dimensions."""
    graph: Any = module.inlined_graph  # its nodes live as long as it is held
    return any(graph.findAllNodes(kind) for kind in _CONVOLUTIONS)


def _values(forward: _Forward, trial: _Trial) -> torch.Tensor:
    """All numbers that a module returns for one row."""
    with torch.no_grad():
        return torch.cat([output.double().flatten() for output in forward(trial.inputs(1))])


def _require_evaluation_mode(module: Module) -> None:
    """`eval()` does not reach what was traced: tracing keeps the mode as a constant."""
    graph: Any = module.inlined_graph  # its nodes live as long as it is held
    for kind, position in _TRAINING_ARGUMENTS.items():
        for node in graph.findAllNodes(kind):
            if list(node.inputs())[position].toIValue() is True:
                raise ModelRefused(
                    "TRAINING_MODE",
                    f"{kind} was traced in training mode; call model.eval() before torch.jit.trace",
                    operator=kind,
                )


def _accepts_two_rows(forward: _Forward, trial: _Trial) -> bool:
    """Whether two rows give two rows: a trace may have the batch of its example baked in."""
    try:
        with torch.no_grad():
            one, two = (forward(trial.inputs(count)) for count in (1, 2))
    except RuntimeError:
        return not trial.runs(forward)
    _require_outputs(one, trial.signature)
    return all(pair.shape == (2, *single.shape[1:]) for single, pair in zip(one, two, strict=True))


def _require_outputs(outputs: Sequence[torch.Tensor], signature: Signature) -> None:
    if len(outputs) != len(signature.outputs):
        raise ModelRefused(
            "CONFIG_MISMATCH",
            f"model.toml states {len(signature.outputs)} outputs, forward returns {len(outputs)}",
            expected=len(outputs),
            actual=len(signature.outputs),
        )
