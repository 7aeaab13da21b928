"""Gradient graphs on disk, by the digest of what they are built from.

Several processes may share the folder: a file appears whole or not at all, its content is checked when it is read, and
what cannot be read is built again. Weights of the model are not in it, only what the gradient adds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx

from explainserve import onnx_vjp
from explainserve.onnx_vjp import GradientGraph

logger = logging.getLogger(__name__)

MAX_BYTES = 8 << 30
"""Of the folder; the files that were not used for the longest time go first."""

_ENTRY = "explainserve.gradient"


class GradientCache:
    """Gradient graphs by key; without a folder, nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, key: str, build: Callable[[], GradientGraph]) -> GradientGraph:
        """The graph of a key, from the folder where it is there, else built and kept."""
        if self._folder is None:
            return build()
        path = self._folder / f"{key}.onnx"
        found = _read(path)
        if found is None:
            found = build()
            _write(path, found)
        return found


def cache_key(model: onnx.ModelProto, *further: object) -> str:
    """The digest of a model whose weights are references, of what is asked of it, and of the code that builds it."""
    digest = hashlib.sha256(_code().encode())
    digest.update(model.SerializeToString(deterministic=True))
    digest.update(repr(further).encode())
    return digest.hexdigest()


@functools.cache
def _code() -> str:
    """The digest of the rules, so that no graph outlives the code that built it."""
    digest = hashlib.sha256(onnx.__version__.encode())
    folder = Path(onnx_vjp.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> GradientGraph | None:
    try:
        content = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    checksum, serialized = content[:32], content[32:]
    if hashlib.sha256(serialized).digest() != checksum:
        logger.warning("the cached gradient graph %s is damaged and is built again", path)
        return None
    return _unpacked(onnx.ModelProto.FromString(serialized))


def _write(path: Path, graph: GradientGraph) -> None:
    serialized = _packed(graph).SerializeToString()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _place(path, hashlib.sha256(serialized).digest() + serialized)
        _trim(path.parent)
    except OSError as error:
        logger.warning("the gradient graph could not be kept in %s: %s", path.parent, error)


def _place(path: Path, content: bytes) -> None:
    """Write a file that is whole as soon as it is there; nothing of it stays where that fails."""
    descriptor, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(part, path)
    except OSError:
        os.unlink(part)
        raise


def _trim(folder: Path) -> None:
    total = 0
    for path, size, _ in sorted(_files(folder), key=lambda entry: entry[2], reverse=True):
        total += size
        if total > MAX_BYTES:
            path.unlink(missing_ok=True)


def _files(folder: Path) -> Iterable[tuple[Path, int, float]]:
    for path in folder.iterdir():
        try:
            found = path.stat()
        except OSError:  # another process has just removed it
            continue
        yield path, found.st_size, found.st_mtime


def _packed(graph: GradientGraph) -> onnx.ModelProto:
    """The model with the names of its new inputs and outputs as an entry of its metadata."""
    packed = onnx.ModelProto()
    packed.CopyFrom(graph.model)
    names = [graph.cotangents, graph.gradients, graph.baselines, graph.baseline_values]
    packed.metadata_props.add(key=_ENTRY, value=json.dumps(names))
    return packed


def _unpacked(model: onnx.ModelProto) -> GradientGraph:
    entry = model.metadata_props.pop()
    return GradientGraph(model, *json.loads(entry.value))
