"""How many gradients a rule needs to reach an error: curves of one picture and network, kept between runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from contestants import CAPTUM_RULES, Ask, Rule, Worker
from subjects import Subject, Task

Array = NDArray[Any]
Curve = list[tuple[int, float]]
"""(rows, relative L2 error of the map)."""

GRID = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
COARSE = (8, 16, 32, 64, 128)
"""For heavy networks."""

REFERENCE, COARSE_REFERENCE = 1024, 384
"""Midpoints of the map that errors are distances to."""


class Accuracy:
    """Errors of maps of one picture.

    Args:
        place: folder where they are kept.
        grid: numbers of rows.
        reference: midpoints of the map that errors are distances to.

    Attributes:
        curves: of Captum, by rule.
    """

    def __init__(
        self, place: Path, task: Task, picture: int, captum: Worker, grid: Sequence[int], reference: int
    ) -> None:
        here = slice(picture, picture + 1)
        self._ask = lambda rule: Ask(task.instances[here], task.targets[here], rule)
        self._captum = captum
        self._place = place
        self._reference = self._kept(f"reference-{reference}", lambda: self._map(Rule("midpoint", reference)))
        self.curves = {rule: self._curve(rule, grid) for rule in CAPTUM_RULES}

    def error(self, found: Array) -> float:
        """Relative L2 distance of the whole map to the reference."""
        return float(np.linalg.norm(found - self._reference) / np.linalg.norm(self._reference))

    def rows_to(self, error: float, rule: str) -> int | None:
        """Fewest rows of Captum; None where its largest number does not reach the error."""
        return rows_to(self.curves[rule], error)

    def _curve(self, rule: str, grid: Sequence[int]) -> Curve:
        errors = self._kept(
            f"{rule}-{len(grid)}", lambda: np.array([self.error(self._map(Rule(rule, n))) for n in grid])
        )
        return list(zip(grid, errors.tolist(), strict=True))

    def _map(self, rule: Rule) -> Array:
        ((maps, _),) = self._captum.explain([self._ask(rule)])
        return maps[0].astype(np.float64)

    def _kept(self, name: str, make: Callable[[], Array]) -> Array:
        path = self._place / f"{name}.npy"
        if not path.exists():
            self._place.mkdir(parents=True, exist_ok=True)
            np.save(path, make())
        return np.load(path)


def kept(cache: Path, subject: Subject, task: Task, picture: int) -> Path:
    """Where errors are kept: another folder for another model file, picture, baseline or target."""
    digest = hashlib.sha256(json.dumps([task.targets[picture], task.score]).encode())
    for array in (task.instances[picture], task.baseline):
        digest.update(array.tobytes())
    for path in sorted(subject.folder.glob("*/*/1/model.*")):
        digest.update(path.read_bytes())
    return cache / "curves" / f"{subject.name}-{digest.hexdigest()[:12]}"


def rows_to(curve: Curve, error: float) -> int | None:
    """Fewest rows that reach an error, between measured points on a straight line in logarithms."""
    before: tuple[int, float] | None = None
    for n, found in curve:
        if found <= error:
            if before is None:
                return n
            share = np.log(before[1] / error) / np.log(before[1] / found)
            return int(np.ceil(np.exp(np.log(before[0]) + share * np.log(n / before[0])) - 1e-9))
        before = n, found
    return None
