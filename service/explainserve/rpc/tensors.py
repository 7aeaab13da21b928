"""The tensor encoding: element type, shape, little-endian row-major bytes. Works on buffers, never on lists."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from explainserve.errors import InvalidRequest
from explainserve.v1 import tensor_pb2 as pb

MAX_RANK = 32
"""Most axes of a tensor; numpy has at most 64, older ones 32."""

MAX_ELEMENTS = 2**40
"""Most elements of a tensor, empty axes counted as one: beside an empty axis nothing else bounds the others."""

DTYPES: dict[pb.DataType.ValueType, np.dtype[np.generic]] = {
    pb.DATA_TYPE_BOOL: np.dtype("?"),
    pb.DATA_TYPE_UINT8: np.dtype("u1"),
    pb.DATA_TYPE_INT8: np.dtype("i1"),
    pb.DATA_TYPE_UINT16: np.dtype("<u2"),
    pb.DATA_TYPE_INT16: np.dtype("<i2"),
    pb.DATA_TYPE_UINT32: np.dtype("<u4"),
    pb.DATA_TYPE_INT32: np.dtype("<i4"),
    pb.DATA_TYPE_UINT64: np.dtype("<u8"),
    pb.DATA_TYPE_INT64: np.dtype("<i8"),
    pb.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    pb.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    pb.DATA_TYPE_FLOAT64: np.dtype("<f8"),
}
"""Element types that the server takes; bfloat16 has no numpy type and is refused."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def decode(name: str, tensor: pb.Tensor) -> NDArray[np.generic]:
    """A read-only view over the message's bytes.

    Args:
        name: what the tensor is, for errors.

    Raises:
        InvalidRequest: unknown element type (DTYPE_NOT_SUPPORTED), a negative or absurd extent or rank
            (TENSOR_SHAPE_INVALID), or a wrong number of bytes (TENSOR_SIZE_MISMATCH).
    """
    dtype = DTYPES.get(tensor.data_type)
    if dtype is None:
        stated = pb.DataType.Name(tensor.data_type) if tensor.data_type in pb.DataType.values() else tensor.data_type
        raise InvalidRequest(
            "DTYPE_NOT_SUPPORTED",
            f"{name} has element type {stated}, which is not accepted",
            tensor=name,
            actual=stated,
        )
    shape = tuple(tensor.shape)
    if len(shape) > MAX_RANK or min(shape, default=0) < 0 or math.prod(e or 1 for e in shape) > MAX_ELEMENTS:
        raise InvalidRequest("TENSOR_SHAPE_INVALID", f"{name} has shape {list(shape)}", tensor=name, actual=list(shape))
    expected = math.prod(shape) * dtype.itemsize
    if expected != len(tensor.data):
        raise InvalidRequest(
            "TENSOR_SIZE_MISMATCH",
            f"{name} of shape {list(shape)} and type {dtype.name} needs {expected} bytes, got {len(tensor.data)}",
            tensor=name,
            expected=expected,
            actual=len(tensor.data),
        )
    if dtype == np.bool_:
        return np.frombuffer(tensor.data, np.uint8).reshape(shape).astype(np.bool_)
    return np.frombuffer(tensor.data, dtype).reshape(shape)


def decode_floats(name: str, tensor: pb.Tensor) -> NDArray[np.float64]:
    """The same in float64.

    Raises:
        InvalidRequest: as `decode`, or not a floating-point tensor (DTYPE_MISMATCH).
    """
    array = decode(name, tensor)
    if not np.issubdtype(array.dtype, np.floating):
        raise InvalidRequest(
            "DTYPE_MISMATCH",
            f"{name} has element type {array.dtype.name}, expected a floating-point type",
            tensor=name,
            expected="floating point",
            actual=array.dtype.name,
        )
    return array.astype(np.float64)


def encode(array: NDArray[np.generic]) -> pb.Tensor:
    """One copy of the elements."""
    dtype = array.dtype.newbyteorder("<") if array.dtype.itemsize > 1 else array.dtype
    data = np.ascontiguousarray(array, dtype).tobytes()
    return pb.Tensor(data_type=data_type(array.dtype), shape=array.shape, data=data)


def data_type(dtype: np.dtype[np.generic]) -> pb.DataType.ValueType:
    """The code of an element type; UNSPECIFIED where it has none."""
    return _CODES.get(dtype.newbyteorder("<"), pb.DATA_TYPE_UNSPECIFIED)
