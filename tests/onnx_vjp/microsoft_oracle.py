"""Operators of onnxruntime's own domains: what is composed of them against onnxruntime's own kernels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from explainserve.onnx_vjp import GradientGraph, input_gradient

Feeds = dict[str, np.ndarray]
Function = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Fused:
    """One node of onnxruntime's with its input values; `function` stands in for a kernel that the processor lacks."""

    name: str
    model: onnx.ModelProto
    feeds: Feeds
    function: Function | None = None
    compared: int = 1

    @property
    def node(self) -> onnx.NodeProto:
        """The operator under test."""
        return self.model.graph.node[-1]

    @property
    def wrt(self) -> list[str]:
        """The float inputs that are no constants."""
        return [name for name, value in self.feeds.items() if value.dtype == np.float32 and value.size]


def fused(
    operator: str,
    feeds: dict[str, np.ndarray],
    *,
    constants: Collection[str] = (),
    outputs: int | str = 1,
    domain: str = "com.microsoft",
    dynamic: bool = False,
    function: Function | None = None,
    name: str = "",
    **attributes: object,
) -> Fused:
    """A model of one node whose inputs, in order, are `feeds`; a name with an underscore in front is absent.

    Outputs are a number, or their names with `_` for an absent one. Names in `constants` are stored in the model.
    """
    present = {key: value for key, value in feeds.items() if not key.startswith("_")}
    inputs = [_declared(key, value, dynamic) for key, value in present.items() if key not in constants]
    names = [f"y{i}" for i in range(outputs)] if isinstance(outputs, int) else outputs.split()
    results = [key if key != "_" else "" for key in names]
    node = helper.make_node(
        operator, [key if key in present else "" for key in feeds], results, domain=domain, name="node", **attributes
    )
    shown = [helper.make_tensor_value_info(key, TensorProto.FLOAT, None) for key in results if key]
    stored = [numpy_helper.from_array(present[key], key) for key in constants]
    imports = [helper.make_opsetid("", 18)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    graph = helper.make_graph([node], operator, inputs, shown, stored)
    label = name or "-".join(f"{key}={value}" for key, value in attributes.items()) or "plain"
    return Fused(
        f"{operator}:{label}{':dynamic' if dynamic else ''}",
        helper.make_model(graph, opset_imports=imports, ir_version=8),
        {key: value for key, value in present.items() if key not in constants},
        function,
        len(shown),
    )


def _declared(name: str, value: np.ndarray, dynamic: bool) -> onnx.ValueInfoProto:
    shape = [f"{name}_{axis}" for axis in range(value.ndim)] if dynamic else value.shape
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), shape)


def evaluate(model: onnx.ModelProto, feeds: Feeds, outputs: Sequence[str]) -> list[np.ndarray]:
    """onnxruntime, which fuses nothing by itself."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(list(outputs), feeds))


def check(case: Fused) -> GradientGraph:
    """Assert that forward pass and gradient are those of the kernel: equal values, and central differences."""
    names = [value.name for value in case.model.graph.output]
    gradient = input_gradient(case.model, case.wrt, names)
    forward = _forward(case, names)
    expected = forward(case.feeds)
    generator = np.random.default_rng(5)
    cotangents = {
        name: generator.standard_normal(y.shape).astype(np.float32) for name, y in zip(names, expected, strict=True)
    }
    feeds = {**case.feeds, **{gradient.cotangents[name]: value for name, value in cotangents.items()}}
    wanted = [*names, *(gradient.gradients[name] for name in case.wrt)]
    results = dict(zip(wanted, evaluate(gradient.model, feeds, wanted), strict=True))
    for name, y in zip(names, expected, strict=True):
        np.testing.assert_allclose(results[name], y, rtol=1e-4, atol=2e-5, err_msg=f"{case.name}: output {name}")
    for name in case.wrt:
        _check_direction(case, forward, cotangents, name, results[gradient.gradients[name]], generator)
    return gradient


def _forward(case: Fused, names: Sequence[str]) -> Callable[[Feeds], list[np.ndarray]]:
    function = case.function
    if function is None:
        return lambda feeds: evaluate(case.model, feeds, names)
    initial = {tensor.name: numpy_helper.to_array(tensor) for tensor in case.model.graph.initializer}
    order = [name for name in case.node.input if name]

    def run(feeds: Feeds) -> list[np.ndarray]:
        results = function(*({**initial, **feeds}[name] for name in order))
        return [np.asarray(y) for y in (results if isinstance(results, tuple) else (results,))]

    return run


def _check_direction(
    case: Fused,
    forward: Callable[[Feeds], list[np.ndarray]],
    cotangents: Feeds,
    name: str,
    gradient: np.ndarray,
    generator: np.random.Generator,
    step: float = 2e-3,
) -> None:
    """Float32 kernels allow a central difference with a wide step only: a coarse check that shares no code."""
    value = case.feeds[name]
    assert gradient.shape == value.shape, f"{case.name}: gradient of {name} has shape {gradient.shape}"
    direction = np.sign(gradient) * np.abs(generator.standard_normal(value.shape)).astype(np.float32)
    direction = (direction / max(float(np.linalg.norm(direction)), 1e-9)).astype(np.float32)
    ends = [forward({**case.feeds, name: value + sign * step * direction}) for sign in (1, -1)]
    expected = sum(
        float(np.sum(np.subtract(high, low, where=np.isfinite(low), out=np.zeros(low.shape)) * cotangent))
        for high, low, cotangent in zip(*ends, cotangents.values(), strict=True)
    ) / (2 * step)
    actual = float(np.sum(gradient.astype(np.float64) * direction))
    scale = max(abs(expected), abs(actual), 1e-2)
    assert abs(actual - expected) <= 0.03 * scale, f"{case.name}: {name}: {actual} instead of {expected}"
