"""What is measured: networks of this folder, and models that somebody names on the command line.

A subject is a model folder that we serve, and where there is one a torch module of the same function for Captum.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

import networks
import trained
from explainserve_client import Client, ModelInfo

HERE = Path(__file__).parent
FORMATS = {"onnx": "ONNX", "pt2": ".pt2", "pt": "TorchScript"}
SUFFIXES = {".onnx": "onnx", ".pt2": "pt2", ".pt": "pt", ".ts": "pt"}
SOURCES = ("networks.py", "trained.py")

RANDOM: dict[str, Callable[[], nn.Module]] = {
    "resnet50": networks.resnet50,
    "resnet18": networks.resnet18,
    "vgg16": networks.vgg16,
    "mobilenet_v2": networks.mobilenet_v2,
    "vit_small": networks.vit_small,
    "swin_tiny": networks.swin_tiny,
}
"""Networks with random weights at 224x224."""

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Subject:
    """One model.

    Attributes:
        folder: `folder/FORMAT` is served, a model folder with this model alone.
        formats: keys of FORMATS that there are; the first is the one that is compared.
        module: name of a network, or path of a file that torch loads; None where Captum has nothing to run.
    """

    name: str
    folder: Path
    formats: tuple[str, ...]
    module: str | Path | None


@dataclass(frozen=True, eq=False)
class Task:
    """What is asked of a subject.

    Attributes:
        instances: shape (count, *instance shape), float32.
        baseline: shape of one instance.
        targets: per instance the class that is explained; None where the output is one number.
        probability: whether the score is the probability of that class, not the output itself.
    """

    input: str
    instances: Array
    baseline: Array
    targets: tuple[int | None, ...]
    class_count: int
    probability: bool

    @property
    def score(self) -> str:
        """As requests name it."""
        return "PROBABILITY" if self.probability else "OUTPUT"


def subject(word: str, cache: Path, formats: Sequence[str] = tuple(FORMATS)) -> Subject:
    """A network by name, in these formats, or a model file or model folder by path.

    Raises:
        SystemExit: there is no such network or file.
    """
    if word in trained.RECIPES:
        side = trained.RECIPES[word].side
        options = {"classes": trained.CLASS_COUNT, "mean": trained.LEVEL, "std": trained.CONTRAST}
        folder = cache / f"models-{word}"
        _export(folder, word, lambda: trained.load_or_train(word, cache), formats, side, **options)
        return Subject(word, folder, tuple(formats), word)
    if word in RANDOM:
        folder = cache / f"models-{word}"
        _export(folder, word, RANDOM[word], formats, 224)
        return Subject(word, folder, tuple(formats), word)
    return _given(word, cache)


def module_of(subject: Subject, cache: Path) -> nn.Module | None:
    """The torch module, in evaluation mode and without parameter gradients; None where there is none."""
    source = subject.module
    if source is None:
        return None
    if isinstance(source, Path):
        return _read(source)
    return trained.load_or_train(source, cache) if source in trained.RECIPES else RANDOM[source]()


def task(subject: Subject, client: Client, count: int) -> Task:
    """Instances, baseline and targets: pictures and gray where the model is trained, else noise and zeros.

    Raises:
        SystemExit: the model has not one floating-point input of fixed shape, or no output [batch] or [batch, classes].
    """
    name = subject.name
    info = client.model(name)
    info.require_ready()
    source, shape, classes = _shapes(info)
    probability = next(iter(info.outputs.values())).kind == "LOGITS"
    if subject.name in trained.RECIPES:
        side = trained.RECIPES[subject.name].side
        instances, baseline = trained.explained_pictures(side), trained.gray(side)
    else:
        random = np.random.default_rng(0)
        instances, baseline = random.standard_normal((count, *shape)).astype(np.float32), np.zeros(shape, np.float32)
    targets: list[int | None] = [None] * len(instances)
    if classes:
        score = "PROBABILITY" if probability else None
        best = [client.predict(name, x, top_k=1, score=score).predictions[0].classes[0] for x in instances]
        order = np.argsort([-line.score for line in best], kind="stable")  # where the score saturates most
        instances, targets = instances[order], [best[index].index for index in order]
    return Task(source, instances[:count], baseline, tuple(targets[:count]), classes, probability)


def _shapes(info: ModelInfo) -> tuple[str, tuple[int, ...], int]:
    """Name and shape of the input, and number of classes, 0 where the output is one number per row."""
    moving = [spec for spec in info.inputs.values() if spec.differentiable]
    output = next(iter(info.outputs.values()))
    sizes = [axis.size for spec in moving for axis in spec.axes[1:]]
    if len(moving) != 1 or len(info.inputs) != 1 or None in sizes or len(output.axes) > 2:
        raise SystemExit(f"{info.name}: one float input of fixed shape and an output [batch, classes] are measured")
    classes = output.axes[1].size if output.axes[1:] else None
    return moving[0].name, tuple(size for size in sizes if size is not None), classes or 0


def cache_folder() -> Path:
    """Holds what follows from the sources of the networks and of torch; another folder when they change."""
    sources = b"".join((HERE / name).read_bytes() for name in SOURCES)
    folder = HERE / "cache" / hashlib.sha256(sources + torch.__version__.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _export(
    root: Path, name: str, build: Callable[[], nn.Module], formats: Sequence[str], side: int, **options: Any
) -> None:
    """Writes the network in every format, once."""
    for file_format in formats:
        folder = root / file_format / name
        if not (folder / "done").exists():
            print(f"exporting {name} as {FORMATS[file_format]}", flush=True)
            networks.write_model(build(), file_format, folder, side, **options)
            (folder / "done").touch()


def _given(word: str, cache: Path) -> Subject:
    """Files of one model, comma-separated: `model.onnx,model.pt` serves the first and gives Captum the second."""
    paths = [_model_file(Path(part)) for part in word.split(",")]
    name = paths[0].parent.parent.name if paths[0].stem == "model" else paths[0].stem
    file_format = SUFFIXES[paths[0].suffix]
    folder = cache / "given" / hashlib.sha256(word.encode()).hexdigest()[:12]
    shutil.rmtree(folder, ignore_errors=True)
    _copy(paths[0], folder / file_format / name)
    module = next((path for path in paths if path.suffix != ".onnx"), None)
    return Subject(name, folder, (file_format,), module)


def _model_file(path: Path) -> Path:
    """The file, or that of the highest version of a model folder."""
    files = sorted(path.glob("*/model.*"), key=lambda file: int(file.parent.name)) if path.is_dir() else [path]
    files = [file for file in files if file.suffix in SUFFIXES and file.is_file()]
    if not files:
        known = ", ".join((*trained.RECIPES, *RANDOM))
        raise SystemExit(f"{path} is no network of {known}, no model file and no model folder")
    return files[-1]


def _copy(path: Path, folder: Path) -> None:
    """A model file with its external data and the model.toml beside it or above it."""
    version = folder / "1"
    version.mkdir(parents=True)
    shutil.copy(path, version / f"model{path.suffix}")
    for name in _external_data(path) if path.suffix == ".onnx" else ():
        (version / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path.parent / name, version / name)
    for config in (path.parent.parent / "model.toml", path.parent / "model.toml"):
        if config.is_file():
            shutil.copy(config, folder / "model.toml")


def _external_data(path: Path) -> set[str]:
    weights = onnx.load(path, load_external_data=False).graph.initializer
    return {entry.value for weight in weights for entry in weight.external_data if entry.key == "location"}


def _read(path: Path) -> nn.Module:
    """A file of TorchScript or torch.export as a module; scripted ones lack `requires_grad_`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of TorchScript
        exported = path.suffix == ".pt2"
        net = torch.export.load(path).module() if exported else torch.jit.load(str(path)).eval()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    return net
