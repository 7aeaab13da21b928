"""Model files are written once per session: an export takes seconds."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from explainserve import backends
from explainserve.backends.contract import LoadedModel, LoadOptions
from explainserve.model_config import read_model_config
from models import MODELS, write_model

ModelFile = Callable[[str, str], Path]
Load = Callable[[str, str], LoadedModel]


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    """The file of a model by its name and format, written on first use."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def write(name: str, file_format: str) -> Path:
        if file_format != "onnx" or MODELS[name].graph is None:
            pytest.importorskip("torch")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the end of TorchScript, and what its exporters do
            return write_model(MODELS[name], file_format, folder / file_format)

    return write


@pytest.fixture(scope="session")
def load(model_file: ModelFile) -> Load:
    """A loaded model by its name and format."""

    @functools.cache
    def load_file(name: str, file_format: str) -> LoadedModel:
        _require_backend(f".{file_format}")
        path = model_file(name, file_format)
        return backends.load(path, read_model_config(path.parents[1] / "model.toml"), LoadOptions())

    return load_file


def _require_backend(suffix: str) -> None:
    module = f"explainserve.backends.{backends.LOADERS[suffix]}"
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not there")
