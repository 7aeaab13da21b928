"""Files that are named stay inside their folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from explainserve.containment import inside


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file and links beside a secret that is not in it."""
    own = tmp_path / "folder"
    (own / "data").mkdir(parents=True)
    (own / "data" / "file").write_text("")
    (tmp_path / "secret").write_text("")
    (tmp_path / "folder2").mkdir()
    (own / "near").symlink_to("data/file")
    (own / "far").symlink_to(tmp_path / "secret")
    (own / "out").symlink_to("..")
    (own / "circle").symlink_to("circle")
    return own


@pytest.mark.parametrize("location", ["data/file", "./data/file", "near", "missing", "", "data/far.."])
def test_what_is_inside_is_found(folder: Path, location: str) -> None:
    assert inside(folder, location) == (folder / location).resolve()


@pytest.mark.parametrize(
    "location",
    [
        "../secret",
        "data/../../secret",
        "data/../near",
        "/etc/hostname",
        "far",
        "out/secret",
        "../folder2",
        "circle",
        "a\0b",
    ],
)
def test_what_is_not_is_none(folder: Path, location: str) -> None:
    assert inside(folder, location) is None


def test_a_folder_behind_a_link_is_itself(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)

    assert inside(tmp_path / "link", "data/file") == folder.resolve() / "data" / "file"
