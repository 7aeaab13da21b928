"""Arrays fitted to a signature: names, batch axis, element types."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from explainserve.v1 import model_pb2, tensor_pb2
from explainserve_client import ModelInfo, RequestTypeError, RequestValueError
from explainserve_client.inputs import fit
from explainserve_client.preprocess import preprocess

IMAGE = np.random.default_rng(0).normal(size=(1, 64, 64)).astype(np.float32)


def sent(inputs: Any, info: ModelInfo, name: str = "image") -> tensor_pb2.Tensor:
    return fit(inputs, info).tensors[name]


def test_a_single_instance_gets_the_batch_axis(info: ModelInfo) -> None:
    message = sent(IMAGE, info)

    assert list(message.shape) == [1, 1, 64, 64]
    assert message.data == IMAGE.tobytes()


def test_a_batch_is_sent_as_it_is(info: ModelInfo) -> None:
    batch = np.stack([IMAGE, 2 * IMAGE, 3 * IMAGE])

    assert list(sent(batch, info).shape) == [3, 1, 64, 64]
    assert sent({"image": batch}, info).data == batch.tobytes()


def test_an_array_that_is_not_contiguous_is_sent_in_row_major_order(info: ModelInfo) -> None:
    turned = IMAGE[:, ::-1, ::-1]

    assert sent(turned, info).data == np.ascontiguousarray(turned).tobytes()


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ">f4", np.uint8, np.int64, np.bool_])
def test_numbers_become_the_floats_of_the_signature(dtype: Any, info: ModelInfo) -> None:
    array = (np.arange(64 * 64).reshape(1, 64, 64) % 2).astype(dtype)
    message = sent(array, info)

    assert message.data_type == tensor_pb2.DATA_TYPE_FLOAT32
    assert message.data == array.astype("<f4").tobytes()


@pytest.mark.parametrize("dtype", [np.complex64, "U4", object])
def test_what_is_no_number_is_refused(dtype: Any, info: ModelInfo) -> None:
    with pytest.raises(RequestTypeError, match="'image'"):
        fit(np.zeros((1, 64, 64), dtype), info)


def test_a_value_beyond_float32_is_refused(info: ModelInfo) -> None:
    with pytest.raises(RequestValueError, match="does not fit into float32"):
        fit(np.full((1, 64, 64), 1e300), info)


@pytest.mark.parametrize("shape", [(64, 64), (1, 1, 1, 64, 64), ()])
def test_another_rank_is_refused_with_the_axes(shape: tuple[int, ...], info: ModelInfo) -> None:
    with pytest.raises(RequestValueError, match=r"expected axes \[a0, a1 1, a2 64, a3 64\]"):
        fit(np.zeros(shape, np.float32), info)


@pytest.mark.parametrize("other", [np.zeros((1, 64, 32)), np.zeros((1, 64))], ids=["extent", "rank"])
def test_instances_that_differ_in_shape_are_refused(other: np.ndarray, info: ModelInfo) -> None:
    with pytest.raises(RequestValueError, match="'image': its instances differ in shape"):
        fit([IMAGE, other], info)


THREE_INPUTS = {"image": IMAGE, "mask": np.ones(7), "ids": np.arange(7, dtype=np.int32)}


class TestSeveralInputs:
    """The captioner takes an image, a mask and integer ids."""

    def test_each_gets_its_axis_and_element_type(self, several_inputs: ModelInfo) -> None:
        tensors = fit(THREE_INPUTS, several_inputs).tensors

        assert {name: list(message.shape) for name, message in tensors.items()} == {
            "image": [1, 1, 64, 64],
            "mask": [1, 7],
            "ids": [1, 7],
        }
        assert tensors["ids"].data_type == tensor_pb2.DATA_TYPE_INT64

    def test_a_bare_array_is_refused(self, several_inputs: ModelInfo) -> None:
        with pytest.raises(RequestValueError, match="dict by name: image, mask, ids"):
            fit(IMAGE, several_inputs)

    def test_missing_and_unknown_names_are_refused(self, several_inputs: ModelInfo) -> None:
        with pytest.raises(RequestValueError, match="inputs are image, expected image, mask, ids"):
            fit({"image": IMAGE}, several_inputs)

    def test_floats_do_not_become_integers(self, several_inputs: ModelInfo) -> None:
        with pytest.raises(RequestTypeError, match="'ids': expected int64"):
            fit({**THREE_INPUTS, "ids": np.ones(7)}, several_inputs)

    def test_batches_of_different_lengths_are_refused(self, several_inputs: ModelInfo) -> None:
        with pytest.raises(RequestValueError, match="image 1, mask 2, ids 1"):
            fit({**THREE_INPUTS, "mask": np.ones((2, 7))}, several_inputs)


def test_an_input_without_batch_axis_is_sent_as_it_is() -> None:
    spec = model_pb2.InputSpec(name="x", data_type=tensor_pb2.DATA_TYPE_FLOAT32, axes=[model_pb2.Axis(name="n")])
    info = ModelInfo.from_proto(model_pb2.Model(inputs=[spec]))

    assert list(sent([1.0, 2.0], info, "x").shape) == [2]
    with pytest.raises(RequestValueError, match="not \\(\\)"):
        fit(1.0, info)


def test_a_list_of_preprocessed_images_is_a_batch(info: ModelInfo) -> None:
    images = [preprocess(np.full((64, 64), value), info.inputs["image"]) for value in (0, 255)]
    instances = fit(images, info)

    assert list(instances.tensors["image"].shape) == [2, 1, 64, 64]
    assert instances.geometries == {"image": tuple(image.geometry for image in images)}
