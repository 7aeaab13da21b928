"""What a server tells of its models: those it serves, and those it cannot and why."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
from onnx import TensorProto

import onnx_graphs
from explainserve.methods import METHODS
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1 import model_pb2, tensor_pb2
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceStub
from hostile_graphs import CRASHERS
from onnx_graphs import linear, node, quantized_twice, quantized_within, save, scanned_by_lengths
from rpc.folder import LABELS, MEAN, STD
from rpc.loopback import Loopback, array, element, named, refusal, request

READY, FAILED = model_pb2.MODEL_STATE_READY, model_pb2.MODEL_STATE_FAILED


@pytest.fixture(scope="module")
def listed(stub: ExplainerServiceStub) -> dict[tuple[str, int], model_pb2.ModelSummary]:
    models = stub.ListModels(pb.ListModelsRequest(), timeout=60).models
    assert [(m.name, m.version) for m in models] == sorted((m.name, m.version) for m in models)
    return {(m.name, m.version): m for m in models}


def model(stub: ExplainerServiceStub, name: str, version: int | None = None) -> model_pb2.Model:
    return stub.GetModel(pb.GetModelRequest(model=named(name, version)), timeout=60).model


Listed = dict[tuple[str, int], model_pb2.ModelSummary]


def test_every_folder_is_listed(listed: Listed, folder: Path) -> None:
    assert {name for name, _ in listed} == {child.name for child in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "version", "reason", "text"),
    [
        ("truncated", 1, "MODEL_FILE_CORRUPT", "truncated"),
        ("versions", 11, "MODEL_FILE_CORRUPT", "truncated"),
        ("no_file", 1, "NO_MODEL_FILE", "model.onnx"),
        ("no_version", 0, "NO_MODEL_FILE", "VERSION"),
    ],
)
def test_bad_folder_is_listed_with_its_reason(listed: Listed, name: str, version: int, reason: str, text: str) -> None:
    own = listed[name, version]

    assert (own.state, own.error_reason) == (FAILED, reason)
    assert text in own.reason


def test_the_others_are_served(listed: Listed) -> None:
    bad = {("truncated", 1), ("versions", 11), ("no_file", 1), ("no_version", 0)}
    ready = {key: own for key, own in listed.items() if key not in bad}

    assert {own.state for own in ready.values()} == {READY}
    assert {own.format for own in ready.values()} == {model_pb2.MODEL_FORMAT_ONNX}
    assert not any(own.reason or own.error_reason for own in ready.values())


def test_highest_ready_version_answers(stub: ExplainerServiceStub) -> None:
    assert model(stub, "versions").summary.version == 10
    assert model(stub, "versions", 1).summary.version == 1


def test_model_in_full(stub: ExplainerServiceStub, folder: Path) -> None:
    own = model(stub, "image")
    (image,), (logits,) = own.inputs, own.outputs

    assert own.sha256 == hashlib.sha256((folder / "image" / "1" / "model.onnx").read_bytes()).hexdigest()
    assert (image.name, image.data_type, image.layout) == ("image", tensor_pb2.DATA_TYPE_FLOAT32, "NCHW")
    assert [axis.size for axis in image.axes[1:]] == [3, 6, 8]
    assert not image.axes[0].HasField("size")
    assert (image.batch_axis, image.channel_axis, image.channel_order, image.differentiable) == (0, 1, "RGB", True)
    assert (image.value_range.low, image.value_range.high) == (0, 1)
    assert (list(image.preprocessing.mean), list(image.preprocessing.std)) == (MEAN.tolist(), STD.tolist())
    assert (logits.kind, logits.activation) == (model_pb2.OUTPUT_KIND_LOGITS, model_pb2.ACTIVATION_SOFTMAX)
    assert (logits.class_axis, tuple(logits.labels)) == (1, LABELS)
    assert (own.default_target, own.default_baseline) == (2, "training_mean")
    assert list(own.data_baselines) == ["training_mean"]
    assert (own.backend, own.device, own.differentiable) == ("onnxruntime", "cpu", True)
    assert own.batching == model_pb2.BATCHING_ROWS
    assert not own.gaps and not own.warnings
    assert own.HasField("noise_floor")


def test_layers_can_be_picked_by_name(stub: ExplainerServiceStub) -> None:
    found = {layer.name: layer for layer in model(stub, "image").layers}

    assert {name: layer.operator for name, layer in found.items()} == {"z": "MatMul", "h": "Tanh"}
    assert [(axis.name, axis.size) for axis in found["h"].axes] == [("batch", 0), ("", 5)]
    assert not any(layer.bypassing_inputs or layer.configured for layer in found.values())


def test_memory_is_told(stub: ExplainerServiceStub) -> None:
    memory = model(stub, "two-digits").memory

    assert memory.weight_bytes > 0
    assert 0 < memory.gradient_bytes <= memory.weight_bytes
    assert memory.HasField("session_bytes")


def test_the_size_and_time_of_micro_batches_are_told(stub: ExplainerServiceStub) -> None:
    own, capped = model(stub, "image"), model(stub, "slow")

    assert own.max_batch_rows >= 1
    assert own.row_duration.ToNanoseconds() > 0
    assert capped.max_batch_rows == 1


def test_what_is_not_stated_is_absent(stub: ExplainerServiceStub) -> None:
    own = model(stub, "plain")
    (x,) = own.inputs

    assert not x.HasField("preprocessing") and not x.HasField("value_range") and not x.HasField("channel_axis")
    assert (x.layout, x.channel_order) == ("", "")
    assert not own.HasField("default_target")
    assert own.default_baseline == "zeros"
    assert own.outputs[0].kind == model_pb2.OUTPUT_KIND_VALUES


def test_methods_say_how_to_read_them(stub: ExplainerServiceStub) -> None:
    methods = {own.method: own for own in model(stub, "image").methods}
    guide = methods["integrated_gradients"].reading_guide

    assert methods.keys() == METHODS.keys()
    assert (guide.family, guide.units, guide.complete, guide.needs_baseline) == ("path", "output", True, True)
    for own in methods.values():
        assert own.supported == (own.reason == "") == (own.missing_capability == "")
        assert own.reading_guide.paper and own.reading_guide.family and own.reading_guide.units
        assert own.reading_guide.tier in ("T0", "T1", "T2", "T3")


def test_methods_of_images_are_not_supported_without_one(stub: ExplainerServiceStub) -> None:
    lacking = {own.method for own in model(stub, "plain").methods if own.missing_capability == "spatial_axes"}
    of_an_image = {own.method for own in model(stub, "image").methods if own.missing_capability == "spatial_axes"}

    cams = {"grad_cam", "grad_cam_plus_plus", "layer_cam", "score_cam"}
    assert lacking == {"blur_integrated_gradients", "xrai"} | cams
    assert not of_an_image


def test_methods_of_a_model_of_token_ids_are_those_that_explain_its_layers(stub: ExplainerServiceStub) -> None:
    methods = {own.method: own for own in model(stub, "words").methods}

    assert all(methods[name].supported for name in ("integrated_gradients", "gradient", "smooth_grad", "kernel_shap"))
    assert methods["xrai"].missing_capability == methods["grad_cam"].missing_capability == "spatial_axes"
    assert methods["guided_backpropagation"].missing_capability == "rule:guided_backpropagation"
    assert methods["lrp"].supported and methods["deep_lift"].supported


def test_methods_that_have_segments_found_name_what_finds_them(
    stub: ExplainerServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("explainserve.methods.superpixels.find_spec", lambda name: None)
    lacking = [own for own in model(stub, "image").methods if own.missing_capability == "segmentation"]

    assert [own.method for own in lacking] == ["lime", "xrai"]
    assert not any(own.supported for own in lacking) and all("scikit-image" in own.reason for own in lacking)
    assert {own.method: own.supported for own in model(stub, "plain").methods}["lime"]  # no picture, none to find


def test_model_with_a_gap_names_it_and_its_remedy(stub: ExplainerServiceStub) -> None:
    own = model(stub, "gap")
    _, gap = own.gaps
    method = next(found for found in own.methods if found.method == "integrated_gradients")

    assert (gap.operator, gap.node) == ("QuantizeLinear", "the_gap")
    assert gap.reason and gap.remedy
    assert not own.differentiable and not method.supported
    assert method.missing_capability == "gradient" and "QuantizeLinear" in method.reason
    assert not own.HasField("noise_floor")


@pytest.mark.parametrize(
    ("proto", "nodes"),
    [
        (quantized_twice(), {"first_gap", "second_gap"}),
        (quantized_within(), {"in_branch", "in_loop", "in_scan", "in_function__1"}),
    ],
    ids=["in the graph", "in bodies and functions"],
)
def test_a_model_with_gaps_is_refused_for_gradients_with_all_of_them_and_predicts(
    serve: Callable[..., Loopback], tmp_path: Path, proto: onnx.ModelProto, nodes: set[str]
) -> None:
    save(proto, tmp_path / "quantized" / "1")
    stub = serve(models=tmp_path).stub
    x = {"x": np.array([[0.6, -0.2, 1.1]], np.float32)}

    own = model(stub, "quantized")
    refused = refusal(lambda: stub.Explain(request("quantized", x), timeout=60))
    asked = pb.PredictRequest(model=named("quantized"), inputs=request("", x).inputs, include_tensors=True)
    (predicted,) = stub.Predict(asked, timeout=60).predictions

    assert nodes <= {gap.node for gap in own.gaps if gap.operator == "QuantizeLinear"}
    assert all(gap.operator and gap.reason and gap.remedy for gap in own.gaps)
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_DIFFERENTIABLE")
    assert refused.metadata["gap_count"] == str(len(own.gaps))
    assert all(gap.node in refused.metadata["gaps"] for gap in own.gaps)
    np.testing.assert_array_equal(array(predicted.tensor), [0.5, 0.0, 1.0])


def test_a_model_whose_gradient_needs_a_form_that_no_newer_operator_set_has_still_predicts(
    serve: Callable[..., Loopback], tmp_path: Path
) -> None:
    save(scanned_by_lengths(), tmp_path / "old" / "1")
    stub = serve(models=tmp_path).stub
    x = {"x": np.array([[[1.0, -2.0], [0.5, 4.0], [7.0, 7.0]]], np.float32)}

    (gap,) = model(stub, "old").gaps
    refused = refusal(lambda: stub.Explain(request("old", x), timeout=60))
    asked = pb.PredictRequest(model=named("old"), inputs=request("", x).inputs, include_tensors=True)
    (predicted,) = stub.Predict(asked, timeout=60).predictions

    assert (gap.operator, gap.node) == ("Scan", "old")
    assert gap.reason and gap.remedy
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_DIFFERENTIABLE")
    assert "old" in refused.metadata["gaps"]
    np.testing.assert_array_equal(array(predicted.tensor), [[1.0, -2.0], [1.5, 2.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        (["batch", 9, 9], "[9, 9]"),
        (["batch", 9], "[9]"),
        (["batch"], "[]"),
        ([3], "[3]"),
        (["batch", "n", "m"], "[any, any]"),
    ],
)
def test_an_output_of_another_shape_than_declared_is_predicted_and_refused_for_gradients(
    serve: Callable[..., Loopback], tmp_path: Path, declared: list[int | str], told: str
) -> None:
    proto = onnx_graphs.model([node("Relu", ["x"], ["y"])], [("x", ["batch", 3])], [("y", declared)])
    save(proto, tmp_path / "misdeclared" / "1")
    stub = serve(models=tmp_path).stub
    x = {"x": np.array([[0.5, -2.0, 1.0]], np.float32)}

    (gap,) = model(stub, "misdeclared").gaps
    refused = refusal(lambda: stub.Explain(request("misdeclared", x), timeout=60))
    asked = pb.PredictRequest(model=named("misdeclared"), inputs=request("", x).inputs, include_tensors=True)
    (predicted,) = stub.Predict(asked, timeout=60).predictions

    assert gap.node == "y" and f"{told}, differs from what the graph computes, [" in gap.reason
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_DIFFERENTIABLE")
    assert gap.reason in refused.message
    np.testing.assert_array_equal(array(predicted.tensor).ravel(), [0.5, 0.0, 1.0])


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (node("Softmax", ["x"], ["y"], axis=9), r"\(y\) Op \(Softmax\).*axis"),
        (node("Softmax", ["x"], ["y"], axis=9, name="wrong"), r"\(wrong\) Op \(Softmax\).*axis"),
        (node("Transpose", ["x"], ["y"], perm=[0, 1, 2]), r"\(y\) Op \(Transpose\).*perm"),
    ],
    ids=["axis", "axis of a named node", "order"],
)
def test_a_misshapen_file_is_listed_with_its_node_and_the_others_are_served(
    serve: Callable[..., Loopback], tmp_path: Path, wrong: onnx.NodeProto, reason: str
) -> None:
    save(onnx_graphs.model([wrong], [("x", ["batch", 3])], [("y", ["batch", 3])]), tmp_path / "misshapen" / "1")
    save(linear(np.ones((3, 2), np.float32)), tmp_path / "sound" / "1")
    running = serve(models=tmp_path)

    models = {own.name: own for own in running.stub.ListModels(pb.ListModelsRequest(), timeout=60).models}

    assert models["sound"].state == READY
    assert models["misshapen"].state == FAILED
    assert re.search(reason, models["misshapen"].reason)


def test_a_file_that_crashes_the_libraries_is_listed_and_the_others_are_served(
    serve: Callable[..., Loopback], tmp_path: Path
) -> None:
    for name, make in CRASHERS.items():
        save(make(), tmp_path / name / "1")
    save(linear(np.ones((3, 2), np.float32)), tmp_path / "sound" / "1")
    running = serve(models=tmp_path)

    models = {own.name: own for own in running.stub.ListModels(pb.ListModelsRequest(), timeout=60).models}
    refused = refusal(lambda: model(running.stub, "division"))

    assert models["sound"].state == READY
    assert {models[name].state for name in CRASHERS} == {FAILED}
    assert "MODEL_CRASHES" in {models[name].error_reason for name in CRASHERS}
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_FAILED")


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        (node("ArgMax", ["x"], ["y"], axis=1, keepdims=1), TensorProto.INT64),
        (node("Cast", ["x"], ["y"], to=TensorProto.BOOL), TensorProto.BOOL),
    ],
    ids=["integers", "booleans"],
)
def test_model_without_a_floating_point_output_says_why_it_has_no_gradient_as_the_refusal_does(
    serve: Callable[..., Loopback], tmp_path: Path, last: onnx.NodeProto, kind: int
) -> None:
    proto = onnx_graphs.model([last], [("x", ["batch", 3])], [("y", ["batch", "n"], kind)])
    save(proto, tmp_path / "discrete" / "1")
    stub = serve(models=tmp_path).stub

    own = model(stub, "discrete")
    refused = refusal(lambda: stub.Explain(request("discrete", {"x": np.ones((1, 3), np.float32)}), timeout=60))

    method = next(found for found in own.methods if found.method == "integrated_gradients")
    assert not own.differentiable and not method.supported
    assert method.reason == "no output is floating-point"
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_DIFFERENTIABLE")
    assert method.reason in refused.message


def test_model_without_a_floating_point_input_supports_gradients_at_its_layers(stub: ExplainerServiceStub) -> None:
    own = model(stub, "tokens")

    assert not own.inputs[0].differentiable and not own.differentiable
    assert own.methods[0].supported
    ids = np.array([[3, 1, 4, 1, 5]])
    stub.Explain(request("tokens", {"ids": ids}, targets=[element(1)], layers=[own.layers[0].name]), timeout=60)


def test_a_model_without_layers_says_so(stub: ExplainerServiceStub) -> None:
    own = model(stub, "gap")
    methods = {method.method: method for method in own.methods}

    assert not own.layers and methods["occlusion"].supported
    assert methods["score_cam"].missing_capability == "layers" and "between" in methods["score_cam"].reason


@pytest.mark.parametrize("name", ["batch_mixing"])
def test_row_by_row_is_told_with_a_warning(stub: ExplainerServiceStub, name: str) -> None:
    own = model(stub, name)

    assert own.batching == model_pb2.BATCHING_ROW_BY_ROW
    assert any("alone" in warning for warning in own.warnings)


@pytest.mark.parametrize(
    ("reference", "code", "reason"),
    [
        ({}, grpc.StatusCode.INVALID_ARGUMENT, "MODEL_REQUIRED"),
        (named("nope"), grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL"),
        (named("versions", 3), grpc.StatusCode.NOT_FOUND, "UNKNOWN_VERSION"),
        (named("truncated"), grpc.StatusCode.FAILED_PRECONDITION, "MODEL_FAILED"),
        ({"randomized": {"model": {"name": "plain"}}}, grpc.StatusCode.UNIMPLEMENTED, "MODEL_SOURCE_UNIMPLEMENTED"),
    ],
)
def test_model_that_is_not_there(
    stub: ExplainerServiceStub, reference: dict[str, object], code: grpc.StatusCode, reason: str
) -> None:
    refused = refusal(lambda: stub.GetModel(pb.GetModelRequest(model=reference), timeout=60))  # type: ignore[arg-type]

    assert (refused.code, refused.reason) == (code, reason)
    assert refused.message
