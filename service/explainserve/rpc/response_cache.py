"""Explain responses that are kept for equal requests, within a bound of bytes.

Two requests are equal when model, inputs and every effective option are: a default that is spelled out is the same as
one that is left out. Priority, deadline and time budget decide when an answer comes, not which, so they are no part of
the key; an answer that a time budget cut is not kept, and a kept one is complete, whoever waits for it.

Equal requests that run at the same time are each computed: one that waited for another would wait with the other's
priority, deadline and time budget.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from google.protobuf.duration_pb2 import Duration

from explainserve.baselines import BaselineSpec, Zeros, effective
from explainserve.byte_cache import ByteCache
from explainserve.explainer import Answer, Usage
from explainserve.explanation import StopReason
from explainserve.fingerprint import fingerprint
from explainserve.metrics import Metrics
from explainserve.query import Query
from explainserve.rpc import provenance
from explainserve.rpc.requests import Explain
from explainserve.signature import InputSpec, Signature
from explainserve.targets import TargetSpec
from explainserve.v1.explainer_service_pb2 import ExplainResponse, ResponseOptions

_NOT_KEPT = frozenset({StopReason.TIME_BUDGET, StopReason.NON_FINITE})

_BESIDE_THE_ANSWER = frozenset({"query", "model", "request", "budget_ends_at"})
"""Fields that do not decide what the answer is, or that the key holds in another form."""


@dataclass(frozen=True, eq=False)
class Lookup:
    """What the cache had for a request.

    Attributes:
        key: of the request; None where nothing is kept.
        response: the kept answer, the caller's own, with the provenance of this request; None where there is none.
        byte_count: of that answer, about.
    """

    key: bytes | None = None
    response: ExplainResponse | None = None
    byte_count: int = 0


class ResponseCache:
    """Keeps responses as bytes, so that no later change of a message reaches them. Used on the event loop.

    Args:
        capacity_bytes: of all kept responses; 0 keeps none.
        metrics: instruments to feed.

    Attributes:
        enabled: whether any is kept.
    """

    def __init__(self, capacity_bytes: int, metrics: Metrics) -> None:
        self._cache = ByteCache(capacity_bytes)
        self.enabled = capacity_bytes > 0
        self._metrics = metrics

    async def lookup(self, request: Explain) -> Lookup:
        """Looks for the answer to an equal request.

        Raises:
            InvalidRequest, NotFound: an output or the range of a noise baseline is not known, as when it is computed.
        """
        if not self.enabled:
            return Lookup()
        key = await asyncio.to_thread(response_key, request)
        data = self._cache.get(key)
        outcome = "miss" if data is None else "hit"
        self._metrics.response_cache_lookups.labels(request.query.model.name, outcome).inc()
        return Lookup(key) if data is None else Lookup(key, await asyncio.to_thread(_read, data), len(data))

    async def keep(self, lookup: Lookup, answer: Answer, response: ExplainResponse, tensor_bytes: int) -> None:
        """Keeps the response to the request that was looked up, unless it was cut by time, is not finite, or does not
        fit.

        Args:
            tensor_bytes: of the response. Those alone tell of nearly all that do not fit, before they are serialized.
        """
        if lookup.key is None or not self._cache.fits(lookup.key, tensor_bytes):
            return
        if not _NOT_KEPT.isdisjoint(e.attribution.stop_reason for e in answer.explanations):
            return
        self._cache.put(lookup.key, await asyncio.to_thread(response.SerializeToString))
        self._metrics.response_cache_bytes.set(self._cache.byte_count)


def response_key(request: Explain) -> bytes:
    """Digest of everything that decides the response: model and server, inputs, and every option as it is in effect.

    Raises:
        InvalidRequest, NotFound: as `ResponseCache.lookup`.
    """
    query = request.query
    computed = provenance.provenance(query.model, Usage(), query.methods).SerializeToString(deterministic=True)
    return fingerprint((query.model.identity, computed, _options(request)))


def _options(request: Explain) -> dict[str, object]:
    """Every option with its default filled in; a field that the request or its query gains is one more of them."""
    query, signature = request.query, request.query.model.signature
    moving = {name: signature.input(name) for name in request.shapes}
    stated = {
        name: value for name, value in (_fields(query) | _fields(request)).items() if name not in _BESIDE_THE_ANSWER
    }
    return stated | {
        "targets": [[_effective_target(spec, signature) for spec in query.scored_targets(m)] for m in query.methods],
        "baselines": [effective_baseline(spec, moving) for spec in query.baselines],
        "views": {name: request.figures.views_of(spec) for name, spec in query.subject.maps.items()},
        "figures": replace(request.figures, views=()),
        "options": _without_views(request.options),
    }


def _effective_target(spec: TargetSpec, signature: Signature) -> TargetSpec:
    """With the output by name; the score is that of a method, whoever named it."""
    return replace(spec, output=signature.output(spec.output).name, names_score=True)


def effective_baseline(spec: BaselineSpec, moving: Mapping[str, InputSpec]) -> BaselineSpec:
    """Every moving input by name; names of others stay, so that the request is refused as it would be."""
    stated = {name: effective(spec.of(name), own) for name, own in moving.items()}
    return replace(spec, every_input=Zeros(), inputs={**spec.inputs, **stated})


def _fields(value: Query | Explain) -> dict[str, object]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _without_views(options: ResponseOptions) -> bytes:
    """The effective views stand beside it."""
    rest = ResponseOptions()
    rest.CopyFrom(options)
    rest.ClearField("views")
    return rest.SerializeToString(deterministic=True)


def _read(data: bytes) -> ExplainResponse:
    """The counts stay those of the computation; the durations are those of this request."""
    started = time.monotonic()
    response = ExplainResponse.FromString(data)
    own = response.provenance
    own.from_cache = True
    own.queue_duration.CopyFrom(Duration())
    own.compute_duration.CopyFrom(Duration())
    provenance.set_serialize_duration(own, time.monotonic() - started)
    return response
