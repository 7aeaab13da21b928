"""Patterns beside a model file: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from explainserve.backends import pattern_file
from explainserve.errors import ModelRefused
from explainserve.opening import model_files


def test_patterns_are_read_by_layer(tmp_path: Path) -> None:
    np.savez(tmp_path / "patterns.npz", hidden=np.arange(6.0).reshape(2, 3))
    found = pattern_file.read(tmp_path / "model.onnx")
    assert found.keys() == {"hidden"} and found["hidden"].dtype == np.float32
    np.testing.assert_array_equal(found["hidden"], [[0, 1, 2], [3, 4, 5]])


def test_a_model_without_an_archive_has_none(tmp_path: Path) -> None:
    assert pattern_file.read(tmp_path / "model.onnx") == {}


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    np.savez(tmp_path / "others.npz", hidden=np.ones(3))
    (folder / "patterns.npz").symlink_to(tmp_path / "others.npz")
    with pytest.raises(ModelRefused) as refused:
        pattern_file.read(folder / "model.onnx")
    assert refused.value.reason == "PATTERNS_ESCAPE"


@pytest.mark.parametrize(
    "values", [np.array([{}]), np.array(["a"]), np.array([np.nan]), b"no archive", b"PK\x03\x04 cut off", b""]
)
def test_what_is_no_archive_of_finite_numbers_is_refused(tmp_path: Path, values: np.ndarray | bytes) -> None:
    file = tmp_path / "patterns.npz"
    if isinstance(values, bytes):
        file.write_bytes(values)
    else:
        np.savez(file, hidden=values)
    with pytest.raises(ModelRefused) as refused:
        pattern_file.read(tmp_path / "model.onnx")
    assert refused.value.reason == "PATTERNS_UNREADABLE"


def test_the_patterns_beside_a_pt2_file_belong_to_the_model(tmp_path: Path) -> None:
    """Its sha256 covers them."""
    path, patterns = tmp_path / "model.pt2", tmp_path / "patterns.npz"
    assert model_files(path) == (path,)

    np.savez(patterns, hidden=np.ones(3))
    assert model_files(path) == (path, patterns)
