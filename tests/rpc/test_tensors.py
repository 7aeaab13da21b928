"""The tensor encoding: exact bytes both ways."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from explainserve.errors import InvalidRequest
from explainserve.rpc.tensors import DTYPES, data_type, decode, decode_floats, encode
from explainserve.v1 import tensor_pb2 as pb

FLOAT32 = pb.DATA_TYPE_FLOAT32
shapes = arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)


def reason(tensor: pb.Tensor) -> str:
    with pytest.raises(InvalidRequest) as caught:
        decode("t", tensor)
    return caught.value.reason


@pytest.mark.parametrize("code", DTYPES)
@given(data=st.data())
def test_round_trip(code: pb.DataType.ValueType, data: st.DataObject) -> None:
    array = data.draw(arrays.arrays(DTYPES[code], shapes))
    message = encode(array)
    decoded = decode("t", message)

    assert message.data_type == code
    assert decoded.dtype == array.dtype
    assert decoded.shape == array.shape
    np.testing.assert_array_equal(decoded, array)


@pytest.mark.parametrize("code", set(pb.DataType.values()) - DTYPES.keys())
def test_types_that_numpy_lacks_are_refused(code: pb.DataType.ValueType) -> None:
    assert reason(pb.Tensor(data_type=code, shape=[1], data=bytes(2))) == "DTYPE_NOT_SUPPORTED"


def test_bytes_are_little_endian_and_row_major() -> None:
    array = np.array([[1, 2], [3, 4]], ">i4")

    assert encode(array.T).data == np.array([1, 3, 2, 4], "<i4").tobytes()
    assert decode("t", pb.Tensor(data_type=pb.DATA_TYPE_INT16, shape=[1], data=b"\x01\x02"))[0] == 0x0201


def test_decoding_copies_nothing() -> None:
    message = pb.Tensor(data_type=FLOAT32, shape=[2, 3], data=bytes(24))
    decoded = decode("t", message)

    assert not decoded.flags.owndata
    assert not decoded.flags.writeable


def test_scalar() -> None:
    assert decode("t", encode(np.float32(2.5)[()])).shape == ()
    assert decode("t", encode(np.asarray(2.5))) == 2.5


@given(shape=st.lists(st.integers(0, 5), max_size=4), extra=st.integers(-8, 8).filter(bool))
def test_size_is_exact(shape: list[int], extra: int) -> None:
    length = 4 * int(np.prod(shape, dtype=np.int64)) + extra
    if length >= 0:
        assert reason(pb.Tensor(data_type=FLOAT32, shape=shape, data=bytes(length))) == "TENSOR_SIZE_MISMATCH"


@given(shape=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=80))
def test_no_shape_breaks_it(shape: list[int]) -> None:
    """Whatever the shape, an empty tensor is decoded or refused with a reason."""
    message = pb.Tensor(data_type=FLOAT32, shape=shape)
    try:
        assert decode("t", message).size == 0
    except InvalidRequest as error:
        assert error.reason in ("TENSOR_SHAPE_INVALID", "TENSOR_SIZE_MISMATCH")


def test_floats_are_widened_and_nothing_else_is_taken() -> None:
    assert decode_floats("t", encode(np.float16([0.5]))).dtype == np.float64
    with pytest.raises(InvalidRequest) as caught:
        decode_floats("t", encode(np.array([1])))
    assert caught.value.reason == "DTYPE_MISMATCH"


def test_unknown_numpy_type_has_no_code() -> None:
    assert data_type(np.dtype("datetime64[s]")) == pb.DATA_TYPE_UNSPECIFIED
