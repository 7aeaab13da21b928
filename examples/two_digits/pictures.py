"""Pictures of handwritten digits on a noisy gray background.

A picture is uint8, 64 x 64 x 3 (height, width, RGB). The digits are those of scikit-learn's `load_digits` (1,797 of
8 x 8 pixels), enlarged, tinted and laid as light ink on mid-gray. Composing needs numpy only; `digit_split`, which
reads the source digits, needs scikit-learn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SIDE = 64
CLASS_COUNT = 10
HELD_OUT_SHARE = 0.25
SPLIT_SEED = 1
WHOLE = (0, SIDE)
HALVES = ((0, SIDE // 2), (SIDE // 2, SIDE))
GLYPH_SIDES = (24, 30)
CONTRASTS = (0.2, 0.45)
NOISE_LEVELS = (0.0, 0.05)
INK_THRESHOLD = 0.05
PICTURES_FILE = Path(__file__).parent / "pictures.npz"

Image = NDArray[np.uint8]
Ink = NDArray[np.float64]


@dataclass(frozen=True)
class Digits:
    """Source digits: ink in [0, 1], shape (count, 8, 8), and their classes, shape (count,)."""

    inks: Ink
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Picture:
    """One image and a tight box (x, y, width, height), in pixels, around the ink of each of its digits."""

    image: Image
    boxes: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class Pair:
    """A picture of two digits of different classes: labels, and positions in their `Digits`, left and right."""

    picture: Picture
    labels: tuple[int, int]
    sources: tuple[int, int]


def digit_split() -> tuple[Digits, Digits]:
    """The digits to train on and the held-out ones: disjoint, drawn once with a fixed seed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(digits.target))
    held_out_count = round(HELD_OUT_SHARE * len(order))
    parts = order[held_out_count:], order[:held_out_count]
    training, held_out = (Digits(digits.images[part] / 16.0, digits.target[part].astype(np.int64)) for part in parts)
    return training, held_out


def compose(rng: np.random.Generator, inks: Sequence[Ink] = (), spans: Sequence[tuple[int, int]] = (WHOLE,)) -> Picture:
    """A picture with each 8 x 8 ink at a random place within its span of columns; without inks, background only."""
    canvas = _background(rng)
    boxes = []
    for ink, span in zip(inks, spans, strict=False):
        layer = _placed(rng, ink, span)
        tint = rng.uniform(0.85, 1.0, 3)
        canvas += rng.uniform(*CONTRASTS) * tint * layer[:, :, None]
        boxes.append(_tight_box(layer))
    return Picture(np.rint(255 * np.clip(canvas, 0, 1)).astype(np.uint8), tuple(boxes))


def single_pictures(rng: np.random.Generator, digits: Digits) -> NDArray[np.uint8]:
    """One picture per digit, that digit alone somewhere in it; shape (count, 64, 64, 3)."""
    return np.stack([compose(rng, [ink]).image for ink in digits.inks])


def empty_pictures(rng: np.random.Generator, count: int) -> NDArray[np.uint8]:
    """Backgrounds without a digit; shape (count, 64, 64, 3)."""
    return np.stack([compose(rng).image for _ in range(count)])


def pairs(rng: np.random.Generator, digits: Digits) -> Iterator[Pair]:
    """Endless pictures of two digits of different classes, the left one in the left half, the right in the right."""
    while True:
        left, right = (int(index) for index in rng.choice(len(digits.labels), 2, replace=False))
        if digits.labels[left] == digits.labels[right]:
            continue
        picture = compose(rng, [digits.inks[left], digits.inks[right]], HALVES)
        yield Pair(picture, (int(digits.labels[left]), int(digits.labels[right])), (left, right))


def save_pairs(path: Path, chosen: Sequence[Pair], candidate_count: int) -> None:
    """An npz of images (count, 64, 64, 3), labels (count, 2), boxes (count, 2, 4), sources (count, 2) and the count of
    candidates they were chosen from."""
    np.savez_compressed(
        path,
        images=np.stack([pair.picture.image for pair in chosen]),
        labels=np.array([pair.labels for pair in chosen]),
        boxes=np.array([pair.picture.boxes for pair in chosen]),
        sources=np.array([pair.sources for pair in chosen]),
        candidate_count=np.array(candidate_count),
    )


def load_pairs(path: Path = PICTURES_FILE) -> list[Pair]:
    """What `save_pairs` wrote; numpy is all it needs."""
    with np.load(path, allow_pickle=False) as saved:
        fields = (saved["images"], saved["labels"].tolist(), saved["boxes"].tolist(), saved["sources"].tolist())
    return [
        Pair(Picture(image, (tuple(boxes[0]), tuple(boxes[1]))), (labels[0], labels[1]), (sources[0], sources[1]))
        for image, labels, boxes, sources in zip(*fields, strict=True)
    ]


def _background(rng: np.random.Generator) -> NDArray[np.float64]:
    clouds = _enlarged(rng.normal(0, 1, (8, 8)), SIDE)[:, :, None]
    grain = rng.normal(0, 1, (SIDE, SIDE, 3))
    return 0.5 + rng.uniform(*NOISE_LEVELS) * (clouds + grain)


def _placed(rng: np.random.Generator, ink: Ink, span: tuple[int, int]) -> Ink:
    side = int(rng.integers(GLYPH_SIDES[0], GLYPH_SIDES[1] + 1))
    x = int(rng.integers(span[0], span[1] - side + 1))
    y = int(rng.integers(0, SIDE - side + 1))
    layer = np.zeros((SIDE, SIDE))
    layer[y : y + side, x : x + side] = _enlarged(ink, side)
    return layer


def _enlarged(small: Ink, side: int) -> Ink:
    """Bilinear, pixel centers aligned, edges held."""
    count = len(small)
    positions = np.clip((np.arange(side) + 0.5) * count / side - 0.5, 0, count - 1)
    weights = np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(count)))
    return np.asarray(weights @ small @ weights.T)


def _tight_box(layer: Ink) -> tuple[int, int, int, int]:
    rows, columns = (np.flatnonzero(np.any(layer > INK_THRESHOLD, axis=axis)) for axis in (1, 0))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1
