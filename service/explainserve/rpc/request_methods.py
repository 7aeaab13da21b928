"""The methods of a request with their options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, cast

from explainserve.errors import LimitExceeded
from explainserve.explanation import Subject
from explainserve.methods import METHODS, Method, name_of
from explainserve.methods.adaptive import MIN_STEP_COUNT
from explainserve.rpc.methods import read as read_method
from explainserve.served_model import ServedModel
from explainserve.settings import Settings
from explainserve.v1 import method_pb2


def methods(
    specs: Sequence[method_pb2.MethodSpec], model: ServedModel, subject: Subject, settings: Settings
) -> tuple[Method, ...]:
    """The methods of a request with their options; adaptive Integrated Gradients where none is named.

    Raises:
        InvalidRequest: an option is out of its range or does not fit the model, or no method is chosen
            (METHOD_REQUIRED).
        LimitExceeded: more steps than the server allows (STEP_COUNT_EXCEEDED).
        Unsupported: the model lacks what a method needs.
    """
    cap = min(settings.max_step_count, model.config.limits.max_step_count or settings.max_step_count)
    chosen = [_capped(read_method(spec), spec, cap) for spec in specs or [_DEFAULT_METHOD]]
    for method in chosen:
        model.check_supports(method.needs.rule, layers=method.needs.layers or bool(subject.cut), cut=bool(subject.cut))
    return tuple(method.resolved(subject) for method in chosen)


_DEFAULT_METHOD = method_pb2.MethodSpec(integrated_gradients=method_pb2.IntegratedGradients())


def _capped(method: Method, spec: method_pb2.MethodSpec, cap: int) -> Method:
    """A default that is above the cap gives way to it, so that a plain request is never refused for it; so do those of
    methods within it."""
    message = getattr(spec, name_of(method))
    options: dict[str, Any] = {option.name: getattr(method, option.name) for option in fields(cast(Any, method))}
    inner = {
        name: _capped(value, getattr(message, name), cap)
        for name, value in options.items()
        if type(value) in METHODS.values()
    }
    option = "max_step_count" if options.get("step_count") is None else "step_count"
    steps = options.get(option) or 0
    if steps <= cap:
        return _with(method, inner) if inner else method
    stated = {field.name for field, _ in message.ListFields()}
    if stated.isdisjoint({"step_count", "max_step_count"}):
        return _with(method, {option: max(cap, MIN_STEP_COUNT if option == "max_step_count" else 1)})
    raise LimitExceeded(
        "STEP_COUNT_EXCEEDED", f"{steps} steps are above the limit of {cap}", step_count=steps, limit=cap
    )


def _with(method: Method, options: Mapping[str, Any]) -> Method:
    return cast(Method, replace(cast(Any, method), **options))
