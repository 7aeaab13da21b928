"""Files that an untrusted file names: only those inside the folder it speaks for are read."""

from __future__ import annotations

from pathlib import Path


def inside(folder: Path, location: str) -> Path | None:
    """The path of a relative location, or None where it is not inside `folder`; whether it exists is not asked.

    Symbolic links are followed, so a link inside the folder that leads out of it is seen as what it is.
    """
    stated = Path(location)
    if "\0" in location or stated.is_absolute() or ".." in stated.parts:
        return None
    try:
        root = folder.resolve()
        path = (root / stated).resolve()
    except (OSError, RuntimeError):  # links in a circle
        return None
    return path if path.is_relative_to(root) else None
