"""What callers pass, checked before the graph is read: their mistakes are TypeErrors, and not told as the graph's."""

from __future__ import annotations

from collections.abc import Iterable

import onnx


def check_model(model: object) -> None:
    """Raises TypeError for anything but a model, such as its path."""
    check_type("model", model, onnx.ModelProto, "an onnx.ModelProto, as onnx.load returns it")


def check_type(argument: str, value: object, kind: type, described: str) -> None:
    """Raises TypeError where the value of `argument` is not of `kind`, which is `described` with its article."""
    if not isinstance(value, kind):
        raise TypeError(f"{argument} must be {described}, not {type(value).__name__}")


def tensor_names(argument: str, names: Iterable[str]) -> tuple[str, ...]:
    """The names, each once.

    Raises TypeError for a lone str, which is a sequence of letters, and for what is no sequence of str; ValueError for
    bytes in it, as which protobuf gives the names of a malformed graph that are no text.
    """
    if isinstance(names, str | bytes) or not isinstance(names, Iterable):
        raise TypeError(f"{argument} must be a sequence of tensor names, such as ['x'], not {type(names).__name__}")
    given = tuple(names)
    for name in given:
        if isinstance(name, bytes):
            raise ValueError(f"{argument} holds {name!r}, which is no text")
        check_type(f"every name in {argument}", name, str, "a str")
    return tuple(dict.fromkeys(given))
