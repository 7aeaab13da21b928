"""Finds model versions in the model folder.

    models/<name>/[model.toml]  models/<name>/<version>/model.onnx | model.pt2 | model.pt | model.ts

A version's own model.toml replaces the one beside the versions; the two are never merged.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from explainserve.backends import LOADERS
from explainserve.errors import ModelRefused, NotFound
from explainserve.model_config import ModelConfig, read_model_config

logger = logging.getLogger(__name__)

CONFIG_NAME = "model.toml"
NO_VERSION = 0
"""Stands in for the version of a model folder that has none."""

FORMATS = {".onnx": "onnx", ".pt2": "torch_export", ".pt": "torchscript", ".ts": "torchscript"}
"""Names of file formats, by suffix."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")


@dataclass(frozen=True)
class ModelFolder:
    """One version's folder, as found; nothing in it has been read.

    Attributes:
        name: of the model's folder; bytes that are no UTF-8 are written as \\xNN.
        version: at least 1, or NO_VERSION where the model's folder holds no version.
        files: the model files in it; one where all is well.
        config_path: the model.toml that applies, or None.
        unreadable: why the folder cannot be read, or "".
    """

    name: str
    version: int
    folder: Path
    files: tuple[Path, ...] = ()
    config_path: Path | None = None
    unreadable: str = ""

    @property
    def path(self) -> Path | None:
        """The model file, or None where there is not exactly one."""
        return self.files[0] if len(self.files) == 1 else None

    @property
    def format(self) -> str:
        """A value of FORMATS, or "" where there is not exactly one model file."""
        return FORMATS[self.path.suffix] if self.path else ""

    def config(self) -> ModelConfig:
        """What its model.toml says; raises ModelRefused as `read_model_config` does."""
        return ModelConfig() if self.config_path is None else read_model_config(self.config_path)

    def model_file(self) -> Path:
        """The model file.

        Raises:
            ModelRefused: NO_MODEL_FILE, AMBIGUOUS_MODEL_FILE, MODEL_FOLDER_UNREADABLE, or BAD_MODEL_NAME.
        """
        if not _NAME.fullmatch(self.name):
            raise ModelRefused(
                "BAD_MODEL_NAME",
                f"'{self.name}' is no model name: at most 128 of A-Z a-z 0-9 . _ -, a letter or digit first",
                name=self.name,
            )
        if self.unreadable:
            raise ModelRefused(
                "MODEL_FOLDER_UNREADABLE", f"the folder cannot be read: {self.unreadable}", folder=self.folder.name
            )
        if self.path is not None:
            return self.path
        names = ", ".join(path.name for path in self.files)
        if names:
            raise ModelRefused("AMBIGUOUS_MODEL_FILE", f"{self.folder.name} holds {names}; keep one", files=names)
        expected = " or ".join(f"model{suffix}" for suffix in FORMATS)
        where = "VERSION/" if self.version == NO_VERSION else ""
        raise ModelRefused("NO_MODEL_FILE", f"{self.folder.name} holds no {where}{expected}", folder=self.folder.name)


def discover(root: Path) -> list[ModelFolder]:
    """Every version of every model below `root`, by name and version. Hidden folders and plain files are passed over.

    Raises:
        NotFound: `root` is no folder, or cannot be read (NO_MODELS_FOLDER).
    """
    if not root.is_dir():
        raise _no_models_folder(root, "is not there")
    try:
        models = _subfolders(root)
    except OSError as error:
        raise _no_models_folder(root, f"cannot be read: {cause(error)}") from error
    return [version for model in models for version in _versions(model)]


def _no_models_folder(root: Path, cause: str) -> NotFound:
    """Where the folder is stands in the log alone: a client may be anybody."""
    logger.error("the model folder %s %s", root, cause)
    return NotFound("NO_MODELS_FOLDER", f"the server's model folder {cause}")


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if not child.name.startswith(".") and _may_be_folder(child))


def _may_be_folder(path: Path) -> bool:
    """What cannot be looked at is taken for a folder, so that it is told of."""
    try:
        return path.is_dir()
    except OSError:
        return True


def _versions(model: Path) -> Iterator[ModelFolder]:
    """Version folders are named by whole numbers from 1; a model without any is told of, not passed over."""
    name = os.fsencode(model.name).decode(errors="backslashreplace")
    try:
        folders = [child for child in _subfolders(model) if _VERSION.fullmatch(child.name)]
    except OSError as error:
        yield ModelFolder(name, NO_VERSION, model, unreadable=cause(error))
        return
    if not folders:
        yield ModelFolder(name, NO_VERSION, model)
    for folder in sorted(folders, key=lambda child: int(child.name)):
        yield _version(name, folder)


def _version(name: str, folder: Path) -> ModelFolder:
    try:
        files = sorted(folder / f"model{suffix}" for suffix in LOADERS if (folder / f"model{suffix}").is_file())
        configs = [path for path in (folder / CONFIG_NAME, folder.parent / CONFIG_NAME) if path.is_file()]
    except OSError as error:
        return ModelFolder(name, int(folder.name), folder, unreadable=cause(error))
    return ModelFolder(name, int(folder.name), folder, tuple(files), configs[0] if configs else None)


def cause(error: OSError) -> str:
    """Without the path, which is the server's own business."""
    return error.strerror or type(error).__name__
