"""Fingerprints: equal for equal values, different for all others."""

from __future__ import annotations

import enum
from dataclasses import dataclass, make_dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from explainserve.fingerprint import fingerprint

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4).map(tuple) | st.dictionaries(st.text(), inner, max_size=4)
)


class Color(enum.Enum):
    RED = 1
    ALSO_ONE = "1"


@dataclass(frozen=True, eq=False)
class Box:
    width: int
    content: object = None


def described(value: object) -> object:
    """Equal exactly where type and value of every part are."""
    if isinstance(value, tuple):
        return tuple(map(described, value))
    if isinstance(value, dict):
        return {name: described(part) for name, part in value.items()}
    return type(value), repr(value)


@given(VALUES, VALUES)
def test_equal_for_equal_values_and_for_no_others(first: object, second: object) -> None:
    assert (fingerprint(first) == fingerprint(second)) == (described(first) == described(second))


@given(st.dictionaries(st.text(), LEAVES))
def test_the_order_of_a_mapping_says_nothing(mapping: dict[str, Any]) -> None:
    assert fingerprint(dict(reversed(mapping.items()))) == fingerprint(mapping)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1, 1.0),
        (1, True),
        ("1", 1),
        ("a", b"a"),
        (None, "None"),
        ((), {}),
        (("ab",), ("a", "b")),
        ((("a",), "b"), (("a", "b"),)),
        (0.1, np.nextafter(0.1, 1).item()),
        (Color.RED, 1),
        (Color.RED, Color.ALSO_ONE),
        (Box(1), Box(2)),
        (Box(1), make_dataclass("Case", ["width", "content"])(1, None)),
        (Box(1), make_dataclass("Box", ["width", "content", "added"])(1, None, 0)),
        (Box(1, Box(2)), Box(1, (2, None))),
        (np.dtype("f4"), np.dtype("f8")),
        (np.zeros(2, np.float32), np.zeros(2, np.int32)),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.zeros(()), np.zeros(1)),
        (np.zeros(1), -np.zeros(1)),
        (np.zeros((0, 2)), np.zeros((0, 3))),
    ],
)
def test_what_differs(first: object, second: object) -> None:
    assert fingerprint(first) != fingerprint(second)


def test_arrays_count_by_their_elements_not_by_where_they_lie() -> None:
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)

    assert fingerprint(Box(1, whole[::2, 1:4])) == fingerprint(Box(1, whole[::2, 1:4].copy()))


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array([object()]), Box(1, [print])])
def test_what_has_no_fingerprint_is_refused(value: object) -> None:
    """A part that is passed over would make different values equal."""
    with pytest.raises(TypeError):
        fingerprint(value)
