"""The embedded models and pictures are what the example's own code says they are."""

import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "two_digits"
MODELS = EXAMPLE / "models"
NAMES = ("two-digits", "two-digits-random-a", "two-digits-random-b")
sys.path.insert(0, str(EXAMPLE))

import pictures  # noqa: E402

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
onnxruntime = pytest.importorskip("onnxruntime")

import box_sums  # noqa: E402
import export  # noqa: E402
import network  # noqa: E402
import selection  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # torch deprecates TorchScript, which is one of the formats served, and its exporter trips over its own notices.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


@pytest.fixture(scope="module")
def trained():
    return network.load_weights()


@pytest.fixture(scope="module")
def networks(trained):
    return {"two-digits": trained} | {name: network.random_network(seed) for name, seed in network.TWIN_SEEDS.items()}


@pytest.fixture(scope="module")
def held_out():
    return pictures.digit_split()[1]


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    export.export_models(trained, folder, ("pt2", "torchscript"))
    return folder


@pytest.fixture(scope="module")
def inputs():
    return network.normalized(np.stack([pair.picture.image for pair in pictures.load_pairs()]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 5])
def test_committed_onnx_has_the_committed_weights(networks, inputs, name, batch):
    session = onnxruntime.InferenceSession(MODELS / name / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": inputs[:batch].numpy()})
    np.testing.assert_allclose(logits, networks[name](inputs[:batch]).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 5])
def test_pt2_and_torchscript_have_the_same_weights(networks, exported, inputs, name, batch):
    programs = (
        torch.export.load(exported / f"{name}-pt2" / "1" / "model.pt2").module(),
        torch.jit.load(exported / f"{name}-torchscript" / "1" / "model.pt"),
    )
    expected = networks[name](inputs[:batch])
    for program in programs:
        torch.testing.assert_close(program(inputs[:batch]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_model_toml_states_the_preprocessing_that_was_trained_with(name):
    signature = tomllib.loads((MODELS / name / "model.toml").read_text())
    (stated,), (output,) = signature["inputs"], signature["outputs"]
    low, high = stated["value_range"]
    image = pictures.load_pairs()[0].picture.image[None]
    channels_first = np.moveaxis(low + image / 255 * (high - low), 3, 1)
    mean, std = (np.reshape(stated[key], (3, 1, 1)) for key in ("mean", "std"))
    np.testing.assert_allclose((channels_first - mean) / std, network.normalized(image).numpy(), atol=1e-5)
    np.testing.assert_allclose(
        ((low + high) / 2 - mean) * np.ones((3, 64, 64)) / std, network.gray_input().numpy(), atol=1e-6
    )
    assert output["labels"] == [str(digit) for digit in range(10)]


def test_no_held_out_digit_is_trained_on():
    training, held_out = pictures.digit_split()
    assert len(training.labels) + len(held_out.labels) == 1797
    seen = {ink.tobytes() for ink in training.inks}
    assert not any(ink.tobytes() in seen for ink in held_out.inks)


def test_accuracy_on_new_pictures_of_held_out_digits(trained, held_out):
    images = pictures.single_pictures(np.random.default_rng(2024), held_out)
    assert network.accuracy(trained, images, held_out.labels) > 0.95


def test_gray_picture_is_uncommitted(trained):
    probabilities = trained(network.gray_input()[None]).softmax(1)
    assert probabilities.max() < 0.2


def test_pictures_obey_the_selection_rule(trained):
    chosen = pictures.load_pairs()
    assert len(chosen) >= 24
    assert all(selection.is_sure(trained, pair) for pair in chosen)
    assert all(left != right for left, right in (pair.labels for pair in chosen))


def test_pictures_are_the_first_ones_drawn_that_obey_the_rule(trained, held_out):
    committed = pictures.load_pairs()
    drawn, candidate_count = selection.select(trained, held_out, len(committed))
    with np.load(pictures.PICTURES_FILE) as saved:
        assert saved["candidate_count"] == candidate_count
    for kept, again in zip(committed, drawn, strict=True):
        assert (kept.labels, kept.sources, kept.picture.boxes) == (again.labels, again.sources, again.picture.boxes)
        np.testing.assert_array_equal(kept.picture.image, again.picture.image)


def test_boxes_are_tight_and_each_in_its_half():
    for pair in pictures.load_pairs():
        for (x, y, width, height), (left, right) in zip(pair.picture.boxes, pictures.HALVES, strict=True):
            assert left <= x and x + width <= right and y >= 0 and y + height <= pictures.SIDE
            assert height >= 20 and width >= 5
            inside = pair.picture.image[y : y + height, x : x + width].mean()
            outside = np.delete(pair.picture.image[:, left:right], np.s_[y : y + height], axis=0).mean()
            assert inside > outside


def test_box_sums_tell_the_trained_model_from_its_twins(networks):
    probes = pictures.load_pairs()[:4]
    sums = {name: np.stack([box_sums.box_sums(net, pair) for pair in probes]) for name, net in networks.items()}
    assert box_sums.own_positive_other_negative(sums["two-digits"]).mean() > 0.7
    for name in NAMES[1:]:
        assert np.abs(sums[name]).max() < 0.05
    assert np.median(np.abs(sums["two-digits"])) > 0.05


def test_attributions_are_complete(trained, inputs):
    (pair, *_) = pictures.load_pairs()
    maps = box_sums.probability_attributions(trained, inputs[0], pair.labels).double()
    probabilities = trained(torch.stack([inputs[0], network.gray_input()])).softmax(1).double()[:, list(pair.labels)]
    torch.testing.assert_close(maps.sum((1, 2, 3)), probabilities[0] - probabilities[1], rtol=0, atol=0.02)


def test_committed_files_are_small_and_name_no_source_file():
    files = [MODELS / name / "1" / "model.onnx" for name in NAMES]
    assert sum(file.stat().st_size for file in files) < 2_000_000
    assert all(b".py" not in file.read_bytes() for file in files)
    assert {file.name for file in MODELS.glob("*/1/*")} == {"model.onnx"}


def test_reading_the_pictures_needs_neither_torch_nor_scikit_learn():
    code = "import sys, pictures; pictures.load_pairs(); sys.exit(any(m in sys.modules for m in ('torch', 'sklearn')))"
    subprocess.run([sys.executable, "-c", code], cwd=EXAMPLE, check=True)
