"""The wire encoding of tensors, against NumPy and hand-computed bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from explainserve.v1 import tensor_pb2
from explainserve_client import MalformedResponseError, RequestTypeError, RequestValueError
from explainserve_client.tensors import cast, to_array, to_tensor

NAMES = [
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float16",
    "float32",
    "float64",
]


@given(
    array=st.sampled_from(NAMES).flatmap(
        lambda name: npst.arrays(np.dtype(name), npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    )
)
def test_what_is_encoded_comes_back(array: np.ndarray) -> None:
    message = to_tensor(array)

    assert message.data == array.astype(array.dtype.newbyteorder("<")).tobytes()
    np.testing.assert_array_equal(to_array(message), array)


def test_every_element_type_of_the_contract_is_encoded() -> None:
    names = {name.removeprefix("DATA_TYPE_").lower() for name in tensor_pb2.DataType.keys()} - {"unspecified"}  # noqa: SIM118

    assert {*NAMES, "bfloat16"} == names
    for name in names:
        assert (
            to_array(to_tensor(np.ones(2, bool), name) if name == "bool" else to_tensor(np.ones(2, np.uint8), name))[0]
            == 1
        )


def test_a_decoded_tensor_is_a_read_only_view() -> None:
    array = to_array(to_tensor(np.ones(3, np.float32)))

    assert not array.flags.writeable and not array.flags.owndata


@pytest.mark.parametrize(
    ("value", "bits"),
    [(1.0, 0x3F80), (-2.0, 0xC000), (1 + 2**-8, 0x3F80), (1 + 3 * 2**-8, 0x3F82), (float("inf"), 0x7F80)],
)
def test_bfloat16_is_the_upper_half_of_float32_rounded_to_nearest_even(value: float, bits: int) -> None:
    message = to_tensor(np.array([value], np.float32), "bfloat16")

    assert message.data == bits.to_bytes(2, "little")


def test_bfloat16_keeps_nan_and_is_widened_when_read() -> None:
    values = to_array(to_tensor(np.array([[np.nan, 1.5]], np.float32), "bfloat16"))

    assert values.dtype == np.float32 and values.shape == (1, 2)
    np.testing.assert_array_equal(values, [[np.nan, 1.5]])
    assert to_array(to_tensor(np.float32(1.5), "bfloat16")).shape == ()


@pytest.mark.parametrize(
    "message",
    [
        tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[3], data=b"\0" * 8),
        tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2], data=b"\0" * 7),
        tensor_pb2.Tensor(shape=[2], data=b"\0" * 8),
    ],
)
def test_a_tensor_that_contradicts_itself_is_refused(message: tensor_pb2.Tensor) -> None:
    with pytest.raises(MalformedResponseError, match="tensor"):
        to_array(message)


@pytest.mark.parametrize(("value", "dtype"), [(-1, "uint8"), (300, "uint8"), (2**40, "int32"), (2**63, "int64")])
def test_integers_that_do_not_fit_are_refused(value: int, dtype: str) -> None:
    with pytest.raises(RequestValueError, match=f"does not fit into {dtype}"):
        cast(np.array([value]), dtype, "ids")


@pytest.mark.parametrize(("source", "dtype"), [("float32", "int64"), ("int64", "bool"), ("complex64", "float32")])
def test_kinds_that_would_lose_meaning_are_refused(source: str, dtype: str) -> None:
    with pytest.raises(RequestTypeError, match=f"expected {dtype}, and {source}"):
        cast(np.zeros(2, source), dtype, "ids")


def test_infinity_and_nan_pass_for_the_server_to_judge() -> None:
    array = np.array([np.inf, np.nan, 1.0])

    np.testing.assert_array_equal(cast(array, "float32", "x"), array.astype(np.float32))
