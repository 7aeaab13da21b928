"""Layer-wise relevance propagation and patterns: one network as ONNX and as `.pt2`, and what each rule promises."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

import torch
from torch import nn
from torch.nn import functional

from explainserve import backends
from explainserve.backends.contract import LoadedModel, LoadOptions
from explainserve.errors import Unsupported
from explainserve.model_config import InputConfig, ModelConfig, Precision
from explainserve.plan import Differentiation, GradientRule, Rows, Segment, SegmentEvaluation, Selector
from explainserve.signature import ScoreHead

Array = NDArray[Any]

LRP = ("epsilon", "gamma", "alpha_beta", "composite", "deep_taylor", "epsilon_gamma_box")
RULES = {name: GradientRule(f"lrp_{name}") for name in LRP}
PATTERN_RULES = {name: GradientRule(name) for name in ("pattern_net", "pattern_attribution")}
LOW, HIGH = -1.0, 1.5
SIDE = 10
FORMATS = ("onnx", "pt2", "decomposed")

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]  # exporters warn of themselves


class Residual(nn.Module):
    """Normalized convolutions, an addition with a projection, and a mean in the place of a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.same, self.same_norm = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.down, self.down_norm = nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.short, self.short_norm = nn.Conv2d(6, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        x = functional.max_pool2d(torch.relu(self.norm(self.first(x))), 3, 2, 1)
        x = torch.relu(x + self.same_norm(self.same(x)))
        x = torch.relu(self.down_norm(self.down(x)) + self.short_norm(self.short(x)))
        return self.head(x.mean((2, 3)))


class Concatenated(nn.Module):
    """Normalizations behind concatenations, which are merged with nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(7)
        self.second, self.other_norm = nn.Conv2d(7, 5, 3, padding=1), nn.BatchNorm2d(12)
        self.third, self.head = nn.Conv2d(12, 4, 1), nn.Linear(4 * 25, 5)

    def forward(self, x: Any) -> Any:
        x = torch.cat([x, torch.relu(self.first(x))], 1)
        x = torch.cat([x, self.second(torch.relu(self.norm(x)))], 1)
        x = functional.avg_pool2d(self.third(torch.relu(self.other_norm(x))), 2)
        return self.head(x.flatten(1))


class Preprocessing(nn.Module):
    """Constants in front of the first layer and behind it, a layer that is transposed, bounds and saturation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 3, 2, 2), nn.Linear(3, 5)
        self.register_buffer("mean", torch.tensor([0.2, -0.1, 0.3]).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.5, 0.7, 1.2]).reshape(1, 3, 1, 1))

    def forward(self, x: Any) -> Any:
        x = functional.leaky_relu(1 - self.first((x - self.mean) / self.std) * 2, 0.1)
        x = torch.clamp(self.up(x), -1, 2)
        return self.head(torch.tanh(functional.adaptive_avg_pool2d(x, 1).flatten(1)))


class Tokens(nn.Module):
    """Dense layers over the places of an image, with biases of their own or constants behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 6), nn.Linear(6, 4, bias=False), nn.Linear(4, 5)
        self.third, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.first(x.flatten(2).transpose(1, 2)))
        x = torch.relu(self.second(x) * 2 + self.bias)
        return self.head(torch.relu(x @ self.third + self.bias).mean(1))


def sequential() -> nn.Module:
    """What VGG is made of; its rectifiers overwrite what they are given."""
    first = (nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace=True))
    second = (nn.MaxPool2d(2), nn.Conv2d(6, 4, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(*first, *second, nn.Linear(16, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 5))


def perceptron() -> nn.Module:
    hidden = (nn.Linear(3 * SIDE * SIDE, 9), nn.BatchNorm1d(9), nn.ELU(), nn.Linear(9, 7, bias=False), nn.PReLU())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(7, 5))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "concatenated": Concatenated,
    "preprocessing": Preprocessing,
    "tokens": Tokens,
    "sequential": sequential,
    "perceptron": perceptron,
}


def made(make: Callable[[], nn.Module], biased: bool = True) -> nn.Module:
    """With random weights and statistics."""
    torch.manual_seed(4)
    net = make().eval()
    for part in net.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.running_mean.uniform_(-0.3, 0.3)
            part.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.2, 0.2)
        elif not biased and getattr(part, "bias", None) is not None:
            nn.init.zeros_(part.bias)
    return net


def exported(net: nn.Module) -> Any:
    """A network of images as a program of any number of them."""
    batch = ({0: torch.export.Dim("batch")},)
    return torch.export.export(net.eval(), (torch.zeros(2, 3, SIDE, SIDE),), dynamic_shapes=batch)


def loaded(program: Any, folder: Path, file_format: str, **stated: Any) -> LoadedModel:
    """A program as a file of a format; `decomposed` is `.pt2` of core operators. Its input is `x`."""
    folder.mkdir(exist_ok=True)
    path = folder / ("model.onnx" if file_format == "onnx" else "model.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if file_format == "onnx":
            torch.onnx.export(program, f=path, verbose=False, external_data=False, input_names=["x"])
        else:
            torch.export.save(program.run_decompositions() if file_format == "decomposed" else program, path)
    ranged = InputConfig(name="x", shape=["batch", 3, SIDE, SIDE], value_range=(LOW, HIGH))
    return backends.load(path, ModelConfig(inputs=(ranged,), **stated), LoadOptions())


Load = Callable[[str, str], LoadedModel]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A network of NETWORKS in a format."""
    folder = tmp_path_factory.mktemp("relevance")
    program = functools.cache(lambda name: exported(made(NETWORKS[name])))
    return functools.cache(lambda name, kind: loaded(program(name), folder / f"{name}-{kind}", kind))


IMAGE = np.random.default_rng(3).uniform(LOW, HIGH, (3, SIDE, SIDE)).astype(np.float32)


def one_hot(index: int) -> Selector:
    return Selector(np.array([index]), np.ones(1, np.float32))


def explained(
    model: LoadedModel,
    rule: GradientRule,
    values: dict[str, Array] | None = None,
    wrt: Sequence[str] = ("x",),
    selectors: Sequence[Selector] = (one_hot(2),),
    head: ScoreHead = ScoreHead.IDENTITY,
    **reached: tuple[str, ...],
) -> tuple[SegmentEvaluation, ...]:
    """The instance alone, by default the image."""
    function = Differentiation(model.signature.outputs[0].name, head, tuple(wrt), rule, **reached)
    values = values or {"x": IMAGE}
    fixed = {"x": IMAGE} if "x" not in values else {}
    segment = Segment(values, values, fixed, function, np.ones(1), np.ones(1), tuple(selectors))
    return model.evaluate(Rows(function, (segment,)))


def distance(own: Array, expected: Array) -> float:
    """Relative L2 distance."""
    assert expected.any()
    return float(np.linalg.norm(own.astype(np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("rule", LRP)
@pytest.mark.parametrize("network", NETWORKS)
def test_formats_give_the_same_relevance(load: Load, network: str, rule: str) -> None:
    selectors = (one_hot(2), Selector(np.array([0, 4]), np.array([1.5, -1], np.float32)))
    formats = FORMATS[:2] if network == "tokens" else FORMATS  # decomposed, its first layer is a product of batches
    expected, *others = (explained(load(network, kind), RULES[rule], selectors=selectors) for kind in formats)

    assert any(each.gradient_sums["x"].any() for each in expected)
    for other in others:
        for own, one in zip(other, expected, strict=True):
            assert own.scores == pytest.approx(one.scores, rel=1e-4, abs=1e-6)
            if one.gradient_sums["x"].any():
                assert distance(own.gradient_sums["x"], one.gradient_sums["x"]) < 1e-4
            else:
                assert not own.gradient_sums["x"].any()


@pytest.mark.parametrize("network", ["sequential", "perceptron"])
def test_options_of_rules_are_followed(load: Load, network: str) -> None:
    maps = {}
    for kind in ("onnx", "pt2"):
        for rule in (
            GradientRule("lrp_epsilon", (("epsilon", 0.5),)),
            GradientRule("lrp_gamma", (("epsilon", 1e-6), ("gamma", 2.0))),
            GradientRule("lrp_alpha_beta", (("epsilon", 1e-6), ("alpha", 1.0))),
        ):
            maps[kind, rule.name] = explained(load(network, kind), rule)[0].gradient_sums["x"]
            usual = explained(load(network, kind), GradientRule(rule.name))[0].gradient_sums["x"]
            assert distance(maps[kind, rule.name], usual) > 1e-2
    for name in ("lrp_epsilon", "lrp_gamma", "lrp_alpha_beta"):
        assert distance(maps["pt2", name], maps["onnx", name]) < 1e-4


@pytest.fixture(scope="module")
def unbiased(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return loaded(exported(made(sequential, biased=False)), tmp_path_factory.mktemp("unbiased"), "pt2")


@pytest.mark.parametrize("rule", ["epsilon", "alpha_beta", "composite", "deep_taylor"])
def test_relevance_is_conserved_without_biases(unbiased: LoadedModel, rule: str) -> None:
    (found,) = explained(unbiased, RULES[rule])

    assert found.gradient_sums["x"].sum(dtype=np.float64) == pytest.approx(found.scores[0], rel=2e-3)


def test_epsilon_of_rectifiers_is_gradient_times_input(load: Load) -> None:
    """In the limit of a small epsilon (Ancona et al. 2018, proposition 1)."""
    model = load("residual", "pt2")
    (found,) = explained(model, GradientRule("lrp_epsilon", (("epsilon", 1e-12),)))
    (gradient,) = explained(model, GradientRule())

    assert distance(found.gradient_sums["x"], gradient.gradient_sums["x"] * IMAGE) < 1e-3


# --- layers that are explained ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
@pytest.mark.parametrize("rule", LRP)
def test_relevance_of_a_layer_is_that_of_the_walk_down_to_it(load: Load, rule: str, kind: str) -> None:
    """Other layers are in front of it, so no layer behind it is a first one."""
    model = load("sequential", kind)
    layer = next(own for own in model.layers if own.operator == "Relu").name
    (whole,) = explained(model, RULES[rule], wrt=["x", layer], taps=(layer,))
    value = whole.values[layer][0]
    (cut,) = explained(model, RULES[rule], {layer: value}, [layer], cut=(layer,))

    assert distance(cut.gradient_sums[layer], whole.gradient_sums[layer]) < 1e-5


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_a_box_of_a_layer_in_front_of_the_first_one_says_what_is_missing(load: Load, kind: str) -> None:
    """The quotient of the preprocessing is no input, and has no range that the model states."""
    with pytest.raises(Unsupported) as refused:
        explained(load("preprocessing", kind), RULES["deep_taylor"], {"div": IMAGE}, ["div"], cut=("div",))

    assert refused.value.reason == "NOT_DIFFERENTIABLE"
    assert "value range of what is in front of" in refused.value.message


# --- what has no rule ------------------------------------------------------------------------------------------------


class Of(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.first, self.head, self.function = nn.Conv2d(3, 4, 3), nn.Linear(4 * (SIDE - 2) ** 2, 5), function

    def forward(self, x: Any) -> Any:
        return self.head(self.function(self.first(x)).flatten(1))


@pytest.mark.parametrize(
    ("function", "operator", "reason"),
    [
        (torch.sigmoid, "sigmoid", "has no rule for it"),
        (lambda x: x * x.tanh(), "mul", "several tensors vary"),
        (lambda x: x / (x.tanh() + 2), "div", "several tensors vary"),
        (lambda x: 1 / (x.tanh() + 2), "reciprocal", "has no rule for it"),
        (lambda x: x @ x.transpose(2, 3), "matmul", "product of two tensors"),
        (lambda x: torch.clamp(x, min=0.5), "clamp", "not zero at zero"),
    ],
)
def test_what_has_no_rule_is_refused_with_the_operator_and_its_node(
    tmp_path: Path, function: Callable[[Any], Any], operator: str, reason: str
) -> None:
    model = loaded(exported(Of(function)), tmp_path, "pt2")

    for name in LRP:
        assert f"{operator} ({operator}" in model.rule_gap(f"lrp_{name}") and reason in model.rule_gap(f"lrp_{name}")


@pytest.mark.parametrize("head", [ScoreHead.SOFTMAX, ScoreHead.LOG_SOFTMAX, ScoreHead.SIGMOID])
def test_relevance_starts_from_the_output_not_from_a_score_of_it(load: Load, head: ScoreHead) -> None:
    for kind in ("onnx", "pt2"):
        with pytest.raises(Unsupported) as refused:
            explained(load("residual", kind), RULES["epsilon"], head=head)
        assert refused.value.reason == "NOT_DIFFERENTIABLE"
        assert head.value.title().replace("_", "") in refused.value.message


def test_a_box_needs_a_value_range(tmp_path: Path) -> None:
    program = torch.export.export(made(sequential), (torch.zeros(1, 3, SIDE, SIDE),))
    torch.export.save(program, tmp_path / "model.pt2")
    rules = backends.load(tmp_path / "model.pt2", ModelConfig(), LoadOptions()).gradient_rules

    assert rules["lrp_composite"] == ""
    assert "value_range" in rules["lrp_deep_taylor"] and "value_range" in rules["lrp_epsilon_gamma_box"]


def test_relevance_needs_more_than_sixteen_bits(tmp_path: Path) -> None:
    rules = loaded(exported(made(Residual)), tmp_path, "pt2", precision=Precision.BFLOAT16).gradient_rules

    assert "sixteen bits" in rules["lrp_composite"] and rules["guided_backpropagation"] == ""


def test_rows_that_a_file_takes_one_by_one_are_each_explained(load: Load, tmp_path: Path) -> None:
    program = torch.export.export(made(NETWORKS["sequential"]), (torch.zeros(1, 3, SIDE, SIDE),))
    torch.export.save(program, tmp_path / "model.pt2")
    single = backends.load(tmp_path / "model.pt2", ModelConfig(), LoadOptions())
    name, rule = single.signature.inputs[0].name, RULES["composite"]
    segments = [
        Segment(
            {name: scale * IMAGE},
            {name: scale * IMAGE},
            {},
            Differentiation(single.signature.outputs[0].name, ScoreHead.IDENTITY, (name,), rule),
            np.ones(1),
            np.ones(1),
            (one_hot(1),),
        )
        for scale in (np.float32(1), np.float32(0.5))
    ]
    found = single.evaluate(Rows(segments[0].function, tuple(segments)))

    for own, scale in zip(found, (np.float32(1), np.float32(0.5)), strict=True):
        (other,) = explained(load("sequential", "pt2"), rule, {"x": scale * IMAGE}, selectors=(one_hot(1),))
        assert distance(own.gradient_sums[name], other.gradient_sums["x"]) < 1e-5


# --- patterns --------------------------------------------------------------------------------------------------------


def with_patterns(program: Any, folder: Path, kind: str, patterns: dict[str, Array]) -> LoadedModel:
    folder.mkdir()
    np.savez(folder / "patterns.npz", **patterns)
    return loaded(program, folder, kind)


SHAPES = {"conv2d": (4, 3, 3, 3), "linear": (5, 4 * (SIDE - 2) ** 2)}


def drawn_patterns() -> dict[str, Array]:
    random = np.random.default_rng(8)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("rule", PATTERN_RULES)
def test_a_pattern_takes_the_place_of_the_weights(tmp_path: Path, rule: str) -> None:
    """As in a network that goes forward by its weights and back by others."""
    net, patterns = made(lambda: Of(torch.relu)), drawn_patterns()
    model = with_patterns(exported(net), tmp_path / "pt2", "pt2", patterns)
    (found,) = explained(model, PATTERN_RULES[rule])

    first, second = (torch.from_numpy(patterns[name]) for name in ("conv2d", "linear"))
    if rule == "pattern_attribution":
        first, second = first * net.first.weight.detach(), second * net.head.weight.detach()
    hidden = net.first(torch.from_numpy(IMAGE)[None]).detach()
    going_back = second[2].reshape(hidden.shape) * (hidden > 0) * float(found.scores[0])
    expected = functional.conv_transpose2d(going_back, first)[0].numpy()
    assert distance(found.gradient_sums["x"], expected) < 1e-5


def test_formats_go_back_by_the_same_patterns(tmp_path: Path) -> None:
    program, patterns = exported(made(lambda: Of(torch.relu))), drawn_patterns()
    pt2 = with_patterns(program, tmp_path / "pt2", "pt2", patterns)
    bare = loaded(program, tmp_path / "bare", "onnx")
    names = {layer.operator: layer.name for layer in bare.layers} | {"Gemm": bare.signature.outputs[0].name}
    onnx = with_patterns(
        program, tmp_path / "onnx", "onnx", {names["Conv"]: patterns["conv2d"], names["Gemm"]: patterns["linear"]}
    )
    for rule in PATTERN_RULES.values():
        (own,), (other,) = explained(pt2, rule), explained(onnx, rule)
        assert distance(own.gradient_sums["x"], other.gradient_sums["x"]) < 1e-4


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, "there is no pattern for layer 'linear'"),
        ({"linear": np.ones((4, 5), np.float32)}, "has shape (4, 5), its weights (5, 256)"),
    ],
)
def test_a_pattern_that_is_missing_or_does_not_fit_is_refused(
    tmp_path: Path, changed: dict[str, Array], reason: str
) -> None:
    patterns = {"conv2d": drawn_patterns()["conv2d"], **changed}
    model = with_patterns(exported(made(lambda: Of(torch.relu))), tmp_path / "pt2", "pt2", patterns)

    assert reason in model.rule_gap("pattern_net") and reason in model.rule_gap("pattern_attribution")
    assert model.rule_gap("lrp_epsilon") == ""


@pytest.mark.parametrize("function", [torch.sigmoid, lambda x: x * x.tanh()])
def test_what_patterns_are_not_defined_on_is_refused(tmp_path: Path, function: Callable[[Any], Any]) -> None:
    model = with_patterns(exported(Of(function)), tmp_path / "pt2", "pt2", drawn_patterns())

    assert "patterns are not defined on" in model.rule_gap("pattern_net")


def test_a_model_without_patterns_says_what_to_supply(load: Load) -> None:
    assert "patterns.npz" in load("sequential", "pt2").gradient_rules["pattern_attribution"]
