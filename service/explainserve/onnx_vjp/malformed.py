"""Graphs that break the rules of ONNX: whatever trips over them, callers get one kind of error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onnx import checker, defs, shape_inference

MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    checker.ValidationError,
    defs.SchemaError,
    shape_inference.InferenceError,
)
"""What reading a graph raises that is not what its operators allow. Our own mistakes are AssertionErrors."""


@contextmanager
def malformed_as_value_error() -> Iterator[None]:
    """Turns what a malformed graph raises into ValueError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError("the graph is malformed: it holds names that are no text") from error
    except ValueError:
        raise
    except MALFORMED as error:
        raise ValueError(f"the graph is malformed ({type(error).__name__}: {error})") from error
