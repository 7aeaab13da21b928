"""Errors become codes in one table, and details stay small."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from explainserve import errors
from explainserve.rpc import status

CLASSES = [
    own
    for _, own in inspect.getmembers(errors, inspect.isclass)
    if issubclass(own, errors.ExplainServeError) and not own.__subclasses__()
]
"""Those that are raised: the others gather them."""


def rich(error: Exception) -> tuple[status_pb2.Status, error_details_pb2.ErrorInfo]:
    """The status as a client unpacks it."""
    ((key, data),) = status.status(error).trailing_metadata
    assert key == "grpc-status-details-bin"
    message = status_pb2.Status.FromString(data)
    info = error_details_pb2.ErrorInfo()
    detail, *_ = message.details
    assert detail.Unpack(info)
    return message, info


@pytest.mark.parametrize("own", CLASSES)
def test_every_class_has_a_code(own: type[errors.ExplainServeError]) -> None:
    assert own in status.CODES
    arguments = [1.0] if issubclass(own, errors.TryLater) else []
    assert status.code(own("REASON", "text", *arguments)) is status.CODES[own]


@pytest.mark.parametrize("own", CLASSES)
def test_docstring_shows_the_code(own: type[errors.ExplainServeError]) -> None:
    (line,) = (line for line in (errors.__doc__ or "").splitlines() if re.search(rf" {own.__name__} ", line))

    assert line.split()[-1] == status.CODES[own].name


def test_reason_and_metadata_travel() -> None:
    message, info = rich(errors.InvalidRequest("SHAPE_MISMATCH", "wrong shape", input="x", expected=[1, 2], actual=3))

    assert message.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert message.message == "wrong shape"
    assert (info.domain, info.reason) == ("explainserve", "SHAPE_MISMATCH")
    assert info.metadata == {"input": "x", "expected": "[1, 2]", "actual": "3"}


def test_time_to_try_again_travels() -> None:
    message, info = rich(errors.QueueFull("QUEUE_FULL", "full", 2.5, bound="rows"))
    retry = error_details_pb2.RetryInfo()

    assert info.metadata == {"bound": "rows"}
    assert message.details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 2500
    assert len(rich(errors.LimitExceeded("TOO_MANY_PARTS", "never"))[0].details) == 1


@pytest.mark.parametrize("length", [1, 5000])
def test_what_is_no_character_is_written_out(length: int) -> None:
    """Names of files come as surrogates where their bytes are no UTF-8."""
    name = "\udcff" * length
    message, info = rich(errors.NotFound("UNKNOWN_MODEL", f"no model {name}", model=name, count=length))

    assert "\\udcff" in message.message
    assert info.metadata["model"].startswith("\\udcff")


def test_bug_tells_nothing_of_itself() -> None:
    message, info = rich(KeyError("/secret/path"))

    assert message.code == grpc.StatusCode.INTERNAL.value[0]
    assert info.reason == "INTERNAL"
    assert "secret" not in message.message


texts = st.text(st.characters(exclude_categories=[]), max_size=40).map(lambda text: text * 400)


@given(message=texts, values=st.dictionaries(st.from_regex("[a-z_]{1,20}", fullmatch=True), texts, max_size=12))
def test_details_stay_below_their_limit(message: str, values: dict[str, str]) -> None:
    """Whatever is named: details in all, and all that travels beside them, in the encodings of the wire."""
    values = {name: value for name, value in values.items() if name not in ("self", "reason", "message")}
    error = errors.NotFound("UNKNOWN_THING", message, **values)
    answer = status.status(error)
    ((_, data),) = answer.trailing_metadata

    assert len(data) <= status.MAX_DETAIL_BYTES
    percent_encoded = sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in answer.details.encode())
    base64 = -(-len(data) // 3) * 4
    assert percent_encoded + base64 < 8192
    assert rich(error)[1].reason == "UNKNOWN_THING"


def test_short_values_survive_long_ones() -> None:
    long = "n" * 9000
    _, info = rich(errors.NotFound("UNKNOWN_MODEL", long, model=long, models=long, versions=long, others=long, count=3))

    assert info.metadata["count"] == "3"


# docs/errors.md

ROOT = Path(__file__).parents[2]
CODE_OF = {own.__name__: code.name for own, code in status.CODES.items()}


@dataclass
class Reason:
    """What is known of a reason: codes it travels with, and names in its metadata."""

    codes: set[str] = field(default_factory=set)
    metadata: set[str] = field(default_factory=set)


def rows(columns: int) -> list[list[str]]:
    """Rows of the tables with that many columns, without their headings."""
    lines = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| `")]
    return [row for row in cells if len(row) == columns]


def documented() -> dict[str, Reason]:
    """Reasons that requests get."""
    return {row[0].strip("`"): Reason({row[1]}, set(re.findall("`([^`]+)`", row[3]))) for row in rows(4)}


def raised(*, refused_models: bool) -> dict[str, Reason]:
    """Every construction of an error in the sources; INTERNAL stands for bugs."""
    found: dict[str, Reason] = {} if refused_models else {"INTERNAL": Reason({"INTERNAL"})}
    for call in constructions():
        assert isinstance(call.func, ast.Name)
        if (call.func.id == "ModelRefused") == refused_models:
            for constant in ast.walk(call.args[0]):
                if isinstance(constant, ast.Constant):
                    own = found.setdefault(constant.value, Reason())
                    own.codes.add(CODE_OF[call.func.id])
                    own.metadata |= {keyword.arg for keyword in call.keywords if keyword.arg}
    return found


def constructions() -> Iterator[ast.Call]:
    service = ROOT / "service" / "explainserve"
    for path in service.rglob("*.py"):
        if path != service / "errors.py" and service / "v1" not in path.parents:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CODE_OF:
                    yield node


def test_every_reason_is_spelled_out_where_it_is_raised() -> None:
    """Else neither this test nor a person finds it."""
    for call in constructions():
        spelled = [node.value for node in ast.walk(call.args[0]) if isinstance(node, ast.Constant)]
        assert spelled and all(re.fullmatch("[A-Z][A-Z0-9]*(_[A-Z0-9]+)*", text) for text in spelled), ast.unparse(call)


def test_reasons_of_requests_are_documented() -> None:
    known, used = documented(), raised(refused_models=False)

    assert len(known) == len(rows(4)), "a reason stands twice"
    assert known.keys() == used.keys()
    for reason, own in known.items():
        assert own.codes == used[reason].codes, reason
        assert own.metadata == used[reason].metadata, reason


def test_reasons_of_refused_models_are_documented() -> None:
    known = [row[0].strip("`") for row in rows(2)]

    assert sorted(known) == sorted(raised(refused_models=True))
