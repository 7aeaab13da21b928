"""onnx's reference evaluator in float64, with what it lacks written out.

Every class here stands for an operator that the evaluator cannot run in float64 or gets wrong; its docstring says why.
Only pooling is replaced because it is slow.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from itertools import zip_longest
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_conv_transpose, op_layer_normalization, op_loop, op_pool_common, op_scan

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
    """Its function body has an Erf in float32."""

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


class LayerNormalization(op_layer_normalization.LayerNormalization):
    """Computes in the type of its input, but refuses to be told so."""

    def _run(self, *inputs: np.ndarray, stash_type: int = 1, **attributes: Any) -> tuple[np.ndarray, ...]:
        return tuple(super()._run(*inputs, stash_type=1, **attributes))


class Loop(op_loop.Loop):
    """Joins what it writes instead of stacking it, and does not run without a condition."""

    def _run(self, most: Any, on: Any, *states: Any, context: Any = None, **rest: Any) -> tuple[Any, ...]:
        rest.pop("body")
        written: list[Any] = []
        step, on = 0, True if on is None else on
        while on and (most is None or step < most):
            values = dict(zip(self.body.input_names, (np.array(step), np.array(on), *states), strict=True))
            on, *results = self._run_body({**(context or {}), **values}, **rest)
            states, written, step = results[: len(states)], [*written, results[len(states) :]], step + 1
        return (*states, *(np.stack(values) for values in zip(*written, strict=True)))


class Scan(op_scan.Scan):
    """Knows no axes or directions."""

    def __init__(self, node: onnx.NodeProto, run_params: Any) -> None:
        OpRun.__init__(self, node, run_params)

    def _run(self, *values: Any, context: Any = None, **rest: Any) -> tuple[Any, ...]:
        if self.run_params["opsets"][""] > 8:
            return self._scan(values, context or {}, **rest)
        rows = [self._scan(row, context or {}, **rest) for row in zip(*values[1:], strict=True)]
        return tuple(map(np.stack, zip(*rows, strict=True)))

    def _scan(self, values: Any, context: Any, num_scan_inputs: int, **rest: Any) -> tuple[Any, ...]:
        count, written = len(values) - num_scan_inputs, []
        states, axes, directions = values[:count], *(rest.get(f"scan_{name}") or [] for name in _READS)
        pieces = [_cut(x, *way) for x, *way in zip_longest(values[count:], axes, directions, fillvalue=0)]
        for read in zip(*pieces, strict=True):
            names = dict(zip(self.body.input_names, (*states, *read), strict=True))
            results = self._run_body({**context, **names}, attributes=rest["attributes"])
            states, written = results[:count], [*written, results[count:]]
        axes, directions = (rest.get(f"scan_{name}") or [] for name in _WRITES)
        stacked = zip_longest(map(np.stack, zip(*written, strict=True)), axes, directions, fillvalue=0)
        return (*states, *(np.moveaxis(x[::-1] if back else x, 0, axis) for x, axis, back in stacked))


_READS, _WRITES = ("input_axes", "input_directions"), ("output_axes", "output_directions")


def _cut(x: np.ndarray, axis: int, back: int) -> np.ndarray:
    """The pieces of a tensor along an axis, in order."""
    return np.moveaxis(x, axis, 0)[:: -1 if back else 1]


class ConvTranspose(OpRun):
    """Wrong for groups, except for those of a single channel."""

    def _run(
        self, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None, group: int = 1, **attributes: Any
    ) -> tuple[np.ndarray]:
        groups = zip(np.split(x, group, axis=1), np.split(w, group), strict=True)
        alone = op_conv_transpose.ConvTranspose(self.onnx_node, self.run_params)
        y = np.concatenate([alone._run(part, kernel, group=1, **attributes)[0] for part, kernel in groups], axis=1)
        return (y if bias is None else y + bias.reshape(-1, *[1] * (x.ndim - 2)),)


class MaxPool(op_pool_common.CommonPool):
    """Wrong positions at stride 1, and slow."""

    def _run(self, x: np.ndarray, storage_order: int = 0, **attributes: Any) -> tuple[np.ndarray, ...]:
        values = tuple(op_pool_common.CommonPool._run(self, "MAX", 0, x, **attributes))
        if len(self.onnx_node.output) == 1:
            return values
        with patch.object(op_pool_common, "pool", partial(_positions, order="F" if storage_order else "C")):
            return values[0], np.asarray(op_pool_common.CommonPool._run(self, "MAX", 0, x, **attributes)[0], np.int64)


class Scatter(OpRun):
    """Missing."""

    def _run(self, x: np.ndarray, indices: np.ndarray, updates: np.ndarray, axis: int = 0) -> tuple[np.ndarray]:
        result = x.copy()
        np.put_along_axis(result, indices, updates, axis)
        return (result,)


def why(stand_in: object) -> str:
    """What a class says of the evaluator's own, on one line."""
    return " ".join((stand_in.__doc__ or "Computes in float32").split()).rstrip(".")


OPERATORS = (
    ConvTranspose,
    Erf,
    Gelu,
    LayerNormalization,
    Loop,
    MaxPool,
    MeanVarianceNormalization,
    Optional,
    Scan,
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


def _windows(
    padded: np.ndarray,
    x_shape: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    out_shape: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
) -> np.ndarray:
    """The windows of each image, shape (rows, channels, *out_shape, elements). `padded` is NaN where nothing counts."""
    rank = len(kernel)
    padded = padded.copy()
    for axis, size in enumerate(x_shape[2:]):
        padded[(slice(None),) * (2 + axis) + (slice(size + pads[axis] + pads[rank + axis], None),)] = np.nan
    spans = [dilation * (size - 1) + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    windows = sliding_window_view(padded, spans, axis=tuple(range(2, 2 + rank)))
    firsts = tuple(slice(None, stride * count, stride) for stride, count in zip(strides, out_shape, strict=True))
    windows = windows[(slice(None), slice(None), *firsts, *(slice(None, None, step) for step in dilations))]
    return windows.reshape(*windows.shape[: 2 + rank], -1)


def _pool(
    padded: np.ndarray,
    x_shape: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    out_shape: Sequence[int],
    pooling_type: str,
    _: object = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    *rest: object,
) -> np.ndarray:
    """Average and maximum of windows without a loop over them."""
    rank = len(kernel)
    strides, dilations, pads = strides or [1] * rank, dilations or [1] * rank, pads or [0] * 2 * rank
    values = _windows(padded, x_shape, kernel, strides, out_shape, pads, dilations)
    if pooling_type == "MAX":
        return np.asarray(np.fmax.reduce(values, axis=-1))
    return np.asarray(np.nansum(values, axis=-1) / np.sum(~np.isnan(values), axis=-1))


def _positions(
    padded: np.ndarray,
    x_shape: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    out_shape: Sequence[int],
    _: str,
    __: object = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    *rest: object,
    order: Literal["C", "F"],
) -> np.ndarray:
    """Where the first maximum of each window is, counted over the whole tensor."""
    rank = len(kernel)
    strides, dilations, pads = strides or [1] * rank, dilations or [1] * rank, pads or [0] * 2 * rank
    values = _windows(padded, x_shape, kernel, strides, out_shape, pads, dilations)
    offsets = np.unravel_index(np.nanargmax(values, axis=-1), kernel)
    starts = np.ogrid[tuple(slice(count) for count in out_shape)]
    places = [
        start * stride + offset * dilation - before
        for start, stride, offset, dilation, before in zip(starts, strides, offsets, dilations, pads, strict=False)
    ]
    image = np.arange(np.prod(x_shape[:2])).reshape(*x_shape[:2], *[1] * rank)
    inside = np.ravel_multi_index(places, x_shape[2:], order=order)
    return np.asarray(image * np.prod(x_shape[2:], dtype=np.int64) + inside)


class Reference:
    """The evaluator of a model in float64."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._evaluator = ReferenceEvaluator(in_type(model, TensorProto.DOUBLE), new_ops=list(OPERATORS))

    def run(self, outputs: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The named outputs."""
        with np.errstate(all="ignore"), patch.object(op_pool_common, "pool", _pool):
            return list(self._evaluator.run(list(outputs), feeds))
