"""Layers that are tapped, differentiated and cut, and gradient rules, on every backend that has them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from explainserve import backends
from explainserve.backends.contract import LoadedModel, LoadOptions
from explainserve.errors import InvalidRequest
from explainserve.model_config import InputConfig, ModelConfig, Precision
from explainserve.plan import STANDARD, Differentiation, GradientRule, Rows, Segment, SegmentEvaluation, Selector
from explainserve.signature import Layer, ScoreHead
from models import MODELS

Array = NDArray[Any]
Load = Callable[[str, str], LoadedModel]

GUIDED, DECONVNET = GradientRule("guided_backpropagation"), GradientRule("deconvnet")
RULES = {"standard": STANDARD, "guided": GUIDED, "deconvnet": DECONVNET}

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

both_formats = pytest.mark.parametrize("file_format", ["onnx", "pt2"])


def one_hot(index: int) -> Selector:
    return Selector(np.array([index]), np.ones(1, np.float32))


def evaluated(
    model: LoadedModel,
    ends: dict[str, Array],
    wrt: Sequence[str] = (),
    *,
    taps: Sequence[str] = (),
    cut: Sequence[str] = (),
    rule: GradientRule = STANDARD,
    head: ScoreHead = ScoreHead.IDENTITY,
    fixed: dict[str, Array] | None = None,
    selectors: Sequence[Selector] = (one_hot(0),),
    alphas: Sequence[float] = (0.25, 1.0),
    weights: Sequence[float] = (0.5, 1.0),
) -> tuple[SegmentEvaluation, ...]:
    """Paths from zeros to `ends`, and to half of them."""
    function = Differentiation(model.signature.outputs[0].name, head, tuple(wrt), rule, tuple(taps), tuple(cut))
    start = {name: np.zeros_like(end) for name, end in ends.items()}
    segments = tuple(
        Segment(start, end, fixed or {}, function, np.array(alphas), np.array(weights), tuple(selectors))
        for end in (ends, {name: end / 2 for name, end in ends.items()})
    )
    return model.evaluate(Rows(function, segments))


def picked(model: LoadedModel, operator: str, last: bool = False) -> Layer:
    return [layer for layer in model.layers if layer.operator == operator][-1 if last else 0]


def nearly(actual: Array, expected: Array) -> bool:
    scale = np.abs(expected).max()
    return bool(np.abs(np.asarray(actual, np.float64) - expected).max() <= 1e-5 * scale) and bool(scale > 0)


@both_formats
def test_layers_tell_operators_and_extents(load: Load, file_format: str) -> None:
    layers = load("conv", file_format).layers
    rectifiers = [layer for layer in layers if layer.operator == "Relu"]

    assert [tuple(axis.size for axis in layer.axes) for layer in rectifiers] == [(None, 6, 16, 16), (None, 8, 8, 8)]
    assert {"Conv", "MaxPool", "Relu"} <= {layer.operator for layer in layers}
    assert not any(layer.bypassing_inputs for layer in layers)
    assert load("conv", "pt2").layers[0].module == "0"


@both_formats
def test_layers_tell_which_inputs_reach_outputs_around_them(load: Load, file_format: str) -> None:
    """Of a residual block, what is in a branch is bypassed, and what comes after is not."""
    model = load("transformer", file_format)

    assert picked(model, "Gelu").bypassing_inputs == ("x",)
    assert picked(model, "Add", last=True).bypassing_inputs == ()


@both_formats
def test_taps_change_nothing_and_come_back_for_each_row(load: Load, file_format: str) -> None:
    model, x = load("conv", file_format), MODELS["conv"].instance(3)
    layer = picked(model, "Relu").name
    selectors = (one_hot(1), one_hot(4))
    plain = evaluated(model, x, ["x"], selectors=selectors)
    tapped = evaluated(model, x, ["x"], taps=[layer], selectors=selectors)
    (forward, _) = evaluated(model, x, taps=[layer], selectors=())

    for own, other in zip(tapped, plain, strict=True):
        assert nearly(own.gradient_sums["x"], other.gradient_sums["x"])
        assert nearly(own.scores, other.scores)
        assert own.values[layer].shape == (2, 6, 16, 16)
    assert nearly(forward.values[layer], tapped[0].values[layer])
    assert forward.outputs is not None and forward.outputs.shape == (2, 10)
    assert tapped[0].values[layer].min() == 0.0  # of a rectifier, not of what it rectifies


@both_formats
@pytest.mark.parametrize("head", [ScoreHead.IDENTITY, ScoreHead.SOFTMAX])
def test_a_layer_that_is_cut_stands_for_what_is_before_it(load: Load, file_format: str, head: ScoreHead) -> None:
    """Scores are those of the layer's value, and so is the gradient with respect to it."""
    model, x = load("conv", file_format), MODELS["conv"].instance(4)
    layer = picked(model, "MaxPool").name
    (whole, _) = evaluated(model, x, [layer], taps=[layer], head=head, alphas=[1.0], weights=[2.0])
    value = whole.values[layer][0]
    (cut, _) = evaluated(
        model, {layer: value}, [layer], cut=[layer], fixed=x, head=head, alphas=[1.0, 0.0], weights=[2.0, 0.0]
    )

    assert nearly(cut.scores[:1], whole.scores)
    assert nearly(cut.gradient_sums[layer], whole.gradient_sums[layer])
    assert cut.gradient_sums[layer].shape == value.shape


@both_formats
def test_routes_around_a_cut_stay(load: Load, file_format: str) -> None:
    """What a cut branch adds is the segment's; the residual route is computed from the input."""
    model, x = load("transformer", file_format), MODELS["transformer"].instance(5)
    layer = picked(model, "Gelu").name
    (whole, _) = evaluated(model, x, [layer, "x"], taps=[layer], alphas=[1.0], weights=[1.0])
    (cut, _) = evaluated(
        model, {layer: whole.values[layer][0]}, [layer], cut=[layer], fixed=x, alphas=[1.0], weights=[1.0]
    )
    (other, _) = evaluated(
        model, {layer: whole.values[layer][0]}, [layer], cut=[layer], fixed={"x": 2 * x["x"]}, alphas=[1.0], weights=[1]
    )

    assert nearly(cut.scores, whole.scores)
    assert nearly(cut.gradient_sums[layer], whole.gradient_sums[layer])
    assert not nearly(other.scores, whole.scores)


@both_formats
def test_layers_that_are_not_there_are_refused_by_name(load: Load, file_format: str) -> None:
    model, x = load("conv", file_format), MODELS["conv"].instance(6)
    first, second = (picked(model, "Relu", last).name for last in (False, True))
    value = np.ones((6, 16, 16), np.float32)

    def reason(**asked: Any) -> str:
        with pytest.raises(InvalidRequest) as refusal:
            evaluated(model, **asked)
        return refusal.value.reason

    assert reason(ends=x, taps=["nowhere"]) == "UNKNOWN_LAYER"
    assert reason(ends={"nowhere": value}, wrt=["nowhere"], cut=["nowhere"], fixed=x) == "UNKNOWN_LAYER"
    both = {first: value, second: np.ones((8, 8, 8), np.float32)}
    assert reason(ends=both, wrt=[first], cut=[first, second], fixed=x) == "LAYERS_NOT_CUT"
    assert reason(ends={second: both[second]}, wrt=[first], cut=[second], fixed=x) == "LAYER_NOT_ON_PATH"


@both_formats
def test_a_layer_of_another_output_is_not_on_the_path(tmp_path: Path, file_format: str) -> None:
    torch = pytest.importorskip("torch")

    class TwoHeads(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return x.tanh() * 2.0, x.sigmoid() * 3.0

    model = loaded(TwoHeads(), (torch.zeros(2, 3),), tmp_path, file_format)
    with pytest.raises(InvalidRequest) as refusal:
        name = picked(model, "Sigmoid").name
        evaluated(model, {model.signature.inputs[0].name: np.ones(3, np.float32)}, [name], taps=[name])
    assert refusal.value.reason == "LAYER_NOT_ON_PATH"
    with pytest.raises(InvalidRequest) as refusal:
        evaluated(model, {model.signature.inputs[0].name: np.ones(3, np.float32)}, taps=[name])
    assert refusal.value.reason == "LAYER_NOT_ON_PATH"


@pytest.mark.parametrize("name", ["linear", "transformer"])
@both_formats
def test_rules_of_rectifiers_are_refused_without_any(load: Load, file_format: str, name: str) -> None:
    rules = load(name, file_format).gradient_rules

    assert rules["standard"] == ""
    assert rules["guided_backpropagation"] == rules["deconvnet"] == load(name, "onnx").gradient_rules["deconvnet"] != ""


def test_torchscript_says_what_to_export_instead(load: Load) -> None:
    model = load("conv", "pt")

    assert model.layers == () and set(model.gradient_rules) == {"standard"}
    assert "torch.export" in model.layers_refusal and "ONNX" in model.layers_refusal


# --- networks of torch -----------------------------------------------------------------------------------------------


def loaded(
    module: Any, example: Any, folder: Path, file_format: str = "pt2", config: ModelConfig | None = None
) -> LoadedModel:
    """A module as a file of any batch."""
    import torch

    path, shapes = folder / f"model.{file_format}", ({0: torch.export.Dim("batch")},) * len(example)
    program = torch.export.export(module.eval(), example, dynamic_shapes=shapes if len(example[0]) > 1 else None)
    if file_format == "pt2":
        torch.export.save(program, path)
    else:
        torch.onnx.export(program, f=path, verbose=False, external_data=False)
    return backends.load(path, config or ModelConfig(), LoadOptions())


def in_place() -> Any:
    """Rectifiers that overwrite what they are given, a sum that does, and one that is part of a tensor."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class InPlace(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
            self.capped, self.leaky, self.head = (
                nn.ReLU6(inplace=True),
                nn.LeakyReLU(0.1, inplace=True),
                nn.Linear(4, 3),
            )

        def forward(self, x: Any, between: Any = None) -> Any:
            """`between` is called with what the first rectifier returns."""
            h = self.capped(self.norm(self.first(x)))
            h = h if between is None else between(h)
            branch = self.second(h)
            branch += h
            branch[:, 1] *= 0.5
            branch = torch.relu_(branch.clone())
            return self.head(self.leaky(branch - 0.3).mean((2, 3)))

    torch.manual_seed(3)
    net = InPlace().eval()
    net.norm.running_mean.uniform_(-0.3, 0.3)
    return net


def images(seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((3, 6, 6)).astype(np.float32)


def gradient(net: Any, x: Array, *, of_layer: bool) -> tuple[Array, Array]:
    """The gradient of the first score by autograd, and the value that it belongs to."""
    import torch

    points, kept = torch.tensor(x)[None].requires_grad_(), []

    def between(h: Any) -> Any:
        kept.append(h.detach().clone().requires_grad_() if of_layer else h)
        return kept[0].clone()

    score = net(points, between)[0, 0]
    wanted = kept[0] if of_layer else points
    return torch.autograd.grad(score, wanted)[0][0].numpy(), kept[0].detach()[0].numpy()


def test_operators_that_overwrite_do_not_change_what_is_tapped(tmp_path: Path) -> None:
    torch, net = pytest.importorskip("torch"), in_place()
    model = loaded(net, (torch.zeros(2, 3, 6, 6),), tmp_path)
    layer, x = picked(model, "Clip").name, images()
    (found, _) = evaluated(model, {"x": x}, ["x", layer], taps=[layer], alphas=[1.0], weights=[1.0])
    at_input, value = gradient(net, x, of_layer=False)
    at_layer, _ = gradient(net, x, of_layer=True)

    assert nearly(found.values[layer][0], value)
    assert nearly(found.gradient_sums["x"], at_input)
    assert nearly(found.gradient_sums[layer], at_layer)


@pytest.mark.parametrize("rule", [GUIDED, DECONVNET], ids=lambda rule: rule.name)
def test_every_kind_of_rectifier_follows_as_in_onnx(tmp_path: Path, rule: GradientRule) -> None:
    torch, net = pytest.importorskip("torch"), in_place()
    first, other = (loaded(net, (torch.zeros(2, 3, 6, 6),), tmp_path, kind) for kind in ("pt2", "onnx"))
    own, expected, standard = (
        evaluated(model, {"x": images(1)}, ["x"], rule=r)[0].gradient_sums["x"]
        for model, r in ((first, rule), (other, rule), (first, STANDARD))
    )

    assert nearly(own, expected)
    assert not nearly(own, standard)


def test_files_of_one_row_reach_layers_row_by_row(tmp_path: Path) -> None:
    torch, net = pytest.importorskip("torch"), in_place()
    (tmp_path / "one").mkdir()
    single = loaded(net, (torch.zeros(1, 3, 6, 6),), tmp_path / "one")
    batched = loaded(net, (torch.zeros(2, 3, 6, 6),), tmp_path)
    layer = picked(single, "Clip").name
    for rule in (STANDARD, GUIDED):
        own, expected = (
            evaluated(
                model, {"x": images(2)}, ["x", layer], taps=[layer], rule=rule, selectors=[one_hot(0), one_hot(2)]
            )
            for model in (single, batched)
        )
        for one, other in zip(own, expected, strict=True):
            assert nearly(one.values[layer], other.values[layer])
            assert nearly(one.gradient_sums["x"], other.gradient_sums["x"])
            assert nearly(one.gradient_sums[layer], other.gradient_sums[layer])


def test_layers_come_back_in_the_type_of_the_file_in_any_precision(tmp_path: Path) -> None:
    torch, net = pytest.importorskip("torch"), in_place()
    config = ModelConfig(precision=Precision.BFLOAT16)
    model = loaded(net, (torch.zeros(2, 3, 6, 6),), tmp_path, config=config)
    layer, x = picked(model, "Clip").name, images(3)
    (found, _) = evaluated(model, {"x": x}, [layer], taps=[layer], alphas=[1.0], weights=[1.0])
    expected, value = gradient(net, x, of_layer=True)

    assert found.values[layer].dtype == np.float32
    for own, other in ((found.values[layer][0], value), (found.gradient_sums[layer], expected)):
        assert np.linalg.norm(own - other) < 0.05 * np.linalg.norm(other)


def test_a_token_model_is_explained_at_its_embedding(tmp_path: Path) -> None:
    """Where no input has a gradient, layers in their place have one; free extents bear the names of the inputs'."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(4)

    class Words(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 3)

        def forward(self, ids: Any) -> Any:
            return self.head(torch.tanh(self.table(ids)).mean(1))

    net, ids = Words().eval(), np.array([3, 1, 6, 2, 2])
    path = tmp_path / "model.pt2"
    axes = ({0: torch.export.Dim("rows"), 1: torch.export.Dim("words", min=2, max=64)},)
    torch.export.save(torch.export.export(net, (torch.zeros(2, 5, dtype=torch.long),), dynamic_shapes=axes), path)
    stated = InputConfig(name="ids", dtype="int64", shape=["batch", "tokens"])
    model = backends.load(path, ModelConfig(inputs=(stated,)), LoadOptions())
    layer = picked(model, "Gather")
    embedding = net.table(torch.tensor(ids)).detach()
    (found, _) = evaluated(
        model,
        {layer.name: embedding.numpy()},
        [layer.name],
        cut=[layer.name],
        fixed={"ids": ids},
        alphas=[1.0],
        weights=[1],
    )
    points = embedding[None].requires_grad_()
    (expected,) = torch.autograd.grad(net.head(torch.tanh(points).mean(1))[0, 0], points)

    assert [axis.name or axis.size for axis in layer.axes] == ["batch", "tokens", 4]
    assert nearly(found.gradient_sums[layer.name], expected[0].numpy())


def test_a_model_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    torch, net = pytest.importorskip("torch"), in_place()

    def graphs() -> int:
        gc.collect()
        return sum(type(own).__name__ == "NamedGraph" for own in gc.get_objects())

    before = graphs()
    model = loaded(net, (torch.zeros(2, 3, 6, 6),), tmp_path)
    evaluated(model, {"x": images()}, ["x"], taps=[picked(model, "Clip").name], rule=GUIDED)
    assert graphs() > before
    del model
    assert graphs() == before


def test_parts_that_run_without_gradients_stay_so(tmp_path: Path) -> None:
    """Rules do not reach into them, and say so; what is around them is reached."""
    torch = pytest.importorskip("torch")

    class Scaled(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)

        def forward(self, x: Any) -> Any:
            h = torch.tanh(self.first(x))
            with torch.no_grad():
                scale = torch.relu(h).amax(1, keepdim=True) + 1
            return self.second(h / scale)

    torch.manual_seed(5)
    net, x = Scaled().eval(), np.array([0.3, -1, 2, 0.1], np.float32)
    model = loaded(net, (torch.zeros(2, 4),), tmp_path)
    layer = picked(model, "Tanh").name
    (found, _) = evaluated(model, {"x": x}, ["x", layer], taps=[layer], alphas=[1.0], weights=[1.0])
    points = torch.tensor(x)[None].requires_grad_()
    (expected,) = torch.autograd.grad(net(points)[0, 0], points)

    assert nearly(found.gradient_sums["x"], expected[0].numpy())
    assert "mode of its own" in model.gradient_rules["guided_backpropagation"]


@both_formats
def test_deeplift_sees_past_saturation(load: Load, file_format: str) -> None:
    """1 - relu(1 - x) between 0 and 2 has no derivative at its end, but rises by 1 on the way (Shrikumar et al. 2017,
    figure 1); where the two do not differ, the multiplier is the derivative."""
    model, rescale = load("saturated_relu", file_format), GradientRule("deeplift_rescale")
    x, whole = np.array([2, 0.5, 0], np.float32), Selector(np.arange(3), np.ones(3, np.float32))
    (found, _) = evaluated(model, {"x": x}, ["x"], rule=rescale, selectors=[whole], alphas=[1.0], weights=[1.0])

    np.testing.assert_allclose(found.gradient_sums["x"], [0.5, 1, 1], rtol=1e-6)


def test_deeplift_refuses_what_it_has_no_rule_for_by_name(load: Load) -> None:
    gap = load("transformer", "pt2").rule_gap("deeplift_rescale")

    assert "DeepLIFT" in gap and "layer_norm" in gap
    assert "mul" in load("batch_mixing", "pt2").rule_gap("deeplift_rescale")  # of a tensor and itself
    assert "one row" in load("static_batch", "pt2").gradient_rules["deeplift_rescale"]
    assert load("conv", "pt2").rule_gap("deeplift_rescale") == ""
