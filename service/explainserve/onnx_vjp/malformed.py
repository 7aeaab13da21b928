"""Graphs that break the rules of ONNX: whatever trips over them, callers get one kind of error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onnx import checker, defs, shape_inference

BROKEN_RULES = (checker.ValidationError, defs.SchemaError, shape_inference.InferenceError)
"""What ONNX's own checks raise of a graph that breaks its rules."""

UNREADABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What reading a graph raises that is not what its operators allow, and what a mistake of ours may raise as well."""

MALFORMED = (*BROKEN_RULES, *UNREADABLE)


@contextmanager
def malformed_as_value_error() -> Iterator[None]:
    """Turns what a malformed graph raises into ValueError. Only the graph is to be read inside: what callers pass is
    checked before (arguments.py).
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError("the graph is malformed: it holds names that are no text") from error
    except ValueError:
        raise
    except BROKEN_RULES as error:
        raise ValueError(f"the graph is malformed ({type(error).__name__}: {error})") from error
    except UNREADABLE as error:
        raise ValueError(
            f"the graph cannot be read ({type(error).__name__}: {error}); "
            "where onnx.checker.check_model(model, full_check=True) accepts it, this is a bug"
        ) from error
