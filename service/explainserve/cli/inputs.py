"""INPUT arguments: images and .npy files, alone or as NAME=FILE, as instances of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from explainserve.cli.spellings import array

if TYPE_CHECKING:
    from explainserve_client import Box, Client, ModelInfo, Preprocessed, Region

_HINT = "INPUT"

InputsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT",
        show_default=False,
        help="An image file (needs pillow), a .npy file in model space with or without batch axis, or NAME=FILE for "
        "each input of a model with several. Several files for one input are several instances.",
    ),
]
ResizeOption = Annotated[
    str | None,
    typer.Option(
        "--resize",
        metavar="stretch|shortest|PIXELS",
        help="Resize images: to the input's size, aspect ratio lost; to cover it, aspect ratio kept; or to PIXELS on "
        "the shorter side. Without it nothing is resized.",
    ),
]
CropOption = Annotated[
    bool, typer.Option("--crop", help="Cut the input's size out of the middle of images, after --resize.")
]


@dataclass(frozen=True)
class Inputs:
    """Instances as typed, fitted to a model.

    Attributes:
        argument: what the client's calls take.
        images: by input name, the preprocessed images, one per instance.
        arrays: by input name, the other inputs, with the batch axis.
    """

    argument: Any
    images: Mapping[str, Sequence[Preprocessed]]
    arrays: Mapping[str, Any]

    def instance(self, name: str, index: int) -> Any:
        """One instance of an input, in model space, without the batch axis."""
        return self.images[name][index].tensor if name in self.images else self.arrays[name][index]

    def boxes(self, boxes: Mapping[str, Box], name: str, index: int) -> dict[str, Box]:
        """Boxes of an image in the model's input; those over an array as they are."""
        if name not in self.images:
            return dict(boxes)
        geometry = self.images[name][index].geometry
        return {label: geometry.to_input(box) for label, box in boxes.items()}

    def regions(self, boxes: Mapping[str, Box]) -> dict[str, Any]:
        """What the client takes: boxes of images are mapped onto the model's input, for each image on its own."""
        return {label: self._mapped(box) if self.images else box for label, box in boxes.items()}

    def _mapped(self, box: Box) -> list[Region]:
        from explainserve_client import Region

        return [
            Region(image.geometry.to_input(box), input=name, instance_index=index)
            for name, images in self.images.items()
            for index, image in enumerate(images)
        ]


def read_inputs(
    client: Client, info: ModelInfo, version: int | None, texts: Sequence[str], resize: str | None, crop: bool
) -> Inputs:
    """Reads the files and preprocesses the images as the signature says."""
    images: dict[str, list[Preprocessed]] = {}
    arrays: dict[str, Any] = {}
    for name, paths in _files(texts, info).items():
        arrays_only = {path.suffix == ".npy" for path in paths}
        if arrays_only == {True}:
            arrays[name] = _batch([array(path, _HINT) for path in paths], info.inputs[name].instance_rank)
        elif arrays_only == {False}:
            images[name] = [_image(client, info.name, version, name, path, resize, crop) for path in paths]
        else:
            raise typer.BadParameter("images and .npy files for one input cannot be mixed", param_hint=_HINT)
    return Inputs({**images, **arrays}, images, arrays)


def _files(texts: Sequence[str], info: ModelInfo) -> dict[str, list[Path]]:
    """Files by input name; a file without one belongs to the only input."""
    files: dict[str, list[Path]] = {}
    for text in texts:
        name, path = _named_file(text, info)
        if not path.is_file():
            raise typer.BadParameter(f"there is no file {str(path)!r}", param_hint=_HINT)
        files.setdefault(name, []).append(path)
    return files


def _named_file(text: str, info: ModelInfo) -> tuple[str, Path]:
    name, separator, file = text.partition("=")
    if separator and name in info.inputs and not Path(text).is_file():
        return name, Path(file)
    if len(info.inputs) != 1 or (separator and not Path(text).is_file()):
        message = f"{text!r}: expected NAME=FILE, where NAME is {' or '.join(info.inputs)}"
        raise typer.BadParameter(message, param_hint=_HINT)
    return next(iter(info.inputs)), Path(text)


def _batch(arrays: Sequence[Any], instance_rank: int) -> Any:
    """One array with the batch axis; ranks that fit neither are left to the client, which names both."""
    import numpy as np

    rows = [loaded[np.newaxis] if loaded.ndim == instance_rank else loaded for loaded in arrays]
    if len(rows) > 1 and len({row.shape[1:] for row in rows}) > 1:
        shapes = ", ".join(str(loaded.shape) for loaded in arrays)
        raise typer.BadParameter(f"the instances have different shapes: {shapes}", param_hint=_HINT)
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def _image(
    client: Client, model: str, version: int | None, name: str, path: Path, resize: str | None, crop: bool
) -> Preprocessed:
    size = int(resize) if resize is not None and resize.isdigit() else resize
    try:
        return client.preprocess(model, path, version=version, input=name, resize=size, crop="center" if crop else None)
    except ModuleNotFoundError as error:
        message = "reading images needs pillow, which is not installed; the extra is explainserve[draw]"
        raise typer.BadParameter(message, param_hint=_HINT) from error
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read as an image: {error}", param_hint=_HINT) from error
