"""Models in sixteen bits beside themselves in float32."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

from closed_form import ClosedForm  # noqa: E402
from explainserve import backends  # noqa: E402
from explainserve.backends import precision  # noqa: E402
from explainserve.backends.contract import LoadedModel, LoadOptions  # noqa: E402
from explainserve.backends.torch_precision import _Float32Mode, row_scales  # noqa: E402
from explainserve.errors import EvaluationFailed, ModelRefused  # noqa: E402
from explainserve.model_config import ModelConfig, Precision  # noqa: E402
from explainserve.plan import Differentiation, Rows, Segment, SegmentEvaluation, Selector  # noqa: E402
from explainserve.signature import ScoreHead  # noqa: E402

NARROW = {Precision.BFLOAT16: 2.0**-8, Precision.FLOAT16: 2.0**-11}
"""Rounding error of one number, relative."""

narrow = pytest.mark.parametrize("chosen", NARROW, ids=lambda each: each.value)
torch_format = pytest.mark.parametrize("suffix", ["pt2", "pt"])
narrow_format = pytest.mark.parametrize(
    ("suffix", "chosen"),
    [
        *(pytest.param(suffix, each, id=f"{suffix}-{each.value}") for suffix in ("pt2", "pt") for each in NARROW),
        pytest.param("onnx", Precision.FLOAT16, id="onnx-float16"),
    ],
)


class Net(nn.Module):
    """Convolutions, a normalization of activations and attention: what sixteen bits treat in different ways."""

    def __init__(self, sharpness: float = 1.0) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, 2), nn.LayerNorm(16)
        self.attention = nn.Linear(16, 48)
        self.head = nn.Linear(16, 4)
        self.sharpness = sharpness

    def forward(self, x: Any) -> Any:
        tokens = self.norm(nn.functional.gelu(self.conv(x)).flatten(2).transpose(1, 2))
        query, key, value = self.attention(tokens)[:, None].chunk(3, -1)  # of one head
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)[:, 0]
        return self.sharpness * self.head((tokens + mixed).mean(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("precision")


def load(folder: Path, suffix: str, chosen: Precision, sharpness: float = 1.0) -> LoadedModel:
    path = folder / f"model-{sharpness}.{suffix}"
    if not path.exists():
        write(path, suffix, sharpness)
    config = ModelConfig.model_validate(
        {
            "inputs": [{"name": "x", "shape": ["batch", 3, 9, 9]}],
            "outputs": [{"name": "y", "shape": ["batch", 4], "kind": "logits"}],
            "precision": chosen,
        }
    )
    return backends.load(path, config, LoadOptions())


def write(path: Path, suffix: str, sharpness: float) -> None:
    torch.manual_seed(1)
    net, example = Net(sharpness).eval(), (torch.randn(2, 3, 9, 9),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of TorchScript
        batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
        if suffix == "pt":
            torch.jit.trace(net, example).save(str(path))
        elif suffix == "pt2":
            torch.export.save(torch.export.export(net, example, dynamic_shapes=batch), path)
        else:
            names = {"input_names": ["x"], "output_names": ["y"]}
            torch.onnx.export(net, example, path, dynamo=True, verbose=False, dynamic_shapes=batch, **names)


def path_of(model: LoadedModel, head: ScoreHead = ScoreHead.IDENTITY) -> Rows:
    """Sixteen rows from zeros to a random row, and one score."""
    x = np.random.default_rng(5).standard_normal((3, 9, 9)).astype(np.float32)
    function = Differentiation("y", head, ("x",))
    selector = Selector(np.array([1]), np.ones(1, np.float32))
    alphas = (np.arange(16) + 0.5) / 16
    return Rows(function, (Segment({"x": 0 * x}, {"x": x}, {}, function, alphas, np.full(16, 1 / 16), (selector,)),))


def gradient(model: LoadedModel, head: ScoreHead = ScoreHead.IDENTITY) -> np.ndarray[Any, Any]:
    (found,) = model.evaluate(path_of(model, head))
    return np.asarray(found.gradient_sums["x"])


def relative(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@narrow_format
def test_gradients_differ_from_float32_by_the_rounding_of_their_precision(
    folder: Path, suffix: str, chosen: Precision
) -> None:
    exact, found = (gradient(load(folder, suffix, each)) for each in (Precision.FLOAT32, chosen))

    assert found.dtype == np.float32
    assert 0.01 * NARROW[chosen] < relative(found, exact) < 10 * NARROW[chosen]


@narrow
def test_both_formats_of_torch_compute_alike(folder: Path, chosen: Precision) -> None:
    one, other = (gradient(load(folder, suffix, chosen)) for suffix in ("pt2", "pt"))

    assert relative(one, other) < 5 * NARROW[chosen]


@narrow_format
def test_a_saturated_probability_keeps_its_gradient(folder: Path, suffix: str, chosen: Precision) -> None:
    """Its gradient with respect to the logits is below what float16 holds."""
    exact, found = (
        gradient(load(folder, suffix, each, sharpness=60.0), ScoreHead.SOFTMAX) for each in (Precision.FLOAT32, chosen)
    )

    assert 0 < np.abs(exact).max() < 1e-6
    cosine = float((found * exact).sum()) / (np.linalg.norm(found) * np.linalg.norm(exact))
    assert cosine > 0.99  # the length is that of an exponential of rounded logits


def test_row_scales_are_powers_of_two_and_leave_what_cannot_be_scaled() -> None:
    cotangent = torch.tensor([[1.0, -3.0], [1e-20, 0.0], [0.0, 0.0], [float("inf"), 1.0], [float("nan"), 1.0]])
    scales = row_scales(cotangent)

    assert scales[2:].tolist() == [1.0, 1.0, 1.0]
    assert torch.frexp(scales)[0].tolist() == [0.5] * 5
    largest = (cotangent.abs().amax(1) * scales)[:2]
    assert ((largest >= 8) & (largest <= 16)).all()


@narrow_format
def test_the_map_error_is_that_of_whole_maps(folder: Path, suffix: str, chosen: Precision) -> None:
    reference, model = (load(folder, suffix, each) for each in (Precision.FLOAT32, chosen))
    found = precision.check(model, reference, chosen.value)

    assert found.rows_independent
    assert found.precision_map_error is not None
    assert 0.01 * NARROW[chosen] < found.precision_map_error < 10 * NARROW[chosen]
    assert precision.map_error(reference, reference) == 0.0


class Off(ClosedForm):
    """Gradients that are too large by a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def evaluate(self, rows: Rows) -> tuple[SegmentEvaluation, ...]:
        parts = super().evaluate(rows)
        return tuple(
            SegmentEvaluation(p.scores, {n: self._factor * g for n, g in p.gradient_sums.items()}, p.outputs)
            for p in parts
        )


def test_the_map_error_is_relative() -> None:
    assert precision.map_error(Off(1.25), ClosedForm()) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("factor", [1.6, float("nan")])
def test_a_precision_that_spoils_maps_is_refused(factor: float) -> None:
    with pytest.raises(ModelRefused) as refusal:
        precision.check(Off(factor), ClosedForm(), "float16")

    assert refusal.value.reason == "PRECISION_UNUSABLE"
    assert refusal.value.metadata["precision"] == "float16"


class Failing(ClosedForm):
    """Has no gradient in its precision."""

    def evaluate(self, rows: Rows) -> tuple[SegmentEvaluation, ...]:
        raise EvaluationFailed("MODEL_RAISED", "no kernel of float16")


def test_a_model_that_runs_in_float32_only_is_refused() -> None:
    with pytest.raises(ModelRefused, match="no kernel of float16") as refusal:
        precision.check(Failing(), ClosedForm(), "float16")

    assert refusal.value.reason == "PRECISION_UNUSABLE"


@pytest.mark.parametrize("suffix", ["pt2", "pt", "onnx"])
def test_tf32_is_refused_on_the_cpu(folder: Path, suffix: str) -> None:
    with pytest.raises(ModelRefused) as refusal:
        load(folder, suffix, Precision.TF32)

    assert refusal.value.reason == "PRECISION_UNAVAILABLE"
    assert refusal.value.metadata == {"precision": "tf32", "device": "cpu"}


def test_evaluations_in_different_modes_take_turns() -> None:
    set_to: list[bool] = []
    mode = _Float32Mode(set_to.append)
    with mode.set_to(Precision.FLOAT32), mode.set_to(Precision.BFLOAT16):
        pass
    with mode.set_to(Precision.TF32):
        assert set_to == [False, True]
    with mode.set_to(Precision.FLOAT32):
        assert set_to == [False, True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("suffix", ["pt2", "pt", "onnx"])
def test_tf32_is_told_from_float32_on_cuda(folder: Path, suffix: str) -> None:
    path = folder / f"model-1.0.{suffix}"
    if not path.exists():
        write(path, suffix, 1.0)
    inputs = [{"name": "x", "shape": ["batch", 3, 9, 9]}]
    outputs = [{"name": "y", "shape": ["batch", 4], "kind": "logits"}]
    exact, mode, expected = (
        gradient(
            backends.load(
                path,
                ModelConfig.model_validate({"inputs": inputs, "outputs": outputs, "precision": each}),
                LoadOptions(device=device),
            )
        )
        for each, device in ((Precision.FLOAT32, "cuda"), (Precision.TF32, "cuda"), (Precision.FLOAT32, "cpu"))
    )

    assert relative(exact, expected) < 1e-5
    assert 1e-5 < relative(mode, expected) < 1e-2
