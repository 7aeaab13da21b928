"""HOW a batch of rows is evaluated: the only place that imports torch or onnxruntime.

To add a backend: a file here with `load` (`contract.Loader`) and its line in LOADERS.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

from explainserve.backends.contract import Collect, LoadedModel, Loader, LoadOptions, OperatorGap
from explainserve.errors import ModelRefused
from explainserve.model_config import ModelConfig

LOADERS: dict[str, str] = {
    ".onnx": "onnx_runtime",
    ".pt2": "torch_export",
    ".pt": "torchscript",
    ".ts": "torchscript",
}
"""Module of this package that loads a file, by suffix. Imported on first use: a server of ONNX models needs no
torch."""


def load(path: Path, config: ModelConfig, options: LoadOptions) -> LoadedModel:
    """Reads a model file with the backend of its suffix.

    Raises:
        ModelRefused: the file cannot be served, or its backend is not installed (BACKEND_MISSING).
    """
    if options.device.startswith("cpu:"):
        options = replace(options, device="cpu")
    return loader(path.suffix)(path, config, options)


def loader(suffix: str) -> Loader:
    """The loader of a suffix.

    Raises:
        ModelRefused: its libraries are not installed (BACKEND_MISSING).
    """
    try:
        module = importlib.import_module(f"explainserve.backends.{LOADERS[suffix]}")
    except ModuleNotFoundError as error:
        raise ModelRefused(
            "BACKEND_MISSING",
            f"{suffix} files need {error.name}, which is not installed; install the extra that brings it",
            module=error.name,
        ) from error
    load_file: Loader = module.load
    return load_file


__all__ = ["LOADERS", "Collect", "LoadOptions", "LoadedModel", "OperatorGap", "load", "loader"]
