"""Patterns of linear layers, which PatternNet and PatternAttribution take: data that is learned beside a model, in an
archive beside its file."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from explainserve.containment import inside
from explainserve.errors import ModelRefused

NAME = "patterns.npz"

MISSING = (
    f"no {NAME} lies beside the model file; it holds the pattern of each Conv, ConvTranspose, Gemm and MatMul under "
    "the name of its output, in the shape of its weights"
)
"""Why a model cannot follow the rules of patterns."""


def beside(path: Path) -> tuple[Path, ...]:
    """The archive beside a model file, if there is one.

    Raises:
        ModelRefused: it is a link that leads out of the folder (PATTERNS_ESCAPE).
    """
    file = inside(path.parent, NAME)
    if file is None:
        raise ModelRefused("PATTERNS_ESCAPE", f"{NAME} leads out of the folder of {path.name}", file=NAME)
    return (file,) if file.is_file() else ()


def read(path: Path) -> dict[str, NDArray[np.float32]]:
    """Patterns by the name of the layer, none where there is no archive; nothing in it is unpickled.

    Raises:
        ModelRefused: see `beside`; it is no archive of finite numbers (PATTERNS_UNREADABLE).
    """
    files = beside(path)
    if not files:
        return {}
    (file,) = files
    try:
        with file.open("rb") as data, np.load(data, allow_pickle=False) as archive:
            found = {name: np.asarray(archive[name], np.float32, order="C") for name in archive.files}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ModelRefused("PATTERNS_UNREADABLE", f"{NAME} is no archive of arrays: {error}", file=NAME) from error
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise ModelRefused("PATTERNS_UNREADABLE", f"{NAME}: pattern {name!r} is not finite", file=NAME)
    return found


def digest(patterns: Mapping[str, NDArray[np.float32]]) -> str:
    """SHA-256 of names, shapes and values, hexadecimal."""
    total = hashlib.sha256()
    for name, array in sorted(patterns.items()):
        total.update(repr((name, array.shape)).encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()
