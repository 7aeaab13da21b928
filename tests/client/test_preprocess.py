"""Images to model space and boxes between the two: formulas, geometry and refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from explainserve_client import (
    Axis,
    Box,
    Geometry,
    InputSpec,
    ModelInfo,
    Preprocessing,
    RequestTypeError,
    RequestValueError,
    Table,
    ValueRange,
)
from explainserve_client.preprocess import image_input, preprocess, to_pixels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTO = np.random.default_rng(3).integers(0, 256, (12, 10, 3), dtype=np.uint8)


def spec(layout: str = "NCHW", **options: Any) -> InputSpec:
    """A 12 x 10 image input of three channels."""
    sizes = {"N": None, "C": 3, "H": 12, "W": 10}
    return InputSpec(
        **{
            "name": "image",
            "dtype": "float32",
            "axes": tuple(Axis(letter, sizes[letter]) for letter in layout),
            "layout": layout,
            "batch_axis": 0 if layout[0] == "N" else None,
            "channel_axis": layout.index("C") if "C" in layout else None,
            "value_range": ValueRange(0, 1),
            "preprocessing": Preprocessing(MEAN, STD),
            "differentiable": True,
            **options,
        }
    )


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "CHW", "HWC"])
@pytest.mark.parametrize("order", ["", "RGB", "BGR"])
@pytest.mark.parametrize("low_high", [(0, 1), (-1, 1), (0, 255)])
def test_the_formula_per_channel_layout_and_order(layout: str, order: str, low_high: tuple[float, float]) -> None:
    found = preprocess(PHOTO, spec(layout, channel_order=order, value_range=ValueRange(*low_high))).tensor

    assert found.dtype == np.float32
    low, high = low_high
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        pixel = PHOTO[..., 2 - channel if order == "BGR" else channel].astype(np.float64)
        expected = (low + pixel / 255 * (high - low) - mean) / std
        plane = found[channel] if layout.endswith("CHW") else found[..., channel]
        np.testing.assert_allclose(plane, expected, rtol=1e-6, atol=1e-5)


def test_one_mean_and_std_serve_all_channels_and_none_means_no_change() -> None:
    one = preprocess(PHOTO, spec(preprocessing=Preprocessing((0.5,), (0.25,)))).tensor
    none = preprocess(PHOTO, spec(preprocessing=Preprocessing((), ()))).tensor

    np.testing.assert_allclose(one, (none - 0.5) / 0.25, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(none, PHOTO.transpose(2, 0, 1) / 255, rtol=1e-6)


def test_a_plane_without_channel_axis() -> None:
    gray = spec("NHW", preprocessing=Preprocessing((), ()))

    np.testing.assert_allclose(preprocess(PHOTO[..., 0], gray).tensor, PHOTO[..., 0] / 255, rtol=1e-6)


def test_an_integer_input_takes_the_pixels_themselves() -> None:
    raw = spec(dtype="uint8", value_range=ValueRange(0, 255), preprocessing=Preprocessing((), ()))

    assert np.array_equal(preprocess(PHOTO, raw).tensor, PHOTO.transpose(2, 0, 1))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_pixels_come_back(layout: str, order: str) -> None:
    stated = spec(layout, channel_order=order)

    np.testing.assert_allclose(to_pixels(preprocess(PHOTO, stated).tensor, stated), PHOTO, atol=1e-3)


def test_gray_is_repeated_and_an_opaque_alpha_dropped() -> None:
    gray = preprocess(PHOTO[..., 0], spec()).tensor
    opaque = np.dstack([PHOTO, np.full(PHOTO.shape[:2], 255, np.uint8)])

    assert np.array_equal(gray, preprocess(np.repeat(PHOTO[..., :1], 3, axis=2), spec()).tensor)
    assert np.array_equal(preprocess(opaque, spec()).tensor, preprocess(PHOTO, spec()).tensor)


@pytest.mark.parametrize("image", [np.dstack([PHOTO, PHOTO[..., :1] // 2]), PHOTO[..., :2]])
def test_other_channels_are_refused(image: np.ndarray) -> None:
    with pytest.raises(RequestValueError, match=rf"{image.shape[2]} channels, input 'image' takes 3"):
        preprocess(image, spec())


@pytest.mark.parametrize("image", [PHOTO.astype(float) * 2, PHOTO - 300.0, np.full((12, 10, 3), np.nan)])
def test_values_that_are_no_pixels_are_refused(image: np.ndarray) -> None:
    with pytest.raises(RequestValueError, match=r"0\.\.255"):
        preprocess(image, spec())


@pytest.mark.parametrize("image", [np.zeros((2, 2), bool), np.zeros(5), np.zeros((1, 2, 3, 4)), np.zeros((0, 3))])
def test_what_is_no_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(RequestTypeError, match="an image is numbers"):
        preprocess(image, spec())


@pytest.mark.parametrize("missing", ["value_range", "preprocessing"])
def test_a_model_that_states_no_preprocessing_is_refused(missing: str) -> None:
    with pytest.raises(RequestValueError, match="states no preprocessing"):
        preprocess(PHOTO, dataclasses.replace(spec(), **{missing: None}))


@pytest.mark.parametrize("layout", ["", "NCL"])
def test_an_input_that_is_no_image_is_refused(layout: str) -> None:
    with pytest.raises(RequestValueError, match="which is no image"):
        preprocess(PHOTO, dataclasses.replace(spec(), layout=layout))


class TestSize:
    """Nothing is resized or cropped unless asked for."""

    @pytest.mark.parametrize("shape", [(12, 11), (13, 10), (6, 5), (24, 20)])
    def test_another_size_is_refused(self, shape: tuple[int, int]) -> None:
        with pytest.raises(
            RequestValueError, match=r"here, input 'image' takes 12 and 10; nothing is resized silently"
        ):
            preprocess(np.zeros((*shape, 3)), spec())

    def test_stretch(self) -> None:
        found = preprocess(np.zeros((24, 40, 3)), spec(), resize="stretch")

        assert found.tensor.shape == (3, 12, 10)
        assert (found.geometry.scale_y, found.geometry.scale_x) == (0.5, 0.25)

    def test_shortest_covers_the_input_and_needs_a_crop(self) -> None:
        wide = np.zeros((24, 40, 3))
        with pytest.raises(RequestValueError, match="12 high and 20 wide here"):
            preprocess(wide, spec(), resize="shortest")
        found = preprocess(wide, spec(), resize="shortest", crop="center")

        assert found.tensor.shape == (3, 12, 10)
        assert (found.geometry.scale_y, found.geometry.offset_x, found.geometry.offset_y) == (0.5, 5, 0)

    def test_a_number_of_pixels_for_the_shorter_side(self) -> None:
        found = preprocess(np.zeros((32, 64, 3)), spec(), resize=16, crop="center")

        assert found.tensor.shape == (3, 12, 10)
        assert (found.geometry.offset_y, found.geometry.offset_x) == (2, 11)

    def test_center_crop_keeps_the_middle(self) -> None:
        large = np.random.default_rng(0).integers(0, 256, (16, 14, 3))
        found = preprocess(large, spec(), crop="center")

        assert np.array_equal(found.tensor, preprocess(large[2:14, 2:12], spec()).tensor)

    def test_a_crop_does_not_enlarge(self) -> None:
        with pytest.raises(RequestValueError, match="11 high"):
            preprocess(np.zeros((11, 20, 3)), spec(), crop="center")

    def test_an_input_of_any_size_takes_the_image_as_it_is(self) -> None:
        anything = spec(axes=(Axis("n", None), Axis("c", 3), Axis("h", None), Axis("w", None)))

        assert preprocess(np.zeros((7, 9, 3)), anything).tensor.shape == (3, 7, 9)
        with pytest.raises(RequestValueError, match="accepts any size"):
            preprocess(np.zeros((7, 9, 3)), anything, resize="stretch")

    @pytest.mark.parametrize("options", [{"resize": "fill"}, {"crop": "left"}, {"resize": True}])
    def test_unknown_words_are_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(RequestValueError, match="not "):
            preprocess(PHOTO, spec(), **options)

    @pytest.mark.parametrize("shape", [(48, 40), (7, 5), (31, 10), (12, 64)])
    def test_bilinear_with_antialiasing_as_pillow_does_it(self, shape: tuple[int, int]) -> None:
        image = np.random.default_rng(1).uniform(0, 255, shape).astype(np.float32)
        plain = spec("NHW", preprocessing=Preprocessing((), ()), value_range=ValueRange(0, 255))
        expected = Image.fromarray(image).resize((10, 12), Image.Resampling.BILINEAR)

        found = preprocess(image, plain, resize="stretch").tensor

        np.testing.assert_allclose(found, np.asarray(expected), atol=0.05)

    def test_a_constant_stays_constant(self) -> None:
        found = preprocess(np.full((31, 57, 3), 77), spec(preprocessing=Preprocessing((), ())), resize="stretch")

        np.testing.assert_allclose(found.tensor, 77 / 255, rtol=1e-6)


class TestGeometry:
    """Boxes of the image in the model's input, and back."""

    sides = st.integers(1, 300)
    boxes = st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(1, 100), st.integers(1, 100)).map(
        lambda numbers: Box(
            numbers[0], numbers[1], min(numbers[2], 100 - numbers[0]), min(numbers[3], 100 - numbers[1])
        )
    )

    @given(box=boxes, height=st.integers(100, 400), width=st.integers(100, 400))
    def test_enlarged_boxes_come_back_exactly(self, box: Box, height: int, width: int) -> None:
        geometry = Geometry(100, 100, height, width, height / 100, width / 100)

        assert geometry.to_image(geometry.to_input(box)) == box

    @given(box=boxes, top=st.integers(0, 50), left=st.integers(0, 50))
    def test_a_crop_shifts_and_clips(self, box: Box, top: int, left: int) -> None:
        geometry = Geometry(100, 100, 50, 50, offset_y=top, offset_x=left)
        mask = np.zeros((100, 100), bool)
        mask[box.y : box.y + box.height, box.x : box.x + box.width] = True
        cropped = mask[top : top + 50, left : left + 50]

        if not cropped.any():
            with pytest.raises(RequestValueError, match="outside the model's input"):
                geometry.to_input(box)
        else:
            found = geometry.to_input(box)
            expected = np.zeros((50, 50), bool)
            expected[found.y : found.y + found.height, found.x : found.x + found.width] = True
            assert np.array_equal(cropped, expected)
            assert geometry.to_input(geometry.to_image(found)) == found

    @given(box=boxes, height=sides, width=sides)
    def test_a_stretched_box_is_off_by_at_most_half_an_element(self, box: Box, height: int, width: int) -> None:
        geometry = Geometry(100, 100, height, width, height / 100, width / 100)
        try:
            found = geometry.to_input(box)
        except RequestValueError:
            assert min(box.width * width, box.height * height) <= 100  # thinner than an element of the input
            return

        assert abs(found.x - box.x * width / 100) <= 0.5 + 1e-9
        assert abs(found.y + found.height - (box.y + box.height) * height / 100) <= 0.5 + 1e-9

    def test_a_box_follows_the_content(self) -> None:
        image = np.zeros((48, 80, 3))
        box = Box(24, 8, 16, 12)
        image[box.y : box.y + box.height, box.x : box.x + box.width] = 255
        found = preprocess(image, spec(preprocessing=Preprocessing((), ())), resize="shortest", crop="center")
        inner = found.geometry.to_input(box)
        content = np.zeros((12, 10), bool)
        content[inner.y : inner.y + inner.height, inner.x : inner.x + inner.width] = True

        assert np.array_equal(found.tensor[0] > 0.5, content)


class TestPillow:
    """Images and files of pillow."""

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "P", "L", "1"])
    def test_modes(self, mode: str) -> None:
        picture = Image.fromarray(PHOTO).convert(mode)
        plain = picture.convert("L" if mode == "1" else mode if mode == "L" else "RGB")

        assert np.array_equal(preprocess(picture, spec()).tensor, preprocess(np.asarray(plain), spec()).tensor)

    def test_a_path(self, tmp_path: Path) -> None:
        Image.fromarray(PHOTO).save(tmp_path / "photo.png")

        for path in (tmp_path / "photo.png", str(tmp_path / "photo.png")):
            assert np.array_equal(preprocess(path, spec()).tensor, preprocess(PHOTO, spec()).tensor)

    def test_a_file_is_turned_as_its_orientation_says(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # shown after a quarter turn clockwise
        lying = np.rot90(PHOTO)  # a quarter turn counter-clockwise
        Image.fromarray(np.ascontiguousarray(lying)).save(tmp_path / "turned.png", exif=exif)

        assert np.array_equal(preprocess(tmp_path / "turned.png", spec()).tensor, preprocess(PHOTO, spec()).tensor)


def test_the_image_input_is_found_by_its_layout(info: ModelInfo, several_inputs: ModelInfo) -> None:
    assert image_input(info).name == image_input(several_inputs).name == "image"
    assert image_input(several_inputs, "mask").name == "mask"
    with pytest.raises(KeyError, match="no input 'picture'"):
        image_input(info, "picture")
    flat = Table("input", [("table", dataclasses.replace(spec(), name="table", layout=""))])
    with pytest.raises(RequestValueError, match="table without layout"):
        image_input(dataclasses.replace(info, inputs=flat))
