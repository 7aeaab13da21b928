"""onnx's reference evaluator in float64, with what it lacks written out.

Every class here stands for an operator that the evaluator cannot run in float64 or gets wrong; its docstring says why.
"""

from __future__ import annotations

import inspect
import math
from importlib import import_module
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from onnx_vjp.precision import in_type


def _widened(module: str, operator: str) -> type[OpRun]:
    """The evaluator's own class, float64 in place of every float32 that its code names."""
    source = inspect.getsource(import_module(f"onnx.reference.ops.{module}"))
    names: dict[str, Any] = {"__name__": module}
    exec(source.replace("np.float32", "np.float64"), names)
    widened: type[OpRun] = names[operator]
    return widened


class Erf(OpRun):
    """Evaluated in float32."""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (np.vectorize(math.erf, otypes=[np.float64])(x),)


class Gelu(OpRun):
    """Its function body does not see the Erf above."""

    def _run(self, x: np.ndarray, approximate: Any = None) -> tuple[np.ndarray]:
        if approximate == "tanh":
            return (x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),)
        return (x / 2 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / np.sqrt(2))),)


class MeanVarianceNormalization(OpRun):
    """Its function body has float32 constants."""

    def _run(self, x: np.ndarray, axes: Any = None) -> tuple[np.ndarray]:
        axes = tuple(axes or (0, 2, 3))
        centered = x - x.mean(axis=axes, keepdims=True)
        return (centered / (np.sqrt((centered**2).mean(axis=axes, keepdims=True)) + 1e-9),)


class Optional(OpRun):
    """Returns a list around its value, where OptionalGetElement expects the value."""

    def _run(self, value: Any = None, type: Any = None) -> tuple[Any]:
        return (value,)


class Scatter(OpRun):
    """Missing."""

    def _run(self, x: np.ndarray, indices: np.ndarray, updates: np.ndarray, axis: int = 0) -> tuple[np.ndarray]:
        result = x.copy()
        np.put_along_axis(result, indices, updates, axis)
        return (result,)


OPERATORS = (
    Erf,
    Gelu,
    MeanVarianceNormalization,
    Optional,
    Scatter,
    *(
        _widened(module, operator)
        for module, operator in (
            ("op_affine_grid", "AffineGrid"),
            ("op_causal_conv_with_state", "CausalConvWithState"),
            ("op_grid_sample", "GridSample"),
            ("op_linear_attention", "LinearAttention"),
            ("op_range", "Range"),
        )
    ),
)


def reference(model: onnx.ModelProto) -> ReferenceEvaluator:
    """The evaluator of a model in float64."""
    return ReferenceEvaluator(in_type(model, TensorProto.DOUBLE), new_ops=list(OPERATORS))
