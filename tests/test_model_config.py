"""model.toml: what is valid, and how it completes what a file says of itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from explainserve.errors import ModelRefused
from explainserve.model_config import ModelConfig, read_model_config
from explainserve.signature import Activation, Axis, InputSpec, OutputKind, OutputSpec, Signature

FLOAT = np.dtype(np.float32)
FOUND = Signature(
    (InputSpec("x", FLOAT, (Axis("n"), Axis("", 3), Axis("", 8), Axis("", 8))),),
    (OutputSpec("y", FLOAT, (Axis("n"), Axis("", 4))),),
)
SIMPLEST = """
[[inputs]]
name = "x"
dtype = "float32"
shape = ["batch", 3, 8, 8]
layout = "NCHW"
[[outputs]]
name = "y"
kind = "logits"
shape = ["batch", 4]
"""


def read(tmp_path: Path, text: str) -> ModelConfig:
    (tmp_path / "model.toml").write_text(text, encoding="utf-8")
    return read_model_config(tmp_path / "model.toml")


def with_input(line: str) -> str:
    return SIMPLEST.replace('layout = "NCHW"', f'layout = "NCHW"\n{line}')


def with_output(line: str) -> str:
    return f"{SIMPLEST}{line}\n"


def test_the_simplest_file_completes_the_signature(tmp_path: Path) -> None:
    signature = read(tmp_path, SIMPLEST).signature(FOUND)

    assert signature.inputs[0].channel_axis == 0
    assert signature.inputs[0].spatial_axes == (1, 2)
    assert signature.outputs[0].kind is OutputKind.LOGITS
    assert signature.outputs[0].activation is Activation.SOFTMAX
    assert signature.outputs[0].class_axis == 1


def test_a_missing_file_leaves_the_signature_as_it_is(tmp_path: Path) -> None:
    assert read_model_config(tmp_path / "model.toml").signature(FOUND) == FOUND


def test_a_file_that_tells_nothing_is_described_by_the_configuration_alone(tmp_path: Path) -> None:
    signature = read(tmp_path, SIMPLEST).signature(None)

    assert [axis.size for axis in signature.inputs[0].axes] == [None, 3, 8, 8]
    assert signature.inputs[0].batched
    assert signature.outputs[0].dtype == FLOAT


@pytest.mark.parametrize("text", ["", '[[inputs]]\nname = "x"\nshape = ["batch", 3]', '[[outputs]]\nname = "y"'])
def test_what_neither_tells_is_incomplete(tmp_path: Path, text: str) -> None:
    with pytest.raises(ModelRefused) as caught:
        read(tmp_path, text).signature(None)
    assert caught.value.reason == "SIGNATURE_INCOMPLETE"


def test_preprocessing_is_per_channel_or_one_for_all(tmp_path: Path) -> None:
    text = with_input("value_range = [0, 255]\nmean = [1, 2, 3]\nstd = [2, 2, 2]")
    spec = read(tmp_path, text).signature(FOUND).inputs[0]

    np.testing.assert_allclose(spec.pixel_value(255), [127.0, 126.5, 126.0])
    assert read(tmp_path, with_input("mean = [1]\nstd = [2]")).signature(FOUND).inputs[0].mean == (1.0,)


def test_labels_are_a_list_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\nüber\nfox\n", encoding="utf-8")
    from_file = read(tmp_path, with_output('labels = "labels.txt"')).signature(FOUND).outputs[0]
    from_list = read(tmp_path, with_output('labels = ["cat", "dog", "über", "fox"]')).signature(FOUND).outputs[0]

    assert from_file.labels == from_list.labels == ("cat", "dog", "über", "fox")


@pytest.mark.parametrize(
    ("stated", "found", "size", "batched"),
    [
        ('["batch", 3]', Axis("n"), None, True),
        ('["batch", 3]', Axis("", 1), 1, True),
        ("[1, 3]", Axis("n"), 1, True),
        ("[5, 3]", Axis("n"), 5, False),
        ('["rows", 3]', Axis("", 5), 5, False),
    ],
)
def test_the_batch_axis_is_a_first_axis_that_is_free_or_one(
    tmp_path: Path, stated: str, found: Axis, size: int | None, batched: bool
) -> None:
    file = Signature((InputSpec("x", FLOAT, (found, Axis("", 3)), batched=found.size in (None, 1)),), FOUND.outputs)
    spec = read(tmp_path, f'[[inputs]]\nname = "x"\nshape = {stated}').signature(file).inputs[0]

    assert (spec.axes[0].size, spec.batched) == (size, batched)


@pytest.mark.parametrize(
    "text",
    [
        "inputs = 3",
        "[[inputs]\n",
        '[[inputs]]\nname = "x"\ncolour = "RGB"',
        with_input("mean = [0.5]"),
        with_input("mean = [0.5]\nstd = [0.0]"),
        with_input("mean = []\nstd = []"),
        with_input("mean = [nan]\nstd = [1.0]"),
        with_input("mean = [0.0]\nstd = [inf]"),
        with_input("value_range = [1.0, 1.0]"),
        with_input("value_range = [0.0, inf]"),
        with_input("value_range = [0.0]"),
        SIMPLEST.replace("NCHW", "NCH"),
        SIMPLEST.replace("NCHW", "nchw"),
        SIMPLEST.replace("float32", "bfloat16"),
        SIMPLEST.replace('["batch", 3, 8, 8]', '["batch", 0, 8, 8]'),
        SIMPLEST.replace('["batch", 3, 8, 8]', '["batch", -1, 8, 8]'),
        SIMPLEST.replace("logits", "scores"),
        with_output('labels = "missing.txt"'),
        with_output('[[outputs]]\nname = "y"'),
        with_output('labels = "../labels.txt"'),
        with_output('labels = "/etc/hostname"'),
        with_output('labels = "a\\u0000b"'),
        with_output("class_axis = true"),
        'sha256 = "abc"',
        "default_target = true",
        "default_target = 1.0",
        "[limits]\nmax_batch_rows = true",
        '[[inputs]]\nname = "x"\nshape = [true, 3]',
        '[baselines.b]\nfiles = {x = "/secret.npy"}',
        '[baselines.b]\nfiles = {x = "../secret.npy"}',
        "[limits]\nmax_step_count = 0",
    ],
)
def test_what_is_not_valid_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ModelRefused) as caught:
        read(tmp_path, text)
    assert caught.value.reason == "CONFIG_INVALID"
    assert "model.toml" in caught.value.message


def test_labels_and_baselines_stay_in_the_folder_of_the_configuration(tmp_path: Path) -> None:
    """The file named exists and is valid, so that only its place can be what is refused."""
    own = tmp_path / "own"
    own.mkdir()
    (tmp_path / "labels.txt").write_text("cat\ndog\nbee\nfox\n")
    np.save(tmp_path / "secret.npy", np.zeros((3, 8, 8), np.float32))
    (own / "link.txt").symlink_to(tmp_path / "labels.txt")
    (own / "link.npy").symlink_to(tmp_path / "secret.npy")
    stated = {
        "../labels.txt": with_output('labels = "../labels.txt"'),
        "link.txt": with_output('labels = "link.txt"'),
        "../secret.npy": '[baselines.b]\nfiles = {x = "../secret.npy"}',
        "link.npy": '[baselines.b]\nfiles = {x = "link.npy"}',
    }
    for name, text in stated.items():
        with pytest.raises(ModelRefused) as caught:
            read(own, text)
        assert caught.value.reason == "CONFIG_INVALID"
        assert caught.value.metadata["locations"] == name


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "model.toml").write_text(SIMPLEST)
    monkeypatch.setattr(Path, "read_text", forbidden)
    with pytest.raises(ModelRefused) as caught:
        read_model_config(tmp_path / "model.toml")
    assert caught.value.reason == "CONFIG_INVALID"


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelRefused) as caught:
        read_model_config(tmp_path / "model.toml")
    assert caught.value.reason == "CONFIG_INVALID"


@pytest.mark.parametrize(("dtype", "stated"), [("int64", "[0.2, 0.8]"), ("uint8", "[256, 300]"), ("bool", "[2, 3]")])
def test_a_range_without_a_number_of_the_type_is_refused(tmp_path: Path, dtype: str, stated: str) -> None:
    file = Signature((InputSpec("x", np.dtype(dtype), (Axis("n"), Axis("", 3))),), FOUND.outputs)
    with pytest.raises(ModelRefused) as caught:
        read(tmp_path, f'[[inputs]]\nname = "x"\nvalue_range = {stated}').signature(file)
    assert caught.value.reason == "CONFIG_MISMATCH"


@pytest.mark.parametrize(
    "text",
    [
        SIMPLEST.replace('name = "x"', 'name = "image"'),
        SIMPLEST.replace('name = "y"', 'name = "logits"'),
        SIMPLEST.replace("float32", "float64"),
        SIMPLEST.replace('["batch", 3, 8, 8]', '["batch", 1, 8, 8]'),
        SIMPLEST.replace('["batch", 3, 8, 8]', '["batch", 3, 8]').replace("NCHW", "NCL"),
        SIMPLEST.replace('shape = ["batch", 3, 8, 8]\n', "").replace("NCHW", "NCL"),
        with_input("mean = [1, 2]\nstd = [1, 2]"),
        with_output('labels = ["cat", "dog"]'),
        with_output("class_axis = 0"),
        with_output("class_axis = 2"),
    ],
)
def test_what_contradicts_the_file_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ModelRefused) as caught:
        read(tmp_path, text).signature(FOUND)
    assert caught.value.reason == "CONFIG_MISMATCH"
