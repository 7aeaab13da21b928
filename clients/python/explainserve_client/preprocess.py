"""Images to the tensors that a model takes, as its signature states, and boxes between the two.

model = (pixel x scale - mean) / std per channel, where scale maps 0..255 onto the input's value range. Nothing is
resized or cropped unless asked for, and what was done is kept as `Geometry`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explainserve_client.errors import RequestTypeError, RequestValueError
from explainserve_client.models import InputSpec, ModelInfo, Preprocessing, ValueRange
from explainserve_client.regions import Box
from explainserve_client.tensors import Array, is_float

Pixels = NDArray[np.float64]
_OPAQUE = 255


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the model's input lies over the image: input = image x scale - offset, along each axis.

    Attributes:
        image_height, image_width: extent of the image as it was given.
        input_height, input_width: extent of the model's input.
        scale_y, scale_x: resized extent / image extent.
        offset_y, offset_x: rows and columns of the resized image that were cropped away before the input.
    """

    image_height: int
    image_width: int
    input_height: int
    input_width: int
    scale_y: float = 1.0
    scale_x: float = 1.0
    offset_y: int = 0
    offset_x: int = 0

    def to_input(self, box: Box) -> Box:
        """A box of the image in the model's input, edges rounded to the nearest element and clipped to the input.

        Raises:
            RequestValueError: nothing of the box is in the input.
        """
        left, right = (edge * self.scale_x - self.offset_x for edge in (box.x, box.x + box.width))
        top, bottom = (edge * self.scale_y - self.offset_y for edge in (box.y, box.y + box.height))
        return _box(
            left, top, right, bottom, self.input_width, self.input_height, f"{box} lies outside the model's input"
        )

    def to_image(self, box: Box) -> Box:
        """A box of the model's input in the image, edges rounded to the nearest pixel and clipped to the image.

        Raises:
            RequestValueError: nothing of the box is in the image.
        """
        left, right = ((edge + self.offset_x) / self.scale_x for edge in (box.x, box.x + box.width))
        top, bottom = ((edge + self.offset_y) / self.scale_y for edge in (box.y, box.y + box.height))
        return _box(left, top, right, bottom, self.image_width, self.image_height, f"{box} lies outside the image")


@dataclass(frozen=True, slots=True, eq=False)
class Preprocessed:
    """One instance in MODEL space, without the batch axis, and how it lies over the image."""

    tensor: Array
    geometry: Geometry

    def __repr__(self) -> str:
        return f"<Preprocessed {self.tensor.dtype}{list(self.tensor.shape)}, {self.geometry}>"


def image_input(info: ModelInfo, name: str | None = None) -> InputSpec:
    """The named input, or the only one that is laid out as an image.

    Raises:
        RequestValueError: there is none, or several.
    """
    if name is not None:
        return info.inputs[name]
    images = [spec for spec in info.inputs.values() if {"H", "W"} <= set(spec.layout)]
    if len(images) != 1:
        stated = ", ".join(f"{spec.name} {spec.layout or 'without layout'}" for spec in info.inputs.values())
        raise RequestValueError(f"name the input: not one input is laid out as an image: {stated}")
    return images[0]


def preprocess(
    image: Any, spec: InputSpec, *, resize: str | int | None = None, crop: str | None = None
) -> Preprocessed:
    """Turns an image into an instance of an input.

    Args:
        image: array [height, width] or [height, width, channels] with values in 0..255 (RGB where there are three
            channels), or, where pillow is installed, a PIL image or a path. Files are turned as their EXIF orientation
            says. Gray is repeated where the model takes three channels; nothing else is converted silently.
        spec: the input, from `ModelInfo.inputs`.
        resize: None; "stretch" to the input's size, aspect ratio lost; "shortest" to the smallest size that covers the
            input, aspect ratio kept; or a number of pixels for the shorter side. Bilinear, with antialiasing.
        crop: None, or "center" to cut the input's size out of the middle.

    Raises:
        RequestValueError: the signature states no layout or preprocessing, sizes differ and neither resize nor crop
        makes them
            equal, channels differ, values outside 0..255.
        RequestTypeError: not an image.
    """
    value_range, preprocessing = _stated(spec)
    pixels = _match_channels(_pixels(image), spec)
    height, width = pixels.shape[:2]
    resized = _resized(pixels, spec, resize)
    fitted, offset_y, offset_x = _cropped(resized, spec, crop)
    geometry = Geometry(
        image_height=height,
        image_width=width,
        input_height=fitted.shape[0],
        input_width=fitted.shape[1],
        scale_y=resized.shape[0] / height,
        scale_x=resized.shape[1] / width,
        offset_y=offset_y,
        offset_x=offset_x,
    )
    values = value_range.low + fitted * ((value_range.high - value_range.low) / 255)
    model = (values[..., _channel_positions(spec, fitted.shape[2])] - _mean(preprocessing)) / _std(preprocessing)
    return Preprocessed(_laid_out(model, spec), geometry)


def to_pixels(tensor: Array, spec: InputSpec) -> Pixels:
    """The inverse for one instance: pixels [height, width, channels] in 0..255, RGB order, float64, not clipped.

    Raises:
        RequestValueError: the signature states no layout or preprocessing.
    """
    value_range, preprocessing = _stated(spec)
    letters = _letters(spec)
    order = [letters.index(letter) for letter in "HWC" if letter in letters]
    image = np.transpose(np.asarray(tensor, np.float64), order)
    image = image if "C" in letters else image[..., np.newaxis]
    values = image * _std(preprocessing) + _mean(preprocessing)
    pixels = (values - value_range.low) * (255 / (value_range.high - value_range.low))
    return np.asarray(pixels[..., np.argsort(_channel_positions(spec, image.shape[2]))])


def _stated(spec: InputSpec) -> tuple[ValueRange, Preprocessing]:
    if spec.value_range is None or spec.preprocessing is None:
        raise RequestValueError(
            f"input {spec.name!r} states no preprocessing (value range, mean and std), so pixels have no meaning for it"
        )
    return spec.value_range, spec.preprocessing


def _letters(spec: InputSpec) -> str:
    letters = spec.instance_layout
    if sorted(letters) not in (["C", "H", "W"], ["H", "W"]):
        raise RequestValueError(f"input {spec.name!r} has layout {spec.layout or 'not stated'}, which is no image")
    return letters


def _extent(spec: InputSpec, letter: str) -> int | None:
    """Extent of a lettered axis; None where any is accepted."""
    instance = spec.shape[1:] if spec.batch_axis is not None else spec.shape
    letters = _letters(spec)
    return instance[letters.index(letter)] if letter in letters else 1


def _mean(preprocessing: Preprocessing) -> Pixels:
    return np.asarray(preprocessing.mean or (0.0,), np.float64)


def _std(preprocessing: Preprocessing) -> Pixels:
    return np.asarray(preprocessing.std or (1.0,), np.float64)


def _channel_positions(spec: InputSpec, count: int) -> list[int]:
    """For each channel of the model its position in the image, which is RGB."""
    if count == 3 and sorted(spec.channel_order) == ["B", "G", "R"]:
        return ["RGB".index(letter) for letter in spec.channel_order]
    return list(range(count))


def _pixels(image: Any) -> Pixels:
    """[height, width, channels], float64, 0..255."""
    array = np.asarray(_decoded(image))
    if array.dtype.kind not in "uif" or array.ndim not in (2, 3) or not array.size:
        raise RequestTypeError(
            f"an image is numbers [height, width] or [height, width, channels], not {array.dtype}{array.shape}"
        )
    pixels = array.astype(np.float64)
    if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 255:
        raise RequestValueError(f"pixels are finite and in 0..255, not in {pixels.min()}..{pixels.max()}")
    return pixels if pixels.ndim == 3 else pixels[..., np.newaxis]


def _decoded(image: Any) -> Any:
    """Opens paths and PIL images, where pillow is there; anything else as it is."""
    if isinstance(image, (str, os.PathLike)):
        from PIL import Image, ImageOps

        with Image.open(image) as file:
            return _decoded(ImageOps.exif_transpose(file))
    if not hasattr(image, "getbands"):
        return image
    return image if image.mode in ("L", "RGB", "RGBA") else image.convert("L" if image.mode == "1" else "RGB")


def _match_channels(pixels: Pixels, spec: InputSpec) -> Pixels:
    count, wanted = pixels.shape[2], _extent(spec, "C")
    if count == 4 and wanted == 3 and (pixels[..., 3] == _OPAQUE).all():
        return pixels[..., :3]
    if count == 1 and wanted == 3:
        return np.repeat(pixels, 3, axis=2)
    if wanted is not None and count != wanted:
        raise RequestValueError(f"the image has {count} channels, input {spec.name!r} takes {wanted}")
    return pixels


def _resized(pixels: Pixels, spec: InputSpec, resize: str | int | None) -> Pixels:
    if resize is None:
        return pixels
    height, width = _new_size(pixels.shape[0], pixels.shape[1], spec, resize)
    down = _triangle_weights(pixels.shape[0], height)
    across = _triangle_weights(pixels.shape[1], width)
    return np.asarray(np.einsum("yh,xw,hwc->yxc", down, across, pixels, optimize=True))


def _new_size(height: int, width: int, spec: InputSpec, resize: str | int) -> tuple[int, int]:
    if isinstance(resize, int) and not isinstance(resize, bool):
        scale = resize / min(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))
    wanted_height, wanted_width = _extent(spec, "H"), _extent(spec, "W")
    if resize not in ("stretch", "shortest"):
        raise RequestValueError(f"resize is None, 'stretch', 'shortest' or a number of pixels, not {resize!r}")
    if wanted_height is None or wanted_width is None:
        raise RequestValueError(f"input {spec.name!r} accepts any size: resize to a number of pixels, not {resize!r}")
    if resize == "stretch":
        return wanted_height, wanted_width
    scale = max(wanted_height / height, wanted_width / width)
    return max(wanted_height, round(height * scale)), max(wanted_width, round(width * scale))


def _triangle_weights(size: int, new_size: int) -> Pixels:
    """Bilinear interpolation along one axis, [new_size, size], rows summing to 1.

    Where the image shrinks the triangle is widened by the same factor, so that every pixel counts (antialiasing).
    """
    step = size / new_size
    centers = (np.arange(new_size) + 0.5) * step
    distance = np.abs(np.arange(size) + 0.5 - centers[:, np.newaxis]) / max(step, 1.0)
    weights = np.maximum(1.0 - distance, 0.0)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _cropped(pixels: Pixels, spec: InputSpec, crop: str | None) -> tuple[Pixels, int, int]:
    """The input's size out of the image, with the rows and columns that were cut before it."""
    if crop not in (None, "center"):
        raise RequestValueError(f"crop is None or 'center', not {crop!r}")
    height, width = pixels.shape[:2]
    wanted_height, wanted_width = _extent(spec, "H") or height, _extent(spec, "W") or width
    too_small = height < wanted_height or width < wanted_width
    if (height, width) != (wanted_height, wanted_width) and (crop is None or too_small):
        raise RequestValueError(
            f"the image is {height} high and {width} wide here, input {spec.name!r} takes {wanted_height} and "
            f"{wanted_width}; nothing is resized silently: ask for resize='stretch', resize='shortest' with "
            "crop='center', or crop='center'"
        )
    top, left = (height - wanted_height) // 2, (width - wanted_width) // 2
    return pixels[top : top + wanted_height, left : left + wanted_width], top, left


def _laid_out(image: Pixels, spec: InputSpec) -> Array:
    """[height, width, channels] in the axes and element type of the input."""
    letters = _letters(spec)
    plane = image if "C" in letters else image[..., 0]
    axes = "HWC" if "C" in letters else "HW"
    values = np.transpose(plane, [axes.index(letter) for letter in letters])
    rounded = values if is_float(spec.dtype) else np.rint(values)
    return np.ascontiguousarray(rounded, "float32" if spec.dtype == "bfloat16" else spec.dtype)


def _box(left: float, top: float, right: float, bottom: float, width: int, height: int, error: str) -> Box:
    x, y = max(0, _nearest(left)), max(0, _nearest(top))
    x_end, y_end = min(width, _nearest(right)), min(height, _nearest(bottom))
    if x_end <= x or y_end <= y:
        raise RequestValueError(error)
    return Box(x, y, x_end - x, y_end - y)


def _nearest(value: float) -> int:
    return math.floor(value + 0.5)
