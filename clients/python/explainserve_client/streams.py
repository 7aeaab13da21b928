"""Events of a stream: what the server tells while it computes, and tensors that come in pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from explainserve.v1 import attribution_pb2, explainer_service_pb2, tensor_pb2
from explainserve_client.errors import MalformedResponseError
from explainserve_client.models import InputSpec
from explainserve_client.names import short_name
from explainserve_client.regions import AttributionSelector
from explainserve_client.results import Attribution, ExplainResult, Geometries, attribution_result, explain_result
from explainserve_client.tensors import byte_count


@dataclass(frozen=True, slots=True)
class Progress:
    """One path after a round of it.

    Attributes:
        position: the (method, instance, target, baseline).
        step_count, max_step_count: gradient evaluations so far, and at most.
        map_error: estimated relative L2 error of the map so far; None where the rule gives no estimate.
        convergence_delta: sum of the map so far minus (F(x) - F(x')); None where it is not finite.
        stop_reason: why the path ended, as in Attribution; "UNFINISHED" while it goes on.
        path_count: paths of the request: instances x targets x baselines.
    """

    position: AttributionSelector
    step_count: int
    max_step_count: int
    map_error: float | None
    convergence_delta: float | None
    stop_reason: str
    path_count: int

    @property
    def finished(self) -> bool:
        """Whether the path has ended."""
        return self.stop_reason != "UNFINISHED"

    @classmethod
    def from_proto(cls, message: explainer_service_pb2.Progress) -> Progress:
        """Reads the message."""
        where = message.position
        return cls(
            position=AttributionSelector(
                where.method_index, where.instance_index, where.target_index, where.baseline_index
            ),
            step_count=message.step_count,
            max_step_count=message.max_step_count,
            map_error=message.map_error if message.HasField("map_error") else None,
            convergence_delta=message.convergence_delta if message.HasField("convergence_delta") else None,
            stop_reason=short_name(attribution_pb2.StopReason, message.stop_reason),
            path_count=message.path_count,
        )


ExplainEvent = Progress | Attribution | ExplainResult
"""What a stream yields: progress, maps so far where asked for, and at the end the result."""


class Assembly:
    """Puts one stream together: a message comes out when the last piece of its tensors has come in.

    Args:
        inputs: of the model, by name.
        geometries: of the instances that the client preprocessed.
    """

    def __init__(self, inputs: Mapping[str, InputSpec], geometries: Geometries) -> None:
        self._inputs = inputs
        self._geometries = geometries
        self._partial: attribution_pb2.Attribution | None = None
        self._final: explainer_service_pb2.ExplainResponse | None = None
        self._awaited: deque[tensor_pb2.Tensor] = deque()
        self._bytes = bytearray()

    def add(self, message: explainer_service_pb2.ExplainStreamResponse) -> Progress | Attribution | None:
        """Takes a message; returns the event that is complete with it.

        Raises:
            MalformedResponseError: the pieces of a tensor do not follow each other.
        """
        kind = message.WhichOneof("event")
        if kind == "chunk":
            self._append(message.chunk)
        elif self._awaited:
            raise MalformedResponseError(f"{kind or 'an unknown event'} came before all pieces of a tensor")
        elif kind == "progress":
            return Progress.from_proto(message.progress)
        elif kind == "partial":
            self._partial = message.partial
            self._awaited.extend(_in_pieces(_tensors_of_map(message.partial)))
        elif kind == "final":
            self._final = message.final
            self._awaited.extend(_in_pieces(_tensors(message.final)))
        return self._complete_map()

    def result(self, request_id: str) -> ExplainResult:
        """The final result, after the last message.

        Raises:
            MalformedResponseError: the stream ended before it was complete.
        """
        if self._final is None or self._awaited:
            raise MalformedResponseError("the stream ended before the result was complete")
        return explain_result(self._final, self._geometries, request_id)

    def _append(self, chunk: explainer_service_pb2.TensorChunk) -> None:
        if not self._awaited or (chunk.chunk_key, chunk.offset) != (self._awaited[0].chunk_key, len(self._bytes)):
            raise MalformedResponseError(f"a piece of tensor {chunk.chunk_key} at {chunk.offset} came out of turn")
        self._bytes += chunk.data
        if len(self._bytes) >= byte_count(self._awaited[0]):
            self._awaited.popleft().data = bytes(self._bytes)
            self._bytes.clear()

    def _complete_map(self) -> Attribution | None:
        if self._partial is None or self._awaited:
            return None
        complete, self._partial = self._partial, None
        return attribution_result(complete, self._inputs, self._geometries)


def _in_pieces(tensors: Iterator[tensor_pb2.Tensor]) -> Iterator[tensor_pb2.Tensor]:
    return (tensor for tensor in tensors if tensor.HasField("chunk_key"))


def _tensors(response: explainer_service_pb2.ExplainResponse) -> Iterator[tensor_pb2.Tensor]:
    for attribution in response.attributions:
        yield from _tensors_of_map(attribution)
    for baseline in response.baselines:
        yield from (own.tensor for own in baseline.inputs)


def _tensors_of_map(attribution: attribution_pb2.Attribution) -> Iterator[tensor_pb2.Tensor]:
    for own in attribution.inputs:
        yield from (own.tensor, own.spread)
