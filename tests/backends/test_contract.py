"""What holds for every backend, over all loaders and all models that are registered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from explainserve.backends import LOADERS, probe
from explainserve.backends.contract import LoadedModel
from explainserve.errors import ExplainServeError, Unsupported
from explainserve.plan import Differentiation, Rows, Segment, Selector
from explainserve.signature import ScoreHead
from models import MODELS, ModelCase

Load = Callable[[str, str], LoadedModel]

FORMATS = sorted({suffix.lstrip(".") for suffix in LOADERS} - {"ts"})  # .ts is the other suffix of .pt
DIFFERENTIABLE = [name for name, case in MODELS.items() if case.differentiable]
INDEPENDENT = [name for name in DIFFERENTIABLE if MODELS[name].rows_independent and name != "root"]
CLOSED = [name for name in INDEPENDENT if MODELS[name].gradient is not None]

every_format = pytest.mark.parametrize("file_format", FORMATS)


def differentiation(case: ModelCase, head: ScoreHead = ScoreHead.IDENTITY, output: int = 0) -> Differentiation:
    moving = tuple(port.name for port in case.inputs if port.dtype == "float32")
    return Differentiation(case.outputs[output].name, head, moving)


def segment(
    case: ModelCase,
    function: Differentiation,
    seed: int,
    alphas: Any = (0.0, 0.3, 1.0),
    weights: Any = (0.2, 0.5, 0.3),
    selectors: Sequence[Selector] = (),
) -> Segment:
    """A path from one random instance to another."""
    start, end = case.instance(seed), case.instance(seed + 1000)
    moving = {port.name for port in case.inputs if port.dtype == "float32"}
    return Segment(
        {name: start[name] for name in moving},
        {name: end[name] for name in moving},
        {name: value for name, value in end.items() if name not in moving},
        function,
        np.asarray(alphas, np.float64),
        np.asarray(weights, np.float64),
        tuple(selectors),
    )


def one_hot(index: int, weight: float = 1.0) -> Selector:
    return Selector(np.array([index]), np.array([weight], np.float32))


def point(part: Segment, alpha: float) -> dict[str, Any]:
    """A point of a path in float64."""
    moving = {name: (1 - alpha) * part.start[name].astype(np.float64) + alpha * part.end[name] for name in part.start}
    return {**moving, **part.fixed}


def relative(actual: Any, expected: Any) -> float:
    return float(np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected))


def torch_oracle(case: ModelCase, part: Segment) -> tuple[list[float], dict[str, Any]]:
    """Scores and weighted gradient sums of torch in float64, row by row."""
    torch = pytest.importorskip("torch")
    module = case.module().double().eval()
    output = [port.name for port in case.outputs].index(part.function.output)
    scores, sums = [], dict.fromkeys(part.function.wrt, 0.0)
    for alpha, weight in zip(part.alphas, part.weights, strict=True):
        inputs = {name: torch.tensor(value)[None] for name, value in point(part, alpha).items()}
        for name in part.function.wrt:
            inputs[name].requires_grad_()
        outputs = module(*(inputs[port.name] for port in case.inputs))
        value = (outputs if isinstance(outputs, tuple) else (outputs,))[output]
        picked = _headed(value, part.function.head).flatten()[part.selectors[0].indices]
        score = (picked * torch.tensor(part.selectors[0].weights)).sum()
        scores.append(score.item())
        gradients = torch.autograd.grad(score, [inputs[name] for name in part.function.wrt])
        sums = {name: sums[name] + weight * g[0].numpy() for name, g in zip(sums, gradients, strict=True)}
    return scores, sums


def _headed(value: Any, head: ScoreHead) -> Any:
    functions = {
        ScoreHead.IDENTITY: lambda v: v,
        ScoreHead.SOFTMAX: lambda v: v.softmax(1),
        ScoreHead.LOG_SOFTMAX: lambda v: v.log_softmax(1),
        ScoreHead.SIGMOID: lambda v: v.sigmoid(),
        ScoreHead.LOG_SIGMOID: lambda v: -(1 + (-v).exp()).log(),
        ScoreHead.LOG: lambda v: v.log(),
    }
    return functions[head](value)


@every_format
@pytest.mark.parametrize("name", MODELS)
def test_states_its_signature(load: Load, file_format: str, name: str) -> None:
    case, model = MODELS[name], load(name, file_format)
    assert [(s.name, s.dtype.name) for s in model.signature.inputs] == [(p.name, p.dtype) for p in case.inputs]
    assert [tuple(axis.size for axis in s.instance_axes) for s in model.signature.inputs] == [
        p.shape for p in case.inputs
    ]
    assert [s.name for s in model.signature.outputs] == [p.name for p in case.outputs]
    assert [tuple(axis.size for axis in s.axes[1:]) for s in model.signature.outputs] == [p.shape for p in case.outputs]
    assert all(spec.batched for spec in model.signature.inputs)
    assert model.device == "cpu"
    assert model.library_versions


@every_format
@pytest.mark.parametrize("name", CLOSED)
def test_equals_the_closed_form(load: Load, file_format: str, name: str) -> None:
    case = MODELS[name]
    part = segment(case, differentiation(case), 1, selectors=[one_hot(0, 2.0)])
    (found,) = load(name, file_format).evaluate(Rows(part.function, (part,)))
    points = [point(part, alpha) for alpha in part.alphas]
    cotangent = np.zeros(case.outputs[0].shape)
    cotangent.flat[0] = 2.0
    np.testing.assert_allclose(found.scores, [2.0 * case.value(p).flat[0] for p in points], rtol=1e-5, atol=1e-5)
    gradients = [case.gradient(p, cotangent) for p in points]
    for wrt in part.function.wrt:
        expected = sum(w * g[wrt] for w, g in zip(part.weights, gradients, strict=True))
        assert relative(found.gradient_sums[wrt], expected) < 1e-6
        assert found.gradient_sums[wrt].dtype == np.float32
        assert found.gradient_sums[wrt].shape == part.start[wrt].shape
    assert found.scores.dtype == np.float64
    assert found.outputs is None


@every_format
@pytest.mark.parametrize("name", INDEPENDENT)
def test_equals_torch_in_float64(load: Load, file_format: str, name: str) -> None:
    case = MODELS[name]
    count = int(np.prod(case.outputs[0].shape))
    margin = Selector(np.unique([0, count - 1]), np.array([1.0, -1.0], np.float32)[: min(count, 2)])
    part = segment(case, differentiation(case), 2, selectors=[margin])
    scores, sums = torch_oracle(case, part)
    (found,) = load(name, file_format).evaluate(Rows(part.function, (part,)))
    np.testing.assert_allclose(found.scores, scores, rtol=1e-4, atol=1e-5)
    for wrt, expected in sums.items():
        assert relative(found.gradient_sums[wrt], expected) < 1e-4


@pytest.mark.parametrize("name", INDEPENDENT)
def test_formats_agree(load: Load, name: str) -> None:
    case = MODELS[name]
    part = segment(case, differentiation(case), 3, selectors=[one_hot(0)])
    found = [load(name, f).evaluate(Rows(part.function, (part,)))[0].gradient_sums for f in FORMATS]
    for wrt in part.function.wrt:
        for other in found[1:]:
            assert relative(other[wrt], found[0][wrt].astype(np.float64)) < 1e-4


@every_format
@pytest.mark.parametrize("name", INDEPENDENT)
def test_segments_that_share_a_batch_equal_each_alone(load: Load, file_format: str, name: str) -> None:
    case, model = MODELS[name], load(name, file_format)
    function = differentiation(case)
    last = int(np.prod(case.outputs[0].shape)) - 1
    parts = (
        segment(case, function, 4, selectors=[one_hot(0)]),
        segment(case, function, 5, (0.5,), (1.0,), [one_hot(last, -3.0)]),
        segment(case, function, 6, (0.1, 0.9), (-1.0, 2.0), [one_hot(last)]),
    )
    together = model.evaluate(Rows(function, parts))
    assert len(together) == len(parts)
    for part, found in zip(parts, together, strict=True):
        (alone,) = model.evaluate(Rows(function, (part,)))
        np.testing.assert_allclose(found.scores, alone.scores, rtol=1e-5, atol=1e-6)
        for wrt in function.wrt:
            assert relative(found.gradient_sums[wrt], alone.gradient_sums[wrt].astype(np.float64)) < 1e-5


@every_format
@pytest.mark.parametrize("name", INDEPENDENT)
def test_several_selectors_equal_each_alone(load: Load, file_format: str, name: str) -> None:
    case, model = MODELS[name], load(name, file_format)
    function = differentiation(case)
    last = int(np.prod(case.outputs[0].shape)) - 1
    selectors = one_hot(0), one_hot(last, -3.0), one_hot(last)
    parts = (
        segment(case, function, 4, selectors=selectors),
        segment(case, function, 5, (0.1, 0.9), (0.0, 2.0), selectors[::-1]),
    )
    together = model.evaluate(Rows(function, parts))
    assert len(together) == 6
    alone = [replace(part, selectors=(selector,)) for part in parts for selector in part.selectors]
    for part, found in zip(alone, together, strict=True):
        (expected,) = model.evaluate(Rows(function, (part,)))
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
        for wrt in function.wrt:
            assert relative(found.gradient_sums[wrt], expected.gradient_sums[wrt].astype(np.float64)) < 1e-5


@every_format
def test_forward_only_rows_with_selectors_return_their_scores(load: Load, file_format: str) -> None:
    case, model = MODELS["classifier"], load("classifier", file_format)
    function = Differentiation(case.outputs[0].name, ScoreHead.SOFTMAX)
    part = segment(case, function, 7, selectors=[one_hot(0), one_hot(2, -1.0)])
    first, second = model.evaluate(Rows(function, (part,)))
    (tensors,) = model.evaluate(Rows(function, (replace(part, selectors=()),)))
    assert tensors.outputs is not None and first.outputs is None and not first.gradient_sums
    np.testing.assert_allclose(first.scores, tensors.outputs[:, 0], rtol=1e-6)
    np.testing.assert_allclose(second.scores, -tensors.outputs[:, 2], rtol=1e-6)


@every_format
@pytest.mark.parametrize("name", MODELS)
def test_forward_only_rows_return_score_tensors(load: Load, file_format: str, name: str) -> None:
    case, model = MODELS[name], load(name, file_format)
    for position, port in enumerate(case.outputs):
        function = Differentiation(port.name, ScoreHead.IDENTITY)
        parts = tuple(segment(case, function, seed) for seed in (7, 8))
        for found in model.evaluate(Rows(function, parts)):
            assert found.outputs is not None
            assert found.outputs.shape == (3, *port.shape)
            assert found.scores.shape == (0,)
            assert not found.gradient_sums
        if position == 0 and case.value is not None:
            expected = [case.value(point(parts[1], alpha)) for alpha in parts[1].alphas]
            np.testing.assert_allclose(found.outputs, expected, rtol=1e-5, atol=1e-5)


@every_format
def test_end_points_are_exact(load: Load, file_format: str) -> None:
    case, model = MODELS["saturated_relu"], load("saturated_relu", file_format)
    function = Differentiation("y", ScoreHead.IDENTITY)
    x = np.array([0.1, 1.7, -1e-7], np.float32)
    far = np.array([1e8, -3.0, 1e-3], np.float32)
    there = Segment({"x": far}, {"x": x}, {}, function, np.array([1.0]), np.array([1.0]))
    here = Segment({"x": x}, {"x": x}, {}, function, np.array([0.25]), np.array([1.0]))
    one, two = model.evaluate(Rows(function, (there, here)))
    assert case.value is not None
    np.testing.assert_array_equal(one.outputs, two.outputs)


@every_format
@pytest.mark.parametrize("name", ["classifier", "conv"])
@pytest.mark.parametrize("head", [h for h in ScoreHead if h not in (ScoreHead.LOG, ScoreHead.PRE_ACTIVATION)])
def test_heads_are_differentiated_with_the_model(load: Load, file_format: str, name: str, head: ScoreHead) -> None:
    case = MODELS[name]
    part = segment(case, differentiation(case, head), 9, selectors=[one_hot(2)])
    scores, sums = torch_oracle(case, part)
    (found,) = load(name, file_format).evaluate(Rows(part.function, (part,)))
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5, atol=1e-6)
    assert relative(found.gradient_sums["x"], sums["x"]) < 1e-4


@every_format
def test_log_of_probabilities(load: Load, file_format: str) -> None:
    case = MODELS["probabilities"]
    part = segment(case, differentiation(case, ScoreHead.LOG), 10, selectors=[one_hot(1)])
    scores, sums = torch_oracle(case, part)
    (found,) = load("probabilities", file_format).evaluate(Rows(part.function, (part,)))
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5, atol=1e-6)
    assert relative(found.gradient_sums["x"], sums["x"]) < 1e-4


@every_format
@pytest.mark.parametrize("head", [ScoreHead.LOG_SOFTMAX, ScoreHead.LOG_SIGMOID, ScoreHead.SOFTMAX, ScoreHead.SIGMOID])
def test_heads_stay_finite_on_large_logits(load: Load, file_format: str, head: ScoreHead) -> None:
    case = MODELS["classifier"]
    function = differentiation(case, head)
    x = np.full(4, 300.0, np.float32)
    part = Segment({"x": -x}, {"x": x}, {}, function, np.array([0.0, 1.0]), np.ones(2), (one_hot(0),))
    (found,) = load("classifier", file_format).evaluate(Rows(function, (part,)))
    assert np.isfinite(found.scores).all()
    assert np.isfinite(found.gradient_sums["x"]).all()


@every_format
def test_rows_of_weight_zero_are_left_out(load: Load, file_format: str) -> None:
    case = MODELS["root"]
    function = differentiation(case)
    negative, positive = np.full(4, -1.0, np.float32), np.full(4, 4.0, np.float32)
    part = Segment(
        {"x": negative}, {"x": positive}, {}, function, np.array([0.0, 1.0]), np.array([0.0, 3.0]), (one_hot(0),)
    )
    (found,) = load("root", file_format).evaluate(Rows(function, (part,)))
    np.testing.assert_allclose(found.gradient_sums["x"], [0.75, 0.0, 0.0, 0.0], rtol=1e-6)
    assert np.isnan(found.scores[0])
    assert found.scores[1] == pytest.approx(2.0)


@every_format
def test_a_sum_of_no_rows_is_zero(load: Load, file_format: str) -> None:
    case = MODELS["linear"]
    part = segment(case, differentiation(case), 11, weights=(0.0, 0.0, 0.0), selectors=[one_hot(0)])
    (found,) = load("linear", file_format).evaluate(Rows(part.function, (part,)))
    np.testing.assert_array_equal(found.gradient_sums["x"], np.zeros(4))
    assert found.scores.shape == (3,)


@every_format
def test_one_of_two_moving_inputs_may_be_differentiated(load: Load, file_format: str) -> None:
    case = MODELS["product"]
    function = Differentiation("z", ScoreHead.IDENTITY, ("y",))
    part = segment(case, function, 12, selectors=[one_hot(0)])
    (found,) = load("product", file_format).evaluate(Rows(function, (part,)))
    assert set(found.gradient_sums) == {"y"}
    expected = sum(w * point(part, a)["x"] for a, w in zip(part.alphas, part.weights, strict=True))
    assert relative(found.gradient_sums["y"], expected) < 1e-6


@every_format
def test_inputs_that_may_not_be_written_to_stay_as_they_are(load: Load, file_format: str) -> None:
    case = MODELS["multi_input"]
    part = segment(case, differentiation(case), 13, selectors=[one_hot(0)])
    arrays = [*part.start.values(), *part.end.values(), *part.fixed.values()]
    before = [array.copy() for array in arrays]
    for array in arrays:
        array.flags.writeable = False
    load("multi_input", file_format).evaluate(Rows(part.function, (part,)))
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


@every_format
def test_a_model_without_a_gradient_says_so_and_still_evaluates(load: Load, file_format: str) -> None:
    """In ONNX a comparison has a gradient of zero; in torch it has none."""
    case, model = MODELS["step"], load("step", file_format)
    part = segment(case, differentiation(case), 14, selectors=[one_hot(0)])
    if model.gaps:
        with pytest.raises(Unsupported) as refusal:
            model.evaluate(Rows(part.function, (part,)))
        assert refusal.value.reason == "NOT_DIFFERENTIABLE"
    else:
        (found,) = model.evaluate(Rows(part.function, (part,)))
        np.testing.assert_array_equal(found.gradient_sums["x"], np.zeros(4))


@every_format
def test_a_second_output(load: Load, file_format: str) -> None:
    case = MODELS["multi_output"]
    part = segment(case, differentiation(case, output=1), 15, selectors=[one_hot(0)])
    (found,) = load("multi_output", file_format).evaluate(Rows(part.function, (part,)))
    points = [point(part, alpha)["x"] for alpha in part.alphas]
    np.testing.assert_allclose(found.scores, [x @ x for x in points], rtol=1e-5)
    assert relative(found.gradient_sums["x"], sum(w * 2 * x for w, x in zip(part.weights, points, strict=True))) < 1e-6


@every_format
def test_what_a_model_raises_is_an_error_of_ours(load: Load, file_format: str) -> None:
    case, model = MODELS["linear"], load("linear", file_format)
    function = Differentiation("y", ScoreHead.IDENTITY)
    wide = {"x": np.ones(9, np.float32)}
    part = Segment(wide, wide, {}, function, np.ones(1), np.ones(1))
    with pytest.raises(ExplainServeError) as error:
        model.evaluate(Rows(function, (part,)))
    assert error.value.reason == "MODEL_RAISED"
    good = segment(case, function, 16)
    assert model.evaluate(Rows(function, (good,)))[0].outputs is not None


@every_format
@pytest.mark.parametrize("name", MODELS)
def test_the_probe_finds_models_that_mix_rows(load: Load, file_format: str, name: str) -> None:
    result = probe.check(load(name, file_format))
    assert result.rows_independent is MODELS[name].rows_independent
    assert bool(result.warnings) >= (not result.rows_independent)
    model = load(name, file_format)
    measured = result.rows_independent and not model.fixed_batch and not model.gaps
    assert (result.noise_floor is not None) == measured
    assert 0 <= (result.noise_floor or 0.0) < 1e-4
