"""Fingerprints: one digest for a value of numbers, text, bytes, arrays, enums, tuples, mappings and dataclasses."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def fingerprint(value: object) -> bytes:
    """A digest of 32 bytes: equal for equal values, whatever the order of a mapping; different for all others.

    Dataclasses are read field by field, so that a field that is added to one counts from its first day. Every part is
    written with its type and its length: no two values have the same parts.

    Raises:
        TypeError: a part of the value is of another type.
    """
    hashed = hashlib.blake2b(digest_size=32)
    _write(hashed, value)
    return hashed.digest()


def _write(hashed: hashlib.blake2b, value: object) -> None:
    match value:
        case enum.Enum():
            _write_part(hashed, type(value).__name__, value.name.encode())
        case np.ndarray():
            _write_array(hashed, value)
        case np.dtype():
            _write_part(hashed, "dtype", value.str.encode())
        case None | bool() | int() | float() | str():
            _write_part(hashed, type(value).__name__, repr(value).encode())
        case bytes():
            _write_part(hashed, "bytes", value)
        case tuple() | list():
            _write_all(hashed, "sequence", tuple(value))
        case Mapping():
            _write_all(hashed, "mapping", tuple(sorted(value.items())))
        case _ if dataclasses.is_dataclass(value):
            fields = tuple((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
            _write_all(hashed, type(value).__name__, fields)
        case _:
            raise TypeError(f"a {type(value).__name__} has no fingerprint")


def _write_all(hashed: hashlib.blake2b, kind: str, parts: tuple[object, ...]) -> None:
    _write_part(hashed, kind, str(len(parts)).encode())
    for part in parts:
        _write(hashed, part)


def _write_array(hashed: hashlib.blake2b, array: NDArray[Any]) -> None:
    """Its bytes as they lie in memory: zeros of both signs are different values."""
    if array.dtype.hasobject:
        raise TypeError("an array of objects has no fingerprint: its bytes are addresses")
    _write_part(hashed, "array", f"{array.dtype.str}{array.shape}".encode())
    hashed.update(np.ascontiguousarray(array).data)


def _write_part(hashed: hashlib.blake2b, kind: str, data: bytes) -> None:
    hashed.update(f"{kind}:{len(data)}:".encode())
    hashed.update(data)
