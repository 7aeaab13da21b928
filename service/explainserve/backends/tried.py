"""The files that loaded once: they need no trial again, neither in this process nor, with a folder, after a restart."""

from __future__ import annotations

import functools
import hashlib
import logging
import platform
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from explainserve.backends.contract import LoadOptions
from explainserve.model_config import ModelConfig

logger = logging.getLogger(__name__)

_LIBRARIES = ("explainserve", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "protobuf", "torch")
"""What a file may crash in; another version of one of them is another trial."""


class Tried:
    """A set of keys that is kept in a folder, one empty file each, so that processes share it.

    Args:
        folder: is made when the first key is added; None keeps the keys in memory alone.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._keys: set[str] = set()

    def __contains__(self, key: object) -> bool:
        return key in self._keys or (self._folder is not None and (self._folder / str(key)).is_file())

    def add(self, key: str) -> None:
        """Remembers a key; where the folder cannot be written, for as long as this process lives."""
        self._keys.add(key)
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / key).touch()
        except OSError as error:
            logger.warning("%s cannot be written, so models are tried again after a restart: %s", self._folder, error)


def file_key(path: Path) -> str:
    """Stands for the content of one file, read by these libraries."""
    with path.open("rb") as file:
        return _key(hashlib.file_digest(file, "sha256").hexdigest())


def model_key(sha256: str, config: ModelConfig, options: LoadOptions, step: str) -> str:
    """Stands for a model, configured and loaded like this by these libraries."""
    kind = options.device.partition(":")[0]  # devices of one kind crash alike
    return _key(sha256, config.model_dump_json(), repr(replace(options, device=kind, thread_count=0, cache=None)), step)


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join((*parts, _versions())).encode()).hexdigest()


@functools.cache
def _versions() -> str:
    return " ".join([platform.machine(), *(f"{name}={_version(name)}" for name in _LIBRARIES)])


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
