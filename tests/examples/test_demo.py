"""The demo's figures, recomputed from its raw tensors and from the trained network in plain torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "two_digits"
sys.path.insert(0, str(EXAMPLE))

import similarity  # noqa: E402


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, dict[str, np.ndarray], Path]:
    """What the demo prints and writes: text, report, raw maps, folder."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(EXAMPLE / "demo.py"), "--output", str(folder)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert finished.returncode == 0, finished.stderr
    with np.load(folder / "attributions.npz") as saved:
        maps = dict(saved)
    return finished.stdout, json.loads((folder / "report.json").read_text()), maps, folder


def lines(report: dict):
    """(picture report, figures of one map, its own box's name, the other's)."""
    for picture in report["pictures"]:
        for line, (own, other) in zip(picture["maps"], [("left", "right"), ("right", "left")], strict=True):
            yield picture, line, own, other


def box_sum(tensor: np.ndarray, box: list[int]) -> float:
    x, y, width, height = box
    return float(tensor[:, y : y + height, x : x + width].sum(dtype=np.float64))


@pytest.mark.slow
def test_every_figure_follows_from_the_raw_maps(demo) -> None:
    _, report, maps, _ = demo

    assert len({picture["picture"] for picture in report["pictures"]}) >= 20
    for picture, line, own, other in lines(report):
        tensor = maps[f"{picture['model']}/{picture['picture']}/{line['class']}"]
        plane = tensor.astype(np.float64).sum(axis=0)
        assert tensor.dtype == np.float32
        assert line["own_box_sum"] == pytest.approx(box_sum(tensor, picture["boxes"][own]), abs=1e-9)
        assert line["other_box_sum"] == pytest.approx(box_sum(tensor, picture["boxes"][other]), abs=1e-9)
        assert line["sum"] == pytest.approx(tensor.sum(dtype=np.float64), abs=1e-9)
        assert (line["min"], line["max"]) == (plane.min(), plane.max())
        delta = line["sum"] - (line["output"] - line["baseline_output"])
        assert line["convergence_delta"] == pytest.approx(delta, abs=1e-9)


@pytest.mark.slow
def test_joint_ranges_pool_both_classes(demo) -> None:
    _, report, maps, _ = demo

    for picture in report["pictures"]:
        planes = [
            maps[f"{picture['model']}/{picture['picture']}/{label}"].astype(np.float64).sum(axis=0)
            for label in picture["classes"]
        ]
        assert picture["joint_min"] == min(plane.min() for plane in planes)
        assert picture["joint_max"] == max(plane.max() for plane in planes)


@pytest.mark.slow
def test_counts_are_counts_and_exceptions_are_told(demo) -> None:
    text, report, _, _ = demo
    trained = [
        line["own_box_sum"] > 2 * line["own_box_error"] and line["other_box_sum"] < -2 * line["other_box_error"]
        for p, line, *_ in lines(report)
        if p["model"] == "two-digits"
    ]
    twins = [
        max(abs(line["own_box_sum"]), abs(line["other_box_sum"])) < report["negligible_below"]
        for p, line, *_ in lines(report)
        if p["model"] != "two-digits"
    ]

    assert report["summary"]["two-digits"]["as_expected"]["yes"] == sum(trained)
    assert len(report["exceptions"]) == trained.count(False) + twins.count(False)
    assert f"in {sum(trained)} of {len(trained)} maps" in text
    assert text.count("Exception (") == len(report["exceptions"])


@pytest.mark.slow
def test_the_story_holds(demo) -> None:
    """The trained model tells the digits apart, the twins' sums are negligible, and joint scales bring that back."""
    _, report, _, _ = demo
    summary = report["summary"]

    assert summary["two-digits"]["as_expected"]["yes"] >= 0.9 * summary["two-digits"]["maps"]
    for twin in ("two-digits-random-a", "two-digits-random-b"):
        assert summary[twin]["as_expected"]["yes"] == summary[twin]["maps"]
        assert summary[twin]["median_joint_range"] < 0.1 * summary["two-digits"]["median_joint_range"]


@pytest.mark.slow
def test_spans_are_shares_of_the_stated_scales(demo) -> None:
    _, report, _, _ = demo
    spans = iter(report["spans"])
    for start in range(0, len(report["pictures"]), 3):
        models = report["pictures"][start : start + 3]
        whole = max(m["joint_max"] for m in models) - min(m["joint_min"] for m in models)
        for picture in models:
            for line in picture["maps"]:
                span = next(spans)
                assert span["of_models"] == pytest.approx((line["max"] - line["min"]) / whole)
                assert 0 < span["of_models"] <= span["of_classes"] <= 1


@pytest.mark.slow
@pytest.mark.torch
def test_maps_are_those_of_the_network_in_plain_torch(demo) -> None:
    torch = pytest.importorskip("torch")
    import network
    import pictures

    _, report, maps, _ = demo
    trained = network.load_weights()
    baseline = network.gray_input()
    rows = [row for row in lines(report) if row[0]["model"] == "two-digits" and row[0]["picture"] < 4]
    pairs = pictures.load_pairs()
    for picture, line, own, _ in rows:
        pair = pairs[picture["picture"]]
        label = pair.labels[0 if own == "left" else 1]
        instance = network.normalized(pair.picture.image[None])[0]
        total = torch.zeros_like(instance)
        for alphas in ((torch.arange(512) + 0.5) / 512).split(64):
            points = (baseline + alphas[:, None, None, None] * (instance - baseline)).requires_grad_(True)
            total += torch.autograd.grad(trained(points).softmax(1)[:, label].sum(), points)[0].sum(0)
        expected = (total / 512 * (instance - baseline)).detach().numpy()
        got = maps[f"two-digits/{picture['picture']}/{line['class']}"]
        with torch.no_grad():
            value = trained(torch.stack([instance, baseline])).softmax(1)[:, label]

        assert str(label) == line["class"]
        assert np.linalg.norm(got - expected) < 0.04 * np.linalg.norm(expected)
        assert [line["output"], line["baseline_output"]] == pytest.approx(value.tolist(), abs=1e-5)


@pytest.mark.slow
def test_pictures_are_written(demo) -> None:
    image = pytest.importorskip("PIL.Image")
    *_, folder = demo

    with image.open(folder / "maps.png") as picture:
        colors = np.asarray(picture.convert("RGB")).reshape(-1, 3)

    assert min(picture.size) > 800
    assert len(np.unique(colors, axis=0)) > 100


def test_similarity_of_equal_opposite_and_unrelated_maps() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.uniform(size=(2, 32, 32))

    assert similarity.rms_difference(first, first) == 0
    assert similarity.rms_difference(first, first + 0.5) == pytest.approx(0.5)
    assert similarity.ssim(first, first, 1.0) == pytest.approx(1.0)
    assert similarity.ssim(first, 1 - first, 1.0) < 0
    assert abs(similarity.ssim(first, second, 1.0)) < 0.2


def test_ssim_is_the_formula_on_one_window() -> None:
    """On an 11 x 11 plane there is one window, so the formula can be written out."""
    rng = np.random.default_rng(1)
    a, b = rng.uniform(size=(2, 11, 11))
    offsets = np.arange(11) - 5
    taps = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(taps, taps) / taps.sum() ** 2
    mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
    var_a, var_b = (weights * a * a).sum() - mean_a**2, (weights * b * b).sum() - mean_b**2
    covariance = (weights * a * b).sum() - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)

    expected = luminance * (2 * covariance + 9e-4) / (var_a + var_b + 9e-4)

    assert similarity.ssim(a, b, 1.0) == pytest.approx(expected, rel=1e-9)
