"""Every spelling of a baseline, and the message it becomes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from client.fake_service import tensor
from explainserve.v1 import baseline_pb2, model_pb2, tensor_pb2
from explainserve_client import (
    Baseline,
    Blur,
    Constant,
    DataBaseline,
    GaussianNoise,
    ModelInfo,
    RequestTypeError,
    RequestValueError,
    TensorBaseline,
    UniformNoise,
    UsedBaseline,
    Zeros,
)
from explainserve_client.baselines import baseline_messages

PIXEL, MODEL = model_pb2.SPACE_PIXEL, model_pb2.SPACE_MODEL
VALUES = np.full((1, 64, 64), 0.25)


def one(**kind: Any) -> baseline_pb2.InputBaseline:
    return baseline_pb2.InputBaseline(**kind)


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("zeros", one(zeros=baseline_pb2.ZerosBaseline())),
        ("black", one(black=baseline_pb2.BlackBaseline())),
        ("gray", one(gray=baseline_pb2.GrayBaseline())),
        ("white", one(white=baseline_pb2.WhiteBaseline())),
        (Zeros(space="PIXEL"), one(zeros=baseline_pb2.ZerosBaseline(), space=PIXEL)),
        (Constant(0.5), one(constant=baseline_pb2.ConstantBaseline(values=[0.5]))),
        (
            Constant([1, 2, 3], space="PIXEL"),
            one(constant=baseline_pb2.ConstantBaseline(values=[1, 2, 3]), space=PIXEL),
        ),
        (Blur(2.5), one(blur=baseline_pb2.BlurBaseline(sigma=2.5))),
        ("random", one(uniform_noise=baseline_pb2.UniformNoiseBaseline(seed=0))),
        (UniformNoise(), one(uniform_noise=baseline_pb2.UniformNoiseBaseline(seed=0))),
        (
            UniformNoise(-1, 0, seed=5, count=3, space="MODEL"),
            one(uniform_noise=baseline_pb2.UniformNoiseBaseline(low=-1, high=0, seed=5, count=3), space=MODEL),
        ),
        (GaussianNoise(0.1), one(gaussian_noise=baseline_pb2.GaussianNoiseBaseline(std=0.1))),
        (
            GaussianNoise(0.1, mean=0, seed=2, count=4, space="PIXEL"),
            one(gaussian_noise=baseline_pb2.GaussianNoiseBaseline(std=0.1, mean=0, seed=2, count=4), space=PIXEL),
        ),
        (DataBaseline("mean-digit"), one(data=baseline_pb2.DataBaseline(name="mean-digit"))),
        (VALUES, one(tensor=tensor(VALUES))),
        (VALUES.astype(np.uint8), one(tensor=tensor(VALUES.astype(np.uint8)))),
        (TensorBaseline(VALUES, space="PIXEL"), one(tensor=tensor(VALUES), space=PIXEL)),
    ],
)
def test_a_spelling_becomes_its_message(spelling: Any, expected: baseline_pb2.InputBaseline, info: ModelInfo) -> None:
    every = baseline_pb2.Baseline(every_input=expected)

    assert baseline_messages(spelling, info, ()) == [every]
    assert baseline_messages([spelling, spelling], info, ()) == [every, every]
    assert baseline_messages({"image": spelling}, info, ()) == [baseline_pb2.Baseline(inputs={"image": expected})]


def test_without_baselines_the_server_chooses(info: ModelInfo) -> None:
    assert baseline_messages(None, info, ()) == []


def test_a_dict_names_inputs_of_different_kinds(several_inputs: ModelInfo) -> None:
    mask = np.arange(7)
    (message,) = baseline_messages({"image": "gray", "mask": mask, "ids": np.zeros(7, np.int32)}, several_inputs, ())

    assert message.inputs["image"].WhichOneof("kind") == "gray"
    assert message.inputs["mask"].tensor == tensor(mask)
    assert message.inputs["ids"].tensor.data_type == tensor_pb2.DATA_TYPE_INT64
    assert not message.HasField("every_input")


def test_a_typed_baseline_may_belong_to_one_instance(several_inputs: ModelInfo) -> None:
    stated = Baseline(every_input="zeros", inputs={"mask": "white"}, instance_index=0)

    assert baseline_messages(stated, several_inputs, ()) == [
        baseline_pb2.Baseline(
            every_input=one(zeros=baseline_pb2.ZerosBaseline()),
            inputs={"mask": one(white=baseline_pb2.WhiteBaseline())},
            instance_index=0,
        )
    ]


def test_a_typed_baseline_may_state_values_of_layers(info: ModelInfo) -> None:
    values = np.zeros((6, 4))
    (message,) = baseline_messages(Baseline(layers={"embedding": values, "bent": "zeros"}), info, ())

    assert message.layers["embedding"].tensor == tensor(values.astype(np.float32))
    assert message.layers["bent"].WhichOneof("kind") == "zeros"
    assert not message.inputs


def test_an_array_for_several_moving_inputs_needs_a_name(several_inputs: ModelInfo) -> None:
    with pytest.raises(RequestValueError, match=r"needs the name of its input.*image, mask"):
        baseline_messages(VALUES, several_inputs, ())


def test_an_array_is_for_the_only_input_that_moves(several_inputs: ModelInfo) -> None:
    (message,) = baseline_messages(VALUES, several_inputs, ("mask",))

    assert message.every_input.tensor == tensor(VALUES)


@pytest.mark.parametrize("spelling", [0.5, 3, object(), [[1.0]]])
def test_what_is_no_baseline_is_refused(spelling: Any, info: ModelInfo) -> None:
    with pytest.raises(RequestTypeError, match="no baseline"):
        baseline_messages([spelling], info, ())


def test_an_unknown_keyword_lists_those_there_are(info: ModelInfo) -> None:
    with pytest.raises(RequestValueError, match="'grey'; there are zeros, black, gray, white, random"):
        baseline_messages("grey", info, ())


def test_an_unknown_input_lists_those_there_are(several_inputs: ModelInfo) -> None:
    with pytest.raises(RequestValueError, match="'picture', but the model's inputs are image, mask, ids"):
        baseline_messages({"picture": "gray"}, several_inputs, ())


def test_an_unknown_space_is_refused(info: ModelInfo) -> None:
    with pytest.raises(RequestValueError, match="there are MODEL, PIXEL"):
        baseline_messages(Constant(1, space="RGB"), info, ())


def test_a_used_baseline_echoes_every_effective_parameter() -> None:
    message = baseline_pb2.UsedBaseline(
        baseline_index=1,
        inputs=[
            baseline_pb2.UsedInputBaseline(
                input="image",
                effective=one(
                    uniform_noise=baseline_pb2.UniformNoiseBaseline(low=0, high=1, seed=0, count=2), space=PIXEL
                ),
                sha256="ab",
                tensor=tensor(VALUES),
                draw_index=1,
            ),
            baseline_pb2.UsedInputBaseline(
                input="mask", effective=one(constant=baseline_pb2.ConstantBaseline(values=[1, 2]))
            ),
        ],
    )
    used = UsedBaseline.from_proto(message)
    image, mask = used.inputs

    assert (used.baseline_index, image.kind, image.space, image.draw_index) == (1, "uniform_noise", "PIXEL", 1)
    assert dict(image.parameters) == {"low": 0.0, "high": 1.0, "seed": 0, "count": 2}
    assert image.tensor is not None and np.array_equal(image.tensor, VALUES)
    assert (mask.kind, dict(mask.parameters), mask.tensor) == ("constant", {"values": (1.0, 2.0)}, None)


def test_every_kind_of_the_contract_has_a_spelling(info: ModelInfo) -> None:
    spellings = ["zeros", "black", "gray", "white", Constant(1), VALUES, Blur(1), UniformNoise(), GaussianNoise(1)]
    messages = baseline_messages([*spellings, DataBaseline("mean")], info, ())

    kinds = {field.name for field in baseline_pb2.InputBaseline.DESCRIPTOR.oneofs_by_name["kind"].fields}
    assert {message.every_input.WhichOneof("kind") for message in messages} == kinds
