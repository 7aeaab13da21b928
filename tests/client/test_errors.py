"""The error tree, and how a failed call is read."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Sequence

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from explainserve_client import errors
from explainserve_client.errors import ServerError, server_error


class FailedCall(grpc.RpcError):
    """What grpc raises: the call itself."""

    def __init__(self, code: grpc.StatusCode, trailing: Sequence[tuple[str, str | bytes]] | None = ()) -> None:
        self._code, self._trailing = code, trailing

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "what happened"

    def trailing_metadata(self) -> Sequence[tuple[str, str | bytes]] | None:
        return self._trailing


def details(*messages: object) -> tuple[str, bytes]:
    status = status_pb2.Status()
    for message in messages:
        packed = any_pb2.Any()
        packed.Pack(message)
        status.details.append(packed)
    return ("grpc-status-details-bin", status.SerializeToString())


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_code_has_a_class_or_is_a_plain_server_error(code: grpc.StatusCode) -> None:
    error = server_error(FailedCall(code), "id")
    by_code = {name.upper(): kind for name, kind in vars(errors).items() if inspect.isclass(kind)}

    assert error.code == code.name
    assert type(error) is by_code.get(code.name.replace("_", ""), ServerError)


def test_the_error_info_is_found_among_other_details() -> None:
    info = error_details_pb2.ErrorInfo(reason="INPUT_SHAPE_MISMATCH", metadata={"input": "image", "expected": "1"})
    trailing = [details(error_details_pb2.RetryInfo(), info), ("x-request-id", "theirs")]
    error = server_error(FailedCall(grpc.StatusCode.INVALID_ARGUMENT, trailing), "ours")

    assert error.reason == "INPUT_SHAPE_MISMATCH"
    assert error.metadata == {"input": "image", "expected": "1"}
    assert error.request_id == "theirs"
    assert str(error) == "INVALID_ARGUMENT INPUT_SHAPE_MISMATCH: what happened (request theirs)"


@pytest.mark.parametrize(
    "trailing", [None, (), [("grpc-status-details-bin", b"\xff\xff\xff")], [details(error_details_pb2.RetryInfo())]]
)
def test_without_readable_details_the_code_and_sentence_remain(
    trailing: Sequence[tuple[str, str | bytes]] | None,
) -> None:
    error = server_error(FailedCall(grpc.StatusCode.UNAVAILABLE, trailing), "ours")

    assert (error.code, error.message, error.reason, error.metadata) == ("UNAVAILABLE", "what happened", "", {})
    assert error.request_id == "ours"


def test_the_time_to_try_again_is_told() -> None:
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(2500)
    info = error_details_pb2.ErrorInfo(reason="QUEUE_FULL")
    full = server_error(FailedCall(grpc.StatusCode.RESOURCE_EXHAUSTED, [details(info, retry)]), "id")
    capped = server_error(FailedCall(grpc.StatusCode.RESOURCE_EXHAUSTED, [details(info)]), "id")

    assert (full.reason, full.retry_after_seconds) == ("QUEUE_FULL", 2.5)
    assert capped.retry_after_seconds is None


def test_errors_survive_pickling() -> None:
    error = errors.ResourceExhausted("full", "RESOURCE_EXHAUSTED", "QUEUE_FULL", {"bound": "rows"}, "id", 1.5)
    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is errors.ResourceExhausted
    assert vars(copy) == vars(error)


def test_the_docstring_shows_the_tree() -> None:
    """Names and indentation of the module's docstring are the class hierarchy."""
    shown = re.findall(r"^ {4}( *)(\+- )?(\w+)(?: \(also (\w+)\))?(?:  .*)?$", errors.__doc__ or "", re.MULTILINE)
    tree = {name: (len(indent + branch), other) for indent, branch, name, other in shown}
    classes = {
        name: kind
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, errors.ExplainServeError)
    }

    assert set(tree) == set(classes)
    for name, (_, other) in tree.items():
        assert not other or other in [base.__name__ for base in classes[name].__mro__]
    root, below_root, below_server = sorted({indent for indent, _ in tree.values()})
    parents = {root: Exception, below_root: errors.ExplainServeError, below_server: ServerError}
    assert all(classes[name].__base__ is parents[indent] for name, (indent, _) in tree.items())
