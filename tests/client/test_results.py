"""Responses as typed, read-only results."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from client.fake_service import IMAGE_SHAPE, explain_response, maps, min_max, tensor
from explainserve.v1 import attribution_pb2, explainer_service_pb2, method_pb2
from explainserve_client import (
    Attribution,
    CostEstimate,
    ExplainResult,
    IntegratedGradients,
    MissingEntryError,
    Progress,
    Provenance,
    RequestValueError,
)
from explainserve_client.results import explain_result


@pytest.fixture
def result() -> ExplainResult:
    return explain_result(explain_response(), {}, "id")


@pytest.fixture
def attribution(result: ExplainResult) -> Attribution:
    return result.attributions[0]


def two_inputs() -> Attribution:
    message = explain_response()
    message.attributions[0].inputs.add(name="mask", tensor=tensor(np.ones(7)))
    return explain_result(message, {}, "id").attributions[0]


def test_an_attribution_is_read_field_by_field(attribution: Attribution) -> None:
    assert (attribution.method_index, attribution.instance_index, attribution.target_index) == (0, 0, 0)
    assert attribution.baseline_index == 0
    assert (attribution.target.index, attribution.target.score, attribution.target.label) == ((3,), "PROBABILITY", "3")
    assert (attribution.attribution_sum, attribution.convergence_delta) == (0.81, 0.01)
    assert (attribution.relative_convergence_delta, attribution.map_error) == (None, None)
    assert (attribution.step_count, attribution.stop_reason) == (64, "FIXED_STEPS")
    assert attribution.applied_normalization == "NONE"
    assert attribution.score_path is not None and attribution.score_path.scores == (0.1, 0.9)
    assert [caution.kind for caution in attribution.cautions] == ["SINGLE_CASE"]


def test_a_mean_over_baselines_has_no_baseline_index_and_a_spread() -> None:
    message = explain_response()
    message.attributions[0].ClearField("baseline_index")
    message.attributions[0].inputs[0].spread.CopyFrom(tensor(np.ones(IMAGE_SHAPE)))
    found = explain_result(message, {}, "id").attributions[0]

    assert found.baseline_index is None
    assert found.inputs["image"].spread is not None and found.inputs["image"].spread.shape == IMAGE_SHAPE


def test_tensors_are_read_only(attribution: Attribution) -> None:
    with pytest.raises(ValueError, match="read-only"):
        attribution.tensor[0, 0, 0] = 1


def test_results_are_frozen(result: ExplainResult, attribution: Attribution) -> None:
    frozen = (result, attribution, attribution.statistics["CHANNEL_SUM"], result.provenance, result.joint["all"])
    for value in frozen:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, None)


def test_results_survive_pickling(result: ExplainResult) -> None:
    copy = pickle.loads(pickle.dumps(result))

    np.testing.assert_array_equal(copy.attributions[0].tensor, maps()[0])
    assert copy.joint["all"].statistics == result.joint["all"].statistics


def test_with_several_inputs_the_shortcuts_say_so() -> None:
    found = two_inputs()

    assert found.tensors["mask"].tolist() == [1] * 7
    for shortcut in ("tensor", "statistics", "regions"):
        with pytest.raises(KeyError, match="not one input here; there are 'image', 'mask'"):
            getattr(found, shortcut)
    with pytest.raises(KeyError, match="not one input"):
        found.normalization("MIN_MAX", "CHANNEL_SUM")


def test_a_tensor_that_was_left_out_says_so() -> None:
    message = explain_response()
    message.attributions[0].inputs[0].ClearField("tensor")
    found = explain_result(message, {}, "id").attributions[0]

    assert dict(found.tensors) == {} and found.inputs["image"].tensor is None
    with pytest.raises(MissingEntryError, match="omit_tensors"):
        _ = found.tensor


def test_recipes_know_their_axes_also_where_the_tensor_was_left_out(result: ExplainResult) -> None:
    message = explain_response()
    message.attributions[0].inputs[0].ClearField("tensor")
    bare = explain_result(message, {}, "id").attributions[0].normalization("MIN_MAX", "CHANNEL_SUM")

    assert bare == result.attributions[0].normalization("MIN_MAX", "CHANNEL_SUM")
    assert (bare.channel_axis, bare.rank) == (0, 3)


def test_a_joint_recipe_applies_to_the_raw_tensor_of_a_member(result: ExplainResult) -> None:
    recipe = result.joint["all"].normalization("MIN_MAX", "CHANNEL_SUM")
    low, high = min(values.min() for values in maps()), max(values.max() for values in maps())

    for attribution in result.attributions:
        expected = (attribution.tensor[0].astype(np.float64) - low) / (high - low)
        np.testing.assert_allclose(recipe.apply(attribution.tensor), expected, rtol=1e-6, atol=1e-7)


def test_a_joint_recipe_applies_to_maps_with_channels_and_without() -> None:
    """As XRAI gives them beside others: one value for each pixel."""
    message = explain_response()
    elements = np.stack(maps()).astype(np.float64)
    message.joint[0].inputs[0].normalizations.append(min_max("ELEMENTS", elements))
    flat = message.attributions[1].inputs[0]
    flat.ClearField("channel_axis")
    flat.tensor.CopyFrom(tensor(maps()[1][0]))
    found = explain_result(message, {}, "id")
    joint = found.joint["all"]

    for attribution in found.attributions:
        shown = joint.normalization("MIN_MAX", "ELEMENTS").apply(attribution.tensor)
        assert shown.shape == attribution.tensor.shape
    assert joint.normalization("MIN_MAX", "CHANNEL_SUM").apply(found.attributions[0].tensor).shape == IMAGE_SHAPE[1:]
    with pytest.raises(RequestValueError, match="3 axes, not 2"):
        joint.normalization("MIN_MAX", "CHANNEL_SUM").apply(found.attributions[1].tensor)


def test_a_missing_recipe_lists_those_there_are(attribution: Attribution) -> None:
    with pytest.raises(
        KeyError, match="no normalization 'MIN_MAX' of view 'ELEMENTS'; there are MIN_MAX of CHANNEL_SUM"
    ):
        attribution.normalization("MIN_MAX", "ELEMENTS")


def test_a_stated_scale_applies_to_the_raw_tensor(attribution: Attribution) -> None:
    recipe = attribution.stated_scale(-2, 2)

    np.testing.assert_array_equal(
        recipe.apply(attribution.tensor), np.clip(attribution.tensor[0].astype(np.float64) / 2, -1, 1)
    )


def test_an_enum_value_of_a_newer_server_is_told_by_number() -> None:
    message = explain_response()
    message.attributions[0].stop_reason = 77  # type: ignore[assignment]

    assert explain_result(message, {}, "id").attributions[0].stop_reason == "UNKNOWN_77"


def test_provenance_is_read_field_by_field() -> None:
    message = attribution_pb2.Provenance(
        model_name="m",
        effective_methods=[method_pb2.MethodSpec(integrated_gradients=method_pb2.IntegratedGradients(step_count=4))],
        library_versions={"numpy": "2"},
        queue_duration=Duration(nanos=1_500_000),
        compute_duration=Duration(seconds=2),
        row_count=66,
    )
    found = Provenance.from_proto(message)

    assert found.effective_methods == (IntegratedGradients(step_count=4),)
    assert (found.queue_seconds, found.compute_seconds, found.serialize_seconds) == (0.0015, 2.0, 0.0)
    assert (found.row_count, found.noise_floor, dict(found.library_versions)) == (66, None, {"numpy": "2"})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Provenance, attribution_pb2.Provenance),
        (Attribution, attribution_pb2.Attribution),
        (ExplainResult, explainer_service_pb2.ExplainResponse),
        (CostEstimate, explainer_service_pb2.EstimateCostResponse),
        (Progress, explainer_service_pb2.Progress),
    ],
)
def test_every_field_of_the_contract_has_a_place(kind: type, message: type) -> None:
    places = {field.name for field in dataclasses.fields(kind)}
    wanted = {field.name.replace("_duration", "_seconds") for field in message.DESCRIPTOR.fields}  # type: ignore[attr-defined]

    assert wanted <= places


def test_reprs_are_short_and_tell_what_matters(result: ExplainResult, attribution: Attribution) -> None:
    assert repr(result) == "<ExplainResult of two-digits version 2: 2 attributions, request id>"
    assert repr(attribution) == (
        "<Attribution instance 0, target 3 (PROBABILITY of logits), baseline 0: "
        "<InputAttribution image [1, 64, 64]>, convergence_delta 0.01, FIXED_STEPS after 64 steps>"
    )
    assert "<Statistics CHANNEL_SUM of 4096 elements: min " in repr(attribution.statistics["CHANNEL_SUM"])
    recipe = repr(attribution.normalization("MIN_MAX", "CHANNEL_SUM"))
    assert recipe.startswith("<Normalization MIN_MAX of CHANNEL_SUM: clip((v - -")
    assert all(len(repr(value)) < 250 for value in (result, attribution, recipe))
