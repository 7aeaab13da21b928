"""Models written in all three formats, and a server of them: for tests that compare formats over a real connection."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explainserve.settings import Settings
from explainserve_client import Client
from models import FORMATS, MODELS, ModelCase, write_model
from rpc.loopback import Loopback

ROOT = Path(__file__).parents[1]
for folder in ("examples/two_digits", "benchmarks"):
    sys.path.insert(0, str(ROOT / folder))

Array = NDArray[Any]
Writer = Callable[[str, Path], None]
"""Writes `folder/model.toml` and the model file of a format below `folder/1`."""


def tiny(case: ModelCase) -> Writer:
    """Writes a model of `models`."""

    def write(file_format: str, folder: Path) -> None:
        with TemporaryDirectory() as place:
            write_model(case, file_format, Path(place))
            shutil.copytree(Path(place) / case.name, folder)

    return write


def two_digits(file_format: str, folder: Path) -> None:
    """Writes the trained network of the demo."""
    import export
    from network import load_weights

    (folder / "1").mkdir(parents=True)
    (folder / "model.toml").write_text(export.MODEL_TOML, encoding="utf-8")
    writers = {"onnx": export.write_onnx, "pt2": export.write_pt2, "pt": export.write_torchscript}
    writers[file_format](load_weights(), folder / "1" / f"model.{file_format}")


WRITERS: dict[str, Writer] = {
    "conv": tiny(MODELS["conv"]),
    "transformer": tiny(MODELS["transformer"]),
    "two-digits": two_digits,
}
"""The networks that are compared with torch."""


@contextmanager
def serving(folder: Path, writers: dict[str, Writer], formats: Iterable[str] = FORMATS) -> Iterator[Client]:
    """A client of a server that holds each model once per format, as NAME-FORMAT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of TorchScript, and what its exporters do
        for name, write in writers.items():
            for file_format in formats:
                _place(name, write, file_format, folder)
    brief = {"trial_seconds": 0, "warm_up_seconds": 0}  # deep networks load for minutes otherwise
    server = Loopback(Settings(models=folder, port=0, http_port=0, thread_count=2, **brief))
    try:
        with Client(server.address, timeout=240) as client:
            yield client
    finally:
        server.stop()


def _place(name: str, write: Writer, file_format: str, folder: Path) -> None:
    """Exports take seconds: a file is written once per session, beside the folders that are served."""
    written = folder.parent / f"written-{name}-{file_format}"
    if not written.exists():
        write(file_format, written)
    shutil.copytree(written, folder / f"{name}-{file_format}")


def module_and_input(name: str) -> tuple[Any, Array]:
    """A network of WRITERS as a torch module, and an instance of it."""
    if name in MODELS:
        return MODELS[name].module(), MODELS[name].instance(1)["x"]
    from network import load_weights, normalized
    from pictures import load_pairs

    return load_weights(), normalized(load_pairs()[0].picture.image[None])[0].numpy()


def relative(actual: Array, expected: Array) -> float:
    """Relative L2 distance."""
    expected = np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
