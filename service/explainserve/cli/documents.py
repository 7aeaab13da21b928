"""Results as JSON documents and arrays."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from explainserve.errors import ExplainServeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from explainserve_client import ExplainResult


def document(value: Any) -> str:
    """A result as JSON text. Numbers that are not finite are the strings "NaN", "Infinity" and "-Infinity"."""
    return json.dumps(_plain(value, "", {}), indent=2, ensure_ascii=False, allow_nan=False)


def write_result(prefix: str, result: ExplainResult) -> tuple[Path, Path]:
    """Writes PREFIX.npz and PREFIX.json.

    The JSON document holds all of the result. Where an array stands it holds `{"array": KEY, "dtype", "shape"}`, and
    the archive holds the array under that key, its place in the document: "attributions/0/inputs/image/tensor".
    """
    arrays: dict[str, NDArray[np.generic]] = {}
    metadata = _plain(result, "", arrays)
    archive, text = Path(f"{prefix}.npz"), Path(f"{prefix}.json")
    with archive.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    text.write_text(json.dumps(metadata, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return archive, text


def _plain(value: Any, key: str, arrays: dict[str, NDArray[np.generic]]) -> Any:
    """Values that JSON has; arrays are put aside under their keys."""
    if isinstance(value, np.ndarray):
        arrays[key] = value
        return {"array": key, "dtype": str(value.dtype), "shape": list(value.shape)}
    if isinstance(value, Mapping):
        return _object(value.items(), key, arrays)
    if isinstance(value, (list, tuple)):
        return [_plain(item, _below(key, position), arrays) for position, item in enumerate(value)]
    if is_dataclass(value):
        return _object(((field.name, getattr(value, field.name)) for field in fields(value)), key, arrays)
    return _scalar(value)


def _object(items: Iterable[tuple[Any, Any]], key: str, arrays: dict[str, NDArray[np.generic]]) -> dict[str, Any]:
    return {str(name): _plain(item, _below(key, name), arrays) for name, item in items}


def _below(key: str, name: object) -> str:
    return f"{key}/{name}" if key else str(name)


def _scalar(value: Any) -> Any:
    match value:
        case Enum():
            return value.name
        case float() if math.isnan(value):
            return "NaN"
        case float() if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        case ExplainServeError():
            return {"reason": value.reason, "message": value.message, "metadata": value.metadata}
        case None | bool() | int() | float() | str():
            return value
        case _:
            return str(value)
