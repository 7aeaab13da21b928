"""TorchScript files (`.pt`, `.ts`): autograd through the script module.

A TorchScript file tells neither shapes nor element types, so model.toml states them: inputs in the order of `forward`,
outputs by key where `forward` returns a dict, in order otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from explainserve.backends.contract import LoadedModel, LoadOptions
from explainserve.backends.probe import sample_instances
from explainserve.backends.torch_archive import require_torchscript
from explainserve.backends.torch_gradient import gradient_gaps
from explainserve.backends.torch_rows import TorchModel, first_line, resolve_device, use_threads
from explainserve.errors import ModelRefused
from explainserve.model_config import ModelConfig
from explainserve.signature import Signature

_TRAINING_ARGUMENTS = {"aten::batch_norm": 5, "aten::dropout": 2, "aten::feature_dropout": 2, "aten::alpha_dropout": 2}
_FREEZING_TOLERANCE = 1e-3

Module = torch.jit.ScriptModule


def load(path: Path, config: ModelConfig, options: LoadOptions) -> LoadedModel:
    """Reads a TorchScript file.

    Raises:
        ModelRefused: the file is damaged or unsafe (see `torch_archive`), model.toml does not state the signature
            (SIGNATURE_INCOMPLETE) or another one than `forward` has (CONFIG_MISMATCH), it was traced in training mode
            (TRAINING_MODE) or runs without gradients (NO_GRADIENT), or its device is missing (DEVICE_UNAVAILABLE).
    """
    device = resolve_device(options)
    source = require_torchscript(path)
    use_threads(options.thread_count)
    signature = _stated_signature(path, config)
    with warnings.catch_warnings():
        # torch announces the end of TorchScript on every use; whoever serves such a file cannot change it here.
        warnings.simplefilter("ignore", DeprecationWarning)
        script = _read(path, device)
        _require_arity(script, signature)
        frozen = _frozen(script, signature, device)
    _require_evaluation_mode(frozen)
    forward = _Forward(frozen, tuple(spec.name for spec in signature.outputs))
    fixed_batch = not _accepts_two_rows(forward, signature, device)
    model = TorchModel("torchscript", signature, forward, device, fixed_batch)
    model.gaps = gradient_gaps(model, "no_grad" in source)
    return model


@dataclass(frozen=True, eq=False)
class _Forward:
    """Calls the module with tensors in order."""

    module: Module
    names: tuple[str, ...]

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        outputs: Any = self.module(*inputs)
        if isinstance(outputs, torch.Tensor):
            return [outputs]
        if not isinstance(outputs, dict):
            return list(outputs)
        return [outputs[name] for name in self.names] if set(self.names) <= set(outputs) else list(outputs.values())


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


def _frozen(script: Module, signature: Signature, device: torch.device) -> Module:
    """The module with constants folded in, batch normalization into convolutions, where that changes nothing else."""
    try:
        frozen: Module = torch.jit.freeze(script)
        inputs = _sample(signature, 1, device)
        before, after = (_values(module, signature, inputs) for module in (script, frozen))
    except RuntimeError:
        return script
    same = torch.allclose(before, after, rtol=_FREEZING_TOLERANCE, atol=_FREEZING_TOLERANCE, equal_nan=True)
    return frozen if same else script


def _values(module: Module, signature: Signature, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """All numbers that a module returns."""
    forward = _Forward(module, tuple(spec.name for spec in signature.outputs))
    with torch.no_grad():
        return torch.cat([output.double().flatten() for output in forward(inputs)])


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


def _accepts_two_rows(forward: _Forward, signature: Signature, device: torch.device) -> bool:
    """Whether two rows give two rows: a trace may have the batch of its example baked in."""
    try:
        with torch.no_grad():
            one, two = (forward(_sample(signature, count, device)) for count in (1, 2))
    except RuntimeError:
        return not _runs(forward, _sample(signature, 1, device))
    _require_outputs(one, signature)
    return all(pair.shape == (2, *single.shape[1:]) for single, pair in zip(one, two, strict=True))


def _runs(forward: _Forward, inputs: Sequence[torch.Tensor]) -> bool:
    try:
        with torch.no_grad():
            forward(inputs)
    except RuntimeError:
        return False
    return True


def _require_outputs(outputs: Sequence[torch.Tensor], signature: Signature) -> None:
    if len(outputs) != len(signature.outputs):
        raise ModelRefused(
            "CONFIG_MISMATCH",
            f"model.toml states {len(signature.outputs)} outputs, forward returns {len(outputs)}",
            expected=len(outputs),
            actual=len(signature.outputs),
        )


def _sample(signature: Signature, count: int, device: torch.device) -> list[torch.Tensor]:
    """Random rows for every input, in order."""
    instances = sample_instances(signature, count)
    stacked = [
        np.stack([instance[spec.name] for instance in instances]) if spec.batched else instances[0][spec.name]
        for spec in signature.inputs
    ]
    return [torch.from_numpy(array).to(device) for array in stacked]
