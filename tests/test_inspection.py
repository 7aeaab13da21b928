"""explainserve inspect: what a file tells, and a model.toml that is valid as it stands."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from explainserve import backends
from explainserve.backends import LoadOptions
from explainserve.inspection import inspect_file
from explainserve.model_config import ModelConfig, OutputConfig, read_model_config
from explainserve.signature import Activation, OutputKind
from onnx_graphs import linear, model, node, save

WEIGHTS = np.ones((3, 2), np.float32)


def picture_classifier(channels_last: bool = False, last: str = "") -> onnx.ModelProto:
    """Convolution, ReLU and mean over a picture of any size, with integers on the side."""
    nodes = [
        *([node("Transpose", ["image"], ["moved"], perm=[0, 3, 1, 2])] if channels_last else []),
        node("Conv", ["moved" if channels_last else "image", "kernel"], ["features"]),
        node("Relu", ["features"], ["active"]),
        node("Shape", ["active"], ["extents"]),
        node("Add", ["extents", "extents"], ["doubled"]),
        node("Cast", ["doubled"], ["floats"], to=TensorProto.FLOAT),
        node("ReduceMax", ["floats"], ["most"], keepdims=0),
        node("ReduceMean", ["active", "spatial"], ["pooled"], keepdims=0),
        node("Div", ["pooled", "most"], ["scaled"]),
        node(last or "Identity", ["scaled"], ["y"]),
    ]
    shape = ["batch", "", "", 3] if channels_last else ["batch", 3, "", ""]
    weights = {"kernel": np.ones((4, 3, 3, 3), np.float32), "spatial": np.array([2, 3])}
    return model(nodes, [("image", shape)], [("y", ["batch", 4])], weights)


def starter_config(text: str, tmp_path: Path) -> ModelConfig:
    (tmp_path / "starter.toml").write_text(text, encoding="utf-8")
    return read_model_config(tmp_path / "starter.toml")


def test_it_tells_what_the_graph_holds(tmp_path: Path) -> None:
    path = save(picture_classifier(), tmp_path)
    found = inspect_file(path)

    assert found.refusal is None
    assert found.format == "onnx"
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.operators["Conv"] == 1
    assert sum(found.operators.values()) == 9
    assert [(layer.name, layer.operator) for layer in found.layers] == [("features", "Conv"), ("active", "Relu")]
    assert [axis.size for axis in found.layers[0].axes] == [None, 4, None, None]
    assert found.gradient_mode == "gradient_graph"
    assert not found.fixed_batch
    assert found.signature is not None
    assert [spec.name for spec in found.signature.inputs] == ["image"]


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_starter_describes_the_same_model(tmp_path: Path, channels_last: bool) -> None:
    path = save(picture_classifier(channels_last), tmp_path)
    found = inspect_file(path)
    loaded = backends.load(path, starter_config(found.starter, tmp_path), LoadOptions())

    assert found.signature is not None
    assert loaded.signature.inputs[0].layout == ("NHWC" if channels_last else "NCHW")
    assert [axis.size for axis in loaded.signature.inputs[0].axes] == [
        axis.size for axis in found.signature.inputs[0].axes
    ]
    assert loaded.signature.outputs[0].kind is OutputKind.VALUES


@pytest.mark.parametrize(
    ("last", "kind", "activation"),
    [
        ("Softmax", OutputKind.PROBABILITIES, Activation.SOFTMAX),
        ("Sigmoid", OutputKind.PROBABILITIES, Activation.SIGMOID),
        ("", OutputKind.VALUES, Activation.NONE),
    ],
)
def test_the_starter_says_of_outputs_what_the_server_says_without_it(
    tmp_path: Path, last: str, kind: OutputKind, activation: Activation
) -> None:
    path = save(picture_classifier(last=last), tmp_path)
    starter = starter_config(inspect_file(path).starter, tmp_path)

    for config in (ModelConfig(), starter):
        (output,) = backends.load(path, config, LoadOptions()).signature.outputs
        assert (output.kind, output.activation) == (kind, activation)


def test_a_softmax_over_another_axis_than_that_of_classes_makes_no_probabilities(tmp_path: Path) -> None:
    proto = model([node("Softmax", ["x"], ["y"], axis=2)], [("x", ["n", 3, 4])], [("y", ["n", 3, 4])])

    (output,) = backends.load(save(proto, tmp_path), ModelConfig(), LoadOptions()).signature.outputs

    assert output.kind is OutputKind.VALUES


def test_a_kind_that_is_stated_is_believed(tmp_path: Path) -> None:
    config = ModelConfig(outputs=(OutputConfig(name="y", kind=OutputKind.VALUES),))
    path = save(picture_classifier(last="Softmax"), tmp_path)

    (output,) = backends.load(path, config, LoadOptions()).signature.outputs

    assert (output.kind, output.activation) == (OutputKind.VALUES, Activation.NONE)


def test_what_is_commented_out_is_valid_too(tmp_path: Path) -> None:
    found = inspect_file(save(picture_classifier(), tmp_path))
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\n")
    first, *rest = found.starter.splitlines()
    config = starter_config("\n".join([first, *(line.removeprefix("# ") for line in rest)]), tmp_path)

    assert config.sha256 == found.sha256
    assert config.inputs[0].std == (0.229, 0.224, 0.225)
    assert config.outputs[0].labels == ("a", "b", "c", "d")


@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "über/😀:0", "tab\tand\x7fdelete"])
def test_odd_names_survive_the_starter(tmp_path: Path, name: str) -> None:
    proto = linear(WEIGHTS)
    proto.graph.input[0].name = proto.graph.node[0].input[0] = name

    assert starter_config(inspect_file(save(proto, tmp_path)).starter, tmp_path).inputs[0].name == name


def test_why_integers_have_no_gradient_is_told(tmp_path: Path) -> None:
    nodes = [node("Cast", ["ids"], ["y"], to=TensorProto.FLOAT)]
    proto = model(nodes, [("ids", ["batch", 3], TensorProto.INT64)], [("y", ["batch", 3])])
    found = inspect_file(save(proto, tmp_path))

    assert (found.gradient_mode, found.gaps) == ("black_box", ())
    assert found.undifferentiable_reason == "no input is floating-point"


def test_a_fixed_batch_and_gaps_are_told(tmp_path: Path) -> None:
    nodes = [
        node("Concat", ["x", "token"], ["both"], axis=0),
        node("ReduceSum", ["both", "first"], ["sum"], keepdims=1),
        node("QuantizeLinear", ["sum", "scale"], ["q"], name="odd"),
        node("DequantizeLinear", ["q", "scale"], ["h"], name="even"),
        node("QuickGelu", ["h"], ["y"], domain="com.microsoft"),
    ]
    weights = {"token": np.ones((1, 3), np.float32), "first": np.array([0]), "scale": np.array(0.5, np.float32)}
    proto = model(nodes, [("x", [1, 3])], [("y", [1, 3])], weights, domains=["com.microsoft"])
    found = inspect_file(save(proto, tmp_path))

    assert found.fixed_batch
    assert found.gradient_mode == "black_box"
    assert [gap.node for gap in found.gaps] == ["even", "odd"]
    assert found.operators["com.microsoft.QuickGelu"] == 1
    assert starter_config(found.starter, tmp_path).inputs[0].shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("model.onnx", b"garbage" * 50, "MODEL_FILE_CORRUPT"),
        ("model.txt", b"", "NO_MODEL_FILE"),
        ("model", b"", "NO_MODEL_FILE"),
    ],
)
def test_a_refusal_is_part_of_the_answer(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    found = inspect_file(tmp_path / name)

    assert found.refusal is not None
    assert found.refusal.reason == reason
    assert found.signature is None
    assert found.starter == "", "no model.toml would help"


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refusal = inspect_file(tmp_path / "model.onnx").refusal

    assert refusal is not None
    assert refusal.reason == "NO_MODEL_FILE"


def test_a_graph_that_does_not_run_still_shows_its_operators(tmp_path: Path) -> None:
    nodes = [node("Whirl", ["x"], ["y"], domain="org.example")]
    proto = model(nodes, [("x", ["batch", 2])], [("y", ["batch", 2])], domains=["org.example"])
    found = inspect_file(save(proto, tmp_path))

    assert found.refusal is not None
    assert found.refusal.reason == "MODEL_NOT_RUNNABLE"
    assert found.operators == {"org.example.Whirl": 1}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_file_that_does_not_tell_its_signature_gets_a_starter_with_placeholders(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "model.pt"
    torch.jit.script(torch.nn.Linear(3, 2).eval()).save(str(path))
    found = inspect_file(path)

    assert found.refusal is not None
    assert found.refusal.reason == "SIGNATURE_INCOMPLETE"
    config = starter_config(found.starter, tmp_path)
    assert config.inputs and config.outputs


@pytest.mark.torch
def test_an_exported_program_describes_itself(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "model.pt2"
    example = (torch.zeros(2, 3),)
    program = torch.export.export(
        torch.nn.Linear(3, 2).eval(), example, dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(program, path)
    found = inspect_file(path)

    assert found.refusal is None
    assert found.format == "torch_export"
    assert found.gradient_mode == "autograd"
    assert found.signature is not None
    config = starter_config(found.starter, tmp_path)
    assert backends.load(path, config, LoadOptions()).signature.inputs[0].axes[1].size == 3
