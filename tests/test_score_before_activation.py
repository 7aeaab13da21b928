"""The score before the softmax or sigmoid in which a file ends: maps equal those of the file without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

import torch
from torch import nn

from explainserve_client import (
    Attribution,
    Client,
    DeepLift,
    ExplainResult,
    GradCam,
    GradCamPlusPlus,
    Gradient,
    GuidedGradCam,
    IntegratedGradients,
    InvalidArgument,
    LayerCam,
    Lrp,
    SmoothGrad,
)
from explainserve_client.methods import Method
from golden_networks import IMAGE, Filters
from models import ModelCase, Port
from three_formats import relative, serving, tiny

FORMATS = ("onnx", "pt2", "pt")
WITH_LAYERS = ("onnx", "pt2")
"""Formats that carry methods of layers and altered backward rules."""

TOLERANCE = 1e-5
X = np.random.default_rng(41).standard_normal(IMAGE).astype(np.float32)
BEFORE = (
    GradCam(),
    GradCamPlusPlus(),
    LayerCam(),
    GuidedGradCam(),
    DeepLift(),
    Lrp(),
    SmoothGrad(Lrp(), sample_count=4),
)
"""Methods that are defined on the score before the activation."""

Ending = Callable[[torch.Tensor], torch.Tensor]


class Ended(nn.Module):
    """The filters with what their two outputs end in."""

    def __init__(self, ending: Ending) -> None:
        super().__init__()
        self.filters, self._ending = Filters(), ending

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._ending(8 * self.filters(x))


class Pixels(nn.Module):
    """Two classes at each pixel, from the filters."""

    def __init__(self, ending: Ending) -> None:
        super().__init__()
        self.filters, self._ending = Filters(), ending
        self.classes = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._ending(self.classes(self.filters.features(x)))


def segmentation(name: str, ending: Ending) -> ModelCase:
    image = Port("x", IMAGE, extra='layout = "NCHW"')
    return ModelCase(name, (image,), (Port("y", (2, *IMAGE[1:])),), lambda: Pixels(ending), traced=True)


def case(name: str, ending: Ending, kind: str) -> ModelCase:
    """A model whose gradients are behind a softmax that is nearly saturated."""
    toml = f'kind = "{kind}"'
    image = Port("x", IMAGE, extra='layout = "NCHW"')
    return ModelCase(name, (image,), (Port("y", (2,), extra=toml),), lambda: Ended(ending), traced=True)


CASES = (
    case("logits", lambda z: z, "logits"),
    case("softmax", lambda z: z.softmax(1), "probabilities"),
    case("sigmoid", lambda z: z.sigmoid(), "probabilities"),
    case("rearranged", lambda z: z.unsqueeze(2).sigmoid().flatten(1), "probabilities"),
    case("opaque", lambda z: z.exp() / z.exp().sum(1, keepdim=True), "probabilities"),
    case("stated", lambda z: z.softmax(1), "values"),
    segmentation("pixels", lambda z: z),
    segmentation("pixels_softmax", lambda z: z.softmax(1)),
    segmentation("pixels_sigmoid", lambda z: z.sigmoid().unsqueeze(4).squeeze(4)),
)
ENDINGS = ("softmax", "sigmoid", "rearranged")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    writers = {own.name: tiny(own) for own in CASES}
    with serving(tmp_path_factory.mktemp("models"), writers, FORMATS) as client:
        yield client


every_format = pytest.mark.parametrize("file_format", FORMATS)
formats_with_layers = pytest.mark.parametrize("file_format", WITH_LAYERS)


def explain(client: Client, name: str, method: Method | list[Method], **fields: Any) -> ExplainResult:
    usual: dict[str, Any] = {"targets": 1, "baselines": "zeros"}
    return client.explain(name, X, method=method, **(usual | fields))


def the_map(client: Client, name: str, method: Method, **fields: Any) -> Attribution:
    (found,) = explain(client, name, method, **fields).attributions
    return found


def tensor(found: Attribution) -> np.ndarray[Any, Any]:
    (own,) = found.inputs.values()
    return own.tensor


def cautions(found: Attribution) -> list[str]:
    return [caution.kind for caution in found.cautions]


@formats_with_layers
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("method", BEFORE, ids=lambda method: type(method).__name__)
def test_maps_of_a_file_with_its_activation_equal_those_without(
    client: Client, file_format: str, ending: str, method: Method
) -> None:
    found, expected = (the_map(client, f"{name}-{file_format}", method) for name in (ending, "logits"))

    assert found.target.score == "LOGIT"
    assert found.instance_output_value == pytest.approx(expected.instance_output_value, rel=TOLERANCE)
    assert relative(tensor(found), tensor(expected)) < TOLERANCE
    assert "BEHIND_ACTIVATION" not in cautions(found) + cautions(expected)


@formats_with_layers
@pytest.mark.parametrize("ending", ["pixels_softmax", "pixels_sigmoid"])
def test_the_layer_of_pixels_is_the_last_before_their_scores(client: Client, file_format: str, ending: str) -> None:
    found, expected = (
        the_map(client, f"{name}-{file_format}", GradCam(), targets=(1, 2, 3)) for name in (ending, "pixels")
    )

    assert found.target.score == "LOGIT"
    assert list(found.inputs) == list(expected.inputs)
    assert relative(tensor(found), tensor(expected)) < TOLERANCE


@every_format
@pytest.mark.parametrize("method", [Gradient(), IntegratedGradients(step_count=5)])
def test_other_methods_explain_it_when_it_is_asked_for(client: Client, file_format: str, method: Method) -> None:
    found = the_map(client, f"softmax-{file_format}", method, score="LOGIT")
    expected = the_map(client, f"logits-{file_format}", method)

    assert the_map(client, f"softmax-{file_format}", method).target.score == "OUTPUT"
    assert relative(tensor(found), tensor(expected)) < TOLERANCE


@formats_with_layers
def test_methods_of_one_request_explain_each_its_own_score(client: Client, file_format: str) -> None:
    methods: list[Method] = [IntegratedGradients(step_count=5), DeepLift(), GradCam()]
    name = f"softmax-{file_format}"
    together = explain(client, name, methods, targets=[0, 1])

    assert [own.target.score for own in together.attributions] == ["OUTPUT"] * 2 + ["LOGIT"] * 4
    for own in together.attributions:
        alone = the_map(client, name, methods[own.method_index], targets=own.target.index[0])
        assert relative(tensor(own), tensor(alone)) < TOLERANCE
        assert own.instance_output_value == pytest.approx(alone.instance_output_value, rel=TOLERANCE)
    complete = [own for own in together.attributions if own.method_index == 1]
    assert all(abs(own.relative_convergence_delta or 1) < TOLERANCE for own in complete)
    assert {name for name in together.joint if "OUTPUT" in name} and {n for n in together.joint if "LOGIT" in n}


@formats_with_layers
def test_the_cost_of_mixed_scores_is_what_was_estimated(client: Client, file_format: str) -> None:
    """Two ends for each of the two scores, and the rows of each method."""
    asked: dict[str, Any] = {"method": [IntegratedGradients(step_count=5), DeepLift()], "targets": 0}
    estimate = client.estimate_cost(f"softmax-{file_format}", X, baselines="zeros", **asked)
    used = client.explain(f"softmax-{file_format}", X, baselines="zeros", **asked).provenance

    assert estimate.min_row_count == estimate.max_row_count == used.row_count == 2 * 2 + 5 + 1


@formats_with_layers
def test_a_score_behind_the_activation_is_cautioned_of(client: Client, file_format: str) -> None:
    asked = the_map(client, f"softmax-{file_format}", GradCam(), score="PROBABILITY")
    of_logits = the_map(client, f"logits-{file_format}", GradCam(), score="PROBABILITY")
    unreached = the_map(client, f"opaque-{file_format}", GradCam())

    assert [own.target.score for own in (asked, unreached)] == ["PROBABILITY", "OUTPUT"]
    assert all("BEHIND_ACTIVATION" in cautions(own) for own in (asked, of_logits, unreached))
    assert "BEHIND_ACTIVATION" not in cautions(the_map(client, f"softmax-{file_format}", Gradient()))


@every_format
def test_what_the_file_does_not_show_or_the_owner_denies_is_refused(client: Client, file_format: str) -> None:
    for name in ("opaque", "stated"):
        assert client.model(f"{name}-{file_format}").outputs["y"].pre_activation == ""
        with pytest.raises(InvalidArgument) as refused:
            the_map(client, f"{name}-{file_format}", Gradient(), score="LOGIT")
        assert refused.value.reason == "SCORE_NOT_AVAILABLE"
    if file_format in WITH_LAYERS:
        assert the_map(client, f"stated-{file_format}", GradCam()).target.score == "OUTPUT"


@every_format
def test_the_tensor_is_named_and_predicted(client: Client, file_format: str) -> None:
    for name in ENDINGS:
        assert client.model(f"{name}-{file_format}").outputs["y"].pre_activation
    found, expected = (
        client.predict(f"{name}-{file_format}", X, score="LOGIT", include_tensors=True).predictions[0]
        for name in ("softmax", "logits")
    )
    assert relative(found.tensor, expected.tensor) < TOLERANCE
