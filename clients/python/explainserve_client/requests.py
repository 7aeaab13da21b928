"""Requests of the contract from what a caller passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from google.protobuf.duration_pb2 import Duration

from explainserve.v1 import baseline_pb2, explainer_service_pb2, statistics_pb2, target_pb2
from explainserve_client.baselines import baseline_messages
from explainserve_client.errors import RequestTypeError, RequestValueError
from explainserve_client.inputs import Instances
from explainserve_client.methods import Method, method_specs
from explainserve_client.models import ModelInfo, model_ref
from explainserve_client.names import enum_value, optional_value
from explainserve_client.regions import GroupLike, RegionLike, group_messages, region_messages
from explainserve_client.targets import target_messages


class ExplainOptions(TypedDict, total=False):
    """Keyword arguments that `explain`, `explain_stream` and `estimate_cost` share; `Client.explain` documents them."""

    method: Method | Sequence[Method] | None
    targets: Any
    baselines: Any
    score: str | None
    regions: Mapping[str, RegionLike] | None
    groups: Mapping[str, GroupLike] | None
    fixed_inputs: Sequence[str]
    layers: Sequence[str]
    baseline_reduction: str | None
    views: Sequence[str]
    omit_tensors: bool
    omit_statistics: bool
    omit_joint_statistics: bool
    omit_score_path: bool
    omit_regions: bool
    include_baseline_tensors: bool
    include_standard_errors: bool
    include_parts: bool
    time_budget: float | None
    priority: int


def explain_request(
    info: ModelInfo,
    version: int | None,
    instances: Instances,
    *,
    method: Method | Sequence[Method] | None = None,
    targets: Any = None,
    baselines: Any = None,
    score: str | None = None,
    regions: Mapping[str, RegionLike] | None = None,
    groups: Mapping[str, GroupLike] | None = None,
    fixed_inputs: Sequence[str] = (),
    layers: Sequence[str] = (),
    baseline_reduction: str | None = None,
    time_budget: float | None = None,
    priority: int = 0,
    **response_options: Any,
) -> explainer_service_pb2.ExplainRequest:
    """The request that `explain`, `explain_stream` and `estimate_cost` hold; no version where the caller named none."""
    fixed = _names("fixed_inputs", fixed_inputs)
    return explainer_service_pb2.ExplainRequest(
        model=model_ref(info.name, version),
        inputs=instances.tensors,
        fixed_inputs=fixed,
        layers=_names("layers", layers),
        targets=target_messages(targets, score, info),
        baselines=baseline_messages(baselines, info, fixed),
        baseline_reduction=optional_value(baseline_pb2.BaselineReduction, baseline_reduction),
        methods=method_specs(method),
        regions=region_messages(regions),
        groups=group_messages(groups),
        response_options=_response_options(**response_options),
        time_budget=_duration(time_budget),
        priority=priority,
    )


def predict_request(
    info: ModelInfo,
    version: int | None,
    instances: Instances,
    *,
    top_k: int,
    score: str | None,
    outputs: Sequence[str],
    include_tensors: bool,
) -> explainer_service_pb2.PredictRequest:
    """The request of `predict`."""
    return explainer_service_pb2.PredictRequest(
        model=model_ref(info.name, version),
        inputs=instances.tensors,
        top_k=top_k,
        score=optional_value(target_pb2.Score, score),
        outputs=_names("outputs", outputs),
        include_tensors=include_tensors,
    )


def _response_options(
    *,
    views: Sequence[str] = (),
    omit_tensors: bool = False,
    omit_statistics: bool = False,
    omit_joint_statistics: bool = False,
    omit_score_path: bool = False,
    omit_regions: bool = False,
    include_baseline_tensors: bool = False,
    include_standard_errors: bool = False,
    include_parts: bool = False,
) -> explainer_service_pb2.ResponseOptions:
    return explainer_service_pb2.ResponseOptions(
        views=[enum_value(statistics_pb2.View, view) for view in _names("views", views)],
        omit_tensors=omit_tensors,
        omit_statistics=omit_statistics,
        omit_joint_statistics=omit_joint_statistics,
        omit_score_path=omit_score_path,
        omit_regions=omit_regions,
        include_baseline_tensors=include_baseline_tensors,
        include_standard_errors=include_standard_errors,
        include_parts=include_parts,
    )


def _names(what: str, names: Sequence[str]) -> Sequence[str]:
    if isinstance(names, str):
        raise RequestTypeError(f"{what} is a list of names, not the string {names!r}")
    return names


def _duration(seconds: float | None) -> Duration | None:
    if seconds is None:
        return None
    if not 0 < seconds < math.inf:
        raise RequestValueError(f"time_budget is a positive, finite number of seconds, not {seconds}")
    duration = Duration()
    duration.FromNanoseconds(max(1, round(seconds * 1e9)))
    return duration
