"""Every error that the service raises on purpose.

    ExplainServeError
     ├── InvalidRequest       the request is malformed or does not fit the model       INVALID_ARGUMENT
     ├── NotFound             no such model, version, label or named thing             NOT_FOUND
     ├── Unsupported          the model lacks the capability that is asked for         FAILED_PRECONDITION
     ├── Unimplemented        the server does not have this yet                        UNIMPLEMENTED
     ├── LimitExceeded        above a cap: it never succeeds                           RESOURCE_EXHAUSTED
     ├── TryLater
     │    ├── QueueFull       the server has no room now                               RESOURCE_EXHAUSTED
     │    └── NotReady        what is asked for still loads                            UNAVAILABLE
     ├── DeadlineExceeded     time ran out before an answer existed                    DEADLINE_EXCEEDED
     ├── Cancelled            the caller went away                                     CANCELLED
     ├── ShuttingDown         the server no longer admits requests                     UNAVAILABLE
     ├── EvaluationFailed     the model raised while it was evaluated                  INTERNAL
     └── ModelRefused         a model file cannot be served (reported in ListModels)   FAILED_PRECONDITION

Each carries an UPPER_SNAKE `reason` and `metadata` that a program can read. `rpc/status.py` translates the classes
to gRPC status codes, in one table; anything else that is raised is a bug and becomes INTERNAL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

SHORTEST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 60.0

_MAX_LINE = 500
"""Characters that are quoted of an exception which a library raised."""

_SOURCE_PLACE = re.compile(  # a path, and the signature that onnxruntime writes behind it; or the name of a file
    r"/\S+\.(?:cc|cpp|cu|h):\d+ (?:[^()]*\((?:[^()]|\([^()]*\))*\)(?: const)?(?: \[with [^\]]*\])? )?"
    r"|\b\w+\.(?:cc|cpp|cu|h):\d+ "
)
"""Where in its own sources a library raised, which says nothing about a file."""

_OUT_OF_MEMORY = (
    "array is too big",
    "maximum allowed dimension exceeded",
    "bad_alloc",
    "bad allocation",
    "failed to allocate memory",
    "out of memory",
    "allocate memory: you tried to allocate",
    "cannot allocate memory",
    "_alloc_failed",  # cuBLAS, cuDNN, cuFFT: for workspaces, where torch and onnxruntime find no words of their own
    "_allocation_failed",  # cuDNN 9
)


class ExplainServeError(Exception):
    """Base of the tree above.

    Args:
        reason: UPPER_SNAKE identifier, stable across releases.
        message: one sentence for people.
        metadata: names and values for programs; values are converted to str.

    Attributes:
        retry_after_seconds: when to try again; None where trying again is no help.
    """

    retry_after_seconds: float | None = None

    def __init__(self, reason: str, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = {name: str(value) for name, value in metadata.items()}


class InvalidRequest(ExplainServeError):
    """The request is malformed or does not fit the model."""


class NotFound(ExplainServeError):
    """No model, version or named thing of that name."""


class Unsupported(ExplainServeError):
    """The model lacks the capability that is asked for."""


class Unimplemented(ExplainServeError):
    """The server does not have this yet."""


class LimitExceeded(ExplainServeError):
    """The request is above a cap; it never succeeds."""


class TryLater(ExplainServeError):
    """Trying again later helps.

    Args:
        retry_after_seconds: until it does, as far as is known; told within bounds.
    """

    def __init__(self, reason: str, message: str, retry_after_seconds: float, **metadata: object) -> None:
        super().__init__(reason, message, **metadata)
        self.retry_after_seconds = min(max(retry_after_seconds, SHORTEST_RETRY_SECONDS), LONGEST_RETRY_SECONDS)


class QueueFull(TryLater):
    """The server has no room for one more request now."""


class NotReady(TryLater):
    """What is asked for still loads."""


class DeadlineExceeded(ExplainServeError):
    """Time ran out before an answer existed."""


class Cancelled(ExplainServeError):
    """The caller went away; its work was dropped."""


class ShuttingDown(ExplainServeError):
    """The server no longer admits requests."""


class EvaluationFailed(ExplainServeError):
    """The model raised while it was evaluated."""


class ModelRefused(ExplainServeError):
    """A model file cannot be served; the others are."""

    @classmethod
    def told(cls, reason: str, message: str, metadata: Mapping[str, str]) -> ModelRefused:
        """A refusal that was raised in another process."""
        refusal = cls(reason, message)
        refusal.metadata.update(metadata)
        return refusal


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; libraries say so in words of their own."""
    told = str(error).lower()
    return isinstance(error, MemoryError) or any(words in told for words in _OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    """What an exception says, short enough for a status: its first line, or the one below a trace of torch's, without
    places in the sources of a library.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("RuntimeError:", "torch.jit.Error:"))]
    return _SOURCE_PLACE.sub("", (told or lines or [type(error).__name__])[0])[:_MAX_LINE]
