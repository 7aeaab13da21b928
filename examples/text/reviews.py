"""Short reviews from a small grammar, and the words of the model."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LABELS = ("negative", "positive")
PAD, UNKNOWN = 0, 1
VOCABULARY_FILE = Path(__file__).parent / "vocabulary.txt"

THINGS = ("food", "service", "room", "film", "music", "story", "staff", "price", "view", "ending")
GOOD = ("good", "great", "lovely", "excellent", "friendly", "wonderful", "charming", "superb")
BAD = ("bad", "awful", "dull", "terrible", "rude", "boring", "dirty", "poor")
NEUTRAL = ("long", "new", "small", "usual", "french", "late")
DEGREES = ("", "very", "really", "quite")


def draw_reviews(seed: int, count: int) -> tuple[list[str], NDArray[np.int64]]:
    """Reviews of one or two clauses that agree, and their labels (1 is positive). "not" turns a word around.

    Every second clause has no beginning, else the word before is as good a sign as "not" itself.
    """
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    return [_review(random, bool(label)) for label in labels], labels


def vocabulary() -> dict[str, int]:
    """Token ids by word, as the model was trained with; a line of the file for each."""
    return {word: position for position, word in enumerate(VOCABULARY_FILE.read_text(encoding="utf-8").split())}


def every_word() -> list[str]:
    """All words of the grammar, behind the pad token and the one of unknown words."""
    words = {"the", "a", "was", "not", "and", "with", *THINGS, *GOOD, *BAD, *NEUTRAL, *DEGREES[1:]}
    return ["[pad]", "[unknown]", *sorted(words)]


def encode(texts: list[str], words: dict[str, int]) -> NDArray[np.int64]:
    """Token ids (texts, longest), padded at the end."""
    rows = [[words.get(word, UNKNOWN) for word in text.lower().split()] for text in texts]
    ids = np.full((len(rows), max(map(len, rows))), PAD, np.int64)
    for row, own in zip(ids, rows, strict=True):
        row[: len(own)] = own
    return ids


def _review(random: np.random.Generator, positive: bool) -> str:
    clauses = [_clause(random, positive) for _ in range(random.integers(1, 3))]
    return " and ".join(clauses)


def _clause(random: np.random.Generator, positive: bool) -> str:
    turned = random.random() < 0.35
    words = ["the", random.choice(THINGS), "was"] if random.random() < 0.5 else []
    words += ["not"] if turned else []
    words += [degree] if (degree := random.choice(DEGREES)) else []
    words.append(random.choice(GOOD if positive != turned else BAD))
    words += ["with", "a", random.choice(NEUTRAL), random.choice(THINGS)] if random.random() < 0.3 else []
    return " ".join(words)
