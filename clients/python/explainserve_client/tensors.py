"""Tensors of the contract to and from NumPy arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explainserve.v1 import tensor_pb2
from explainserve_client.errors import MalformedResponseError, RequestTypeError, RequestValueError
from explainserve_client.names import enum_value, short_name

Array = NDArray[Any]

# Little-endian on the wire whatever the machine. NumPy has no bfloat16; its values travel as bits.
_WIRE: dict[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {
        "bool": "?",
        "uint8": "u1",
        "int8": "i1",
        "uint16": "<u2",
        "int16": "<i2",
        "uint32": "<u4",
        "int32": "<i4",
        "uint64": "<u8",
        "int64": "<i8",
        "float16": "<f2",
        "bfloat16": "<u2",
        "float32": "<f4",
        "float64": "<f8",
    }.items()
}
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def to_tensor(array: Array, dtype: str | None = None) -> tensor_pb2.Tensor:
    """Encodes an array as `dtype` (default: its own), see `cast` for what is allowed."""
    array = cast(array, dtype or array.dtype.name, "tensor")
    name = dtype or array.dtype.name
    wire = _bfloat16_bits(array) if name == "bfloat16" else array.astype(_WIRE[name], copy=False)
    return tensor_pb2.Tensor(
        data_type=enum_value(tensor_pb2.DataType, name), shape=array.shape, data=np.ascontiguousarray(wire).tobytes()
    )


def to_array(tensor: tensor_pb2.Tensor) -> Array:
    """A read-only view of the tensor's bytes; bfloat16 is widened to float32.

    Raises:
        MalformedResponseError: the bytes do not fill the shape, or an element type that this client does not know.
    """
    name = short_name(tensor_pb2.DataType, tensor.data_type).lower()
    if name not in _WIRE:
        raise MalformedResponseError(f"tensor of element type {name}, which this client does not know")
    try:
        array = np.frombuffer(tensor.data, _WIRE[name]).reshape(tuple(tensor.shape))
    except ValueError as error:
        raise MalformedResponseError(
            f"{name} tensor of shape {tuple(tensor.shape)} came with {len(tensor.data)} bytes"
        ) from error
    return _widened(array) if name == "bfloat16" else array


def byte_count(tensor: tensor_pb2.Tensor) -> int:
    """Bytes that the tensor's shape and element type need; 0 for a type that this client does not know."""
    name = short_name(tensor_pb2.DataType, tensor.data_type).lower()
    return math.prod(tensor.shape) * _WIRE[name].itemsize if name in _WIRE else 0


def cast(array: Array, dtype: str, what: str) -> Array:
    """The array in another element type, where that loses nothing but float precision.

    Floats become other floats, integers and booleans become floats or fitting integers. For "bfloat16" the result is
    float32, rounded when it is encoded.

    Raises:
        RequestTypeError: float to integer, anything but booleans to boolean, or not a number.
        RequestValueError: a value does not fit.
    """
    if array.dtype.name == "bfloat16":  # of ml_dtypes, which NumPy casts like any other
        array = array.astype(np.float32)
    if dtype not in _WIRE:
        raise RequestTypeError(f"{what}: element type {dtype} cannot be sent")
    target = np.dtype(np.float32) if dtype == "bfloat16" else _WIRE[dtype]
    if array.dtype == target:
        return array
    if array.dtype.kind not in _sources(target.kind):
        raise RequestTypeError(f"{what}: expected {dtype}, and {array.dtype} cannot become that")
    with np.errstate(over="ignore"):
        result = array.astype(target)
    if not _fits(array, result):
        raise RequestValueError(f"{what}: a value does not fit into {dtype}")
    return result


def is_float(dtype: str) -> bool:
    """Whether the name of an element type is one of a floating-point type."""
    return dtype in _FLOATS


def _sources(kind: str) -> str:
    return {"f": "fiub", "i": "iub", "u": "iub", "b": "b"}[kind]


def _fits(before: Array, after: Array) -> bool:
    if after.dtype.kind == "f":
        return bool(np.array_equal(np.isfinite(before), np.isfinite(after)))
    return bool(np.array_equal(before, after))


def _bfloat16_bits(array: Array) -> Array:
    """The upper halves of the float32 bits, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded).astype("<u2")


def _widened(bits: Array) -> Array:
    floats = np.asarray(bits.astype(np.uint32) << 16).view(np.float32)
    floats.flags.writeable = False
    return floats
