"""Cases by operator for what onnx's backend suite leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from onnx import TensorProto

from onnx_vjp.classical_cases import classical_cases
from onnx_vjp.control_cases import control_cases
from onnx_vjp.recurrent_cases import recurrent_cases
from onnx_vjp.sampling_oracles import ORACLES
from onnx_vjp.vjp_oracle import Case, Function, single

_rng = np.random.default_rng(3)


def _x(*shape: int) -> np.ndarray:
    return _rng.standard_normal(shape).astype(np.float32)


def _i(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def _global_norm(p: int) -> Function:
    return lambda x: (np.abs(x) ** p).sum(axis=(2, 3), keepdims=True) ** (1 / p)


def own_cases() -> Iterator[Case]:
    """What the suite lacks: groups, dilations, odd paddings, dynamic shapes, negative steps, ranks and broadcasts."""
    yield from _convolutions()
    yield from _pooling()
    yield from _shapes()
    yield from _indexing()
    yield from _sampling()
    yield from control_cases()
    yield from recurrent_cases()
    yield from _rest()
    yield from _einsums()
    yield from _scattered()
    yield from _selected()
    yield from classical_cases()
    yield from _spectra()
    yield from _reductions()


def _convolutions() -> Iterator[Case]:
    image, kernel = _x(2, 4, 9, 8), _x(6, 2, 3, 2)
    for dynamic in (None, ("s", "e", "i", "r")):
        yield single(
            "Conv",
            {"x": image, "w": kernel, "b": _x(6)},
            group=2,
            strides=[2, 3],
            dilations=[2, 1],
            pads=[1, 0, 2, 1],
            kernel_shape=[3, 2],
            dynamic=dynamic,
        )
        yield single(
            "Conv",
            {"x": image, "w": kernel, "b": _x(6)},
            group=2,
            pads=[3, 1, 0, 2],
            kernel_shape=[3, 2],
            dynamic=dynamic,
        )
        yield single(
            "Conv", {"x": _x(2, 4, 11), "w": _x(4, 1, 3)}, group=4, pads=[1, 1], kernel_shape=[3], dynamic=dynamic
        )
        yield single(
            "Conv",
            {"x": _x(1, 2, 5, 6, 4), "w": _x(3, 2, 2, 3, 2)},
            strides=[1, 2, 2],
            kernel_shape=[2, 3, 2],
            dynamic=dynamic,
        )
    for mode, dynamic in product(("SAME_UPPER", "SAME_LOWER", "VALID"), (None, ())):
        feeds = {"x": image, "w": _x(3, 4, 4, 3)}
        yield single("Conv", feeds, auto_pad=mode, strides=[2, 3], kernel_shape=[4, 3], dynamic=dynamic)
        yield single("Conv", feeds, auto_pad=mode, kernel_shape=[4, 3], dynamic=dynamic)
    yield single(
        "Conv", {"x": _x(1, 2, 7), "w": _x(3, 2, 2)}, auto_pad="SAME_UPPER", strides=[3], kernel_shape=[2], dynamic=()
    )
    small = {"x": _x(2, 4, 4, 5), "w": _x(4, 3, 3, 2), "b": _x(3)}
    grouped = {"x": _x(2, 4, 5), "w": _x(4, 3, 3), "b": _x(6)}
    cube = {"x": _x(1, 2, 2, 3, 2), "w": _x(2, 3, 2, 3, 2)}
    for dynamic in (None, ()):
        shape = {"strides": [2, 3], "pads": [1, 0, 0, 1], "output_padding": [1, 2]}
        yield single("ConvTranspose", small, kernel_shape=[3, 2], dynamic=dynamic, **shape)
        yield single("ConvTranspose", small, kernel_shape=[3, 2], dilations=[2, 1], dynamic=dynamic)
        yield single("ConvTranspose", cube, kernel_shape=[2, 3, 2], strides=[1, 2, 3], dynamic=dynamic)
        for mode in ("SAME_UPPER", "SAME_LOWER"):
            yield single("ConvTranspose", small, kernel_shape=[3, 2], auto_pad=mode, strides=[2, 2], dynamic=dynamic)
        shape = {"kernel_shape": [3], "strides": [2], "dilations": [2]}
        yield single(
            "ConvTranspose",
            grouped,
            group=2,
            pads=[1, 2],
            dynamic=dynamic,
            function=_conv_transpose_1d(2, slice(1, 11)),
            **shape,
        )
        yield single(
            "ConvTranspose",
            grouped,
            group=2,
            output_shape=[10],
            dynamic=dynamic,
            function=_conv_transpose_1d(2, slice(2, 12)),
            **shape,
        )

    columns = {"x": _x(2, 12, 12), "i": _i(4, 5), "b": _i(2, 3)}
    shape = {"strides": [2, 1], "pads": [1, 0, 1, 1], "dilations": [1, 1]}
    for dynamic in (None, (), ("i", "b")):
        yield single("Col2Im", columns, dynamic=dynamic, **shape)
    yield single(
        "Col2Im", {"x": _x(1, 4, 8), "i": _i(9, 1), "b": _i(2, 1)}, name="dilated", dilations=[1, 1], dynamic=()
    )


def _conv_transpose_1d(groups: int, kept: slice) -> Function:
    """Stride and dilation 2. The reference evaluator fails on groups in 1-D and on output_shape."""

    def function(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
        batch, channels, length = x.shape
        rows = x.reshape(batch, groups, channels // groups, length)
        kernels = w.reshape(groups, channels // groups, *w.shape[1:])
        full = np.zeros((batch, groups, w.shape[1], 2 * (length - 1) + 2 * (w.shape[2] - 1) + 1))
        for tap in range(w.shape[2]):
            full[..., 2 * tap : 2 * (tap + length) - 1 : 2] += np.einsum("ngcl,gcm->ngml", rows, kernels[..., tap])
        return full.reshape(batch, -1, full.shape[-1])[..., kept] + b[:, None]

    return function


def _pooling() -> Iterator[Case]:
    image = _x(2, 3, 8, 7)
    for name, dynamic in product(("MaxPool", "AveragePool", "LpPool"), (None, ())):
        yield single(name, {"x": image}, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], dynamic=dynamic)
        yield single(name, {"x": image}, kernel_shape=[2, 2], strides=[2, 2], dynamic=dynamic)
        # The reference evaluator of MaxPool takes SAME_LOWER for SAME_UPPER.
        for mode in ("SAME_UPPER", "VALID", *(["SAME_LOWER"] if name != "MaxPool" else [])):
            yield single(name, {"x": image}, kernel_shape=[3, 2], strides=[2, 1], auto_pad=mode, dynamic=dynamic)
        yield single(name, {"x": _x(2, 3, 9)}, kernel_shape=[3], strides=[2], dynamic=dynamic)
        yield single(name, {"x": image}, kernel_shape=[2, 3], dilations=[3, 2], pads=[1, 0, 1, 1], dynamic=dynamic)
        yield single(name, {"x": _x(1, 2, 5, 6, 4)}, kernel_shape=[2, 3, 2], strides=[2, 2, 1], dynamic=dynamic)
    for name, dynamic in product(("MaxPool", "AveragePool"), (None, ())):
        shape = {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}
        yield single(name, {"x": image}, dynamic=dynamic, **shape)
        yield single(name, {"x": image}, pads=[1, 0, 0, 1], dynamic=dynamic, **shape)
    places = np.array([[[0, 3, 6], [12, 17, 19]]]).reshape(1, 1, 2, 3)
    for dynamic in (None, ()):
        yield single(
            "MaxUnpool", {"x": _x(1, 1, 2, 3), "i": places}, kernel_shape=[2, 2], strides=[2, 2], dynamic=dynamic
        )
        # The reference evaluator goes through as many channels as there are images.
        yield single("LRN", {"x": _x(4, 4, 3, 2)}, size=4, alpha=0.5, beta=0.6, bias=1.2, dynamic=dynamic)
        yield single("LRN", {"x": _x(5, 5, 1, 2)}, size=3, alpha=0.5, dynamic=dynamic)
        shape = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1}
        yield single("AveragePool", {"x": image}, dynamic=dynamic, **shape)
        yield single("AveragePool", {"x": image}, kernel_shape=[2, 2], strides=[3, 3], dynamic=dynamic)
    yield single("GlobalLpPool", {"x": image}, p=2, function=_global_norm(2))
    yield single("GlobalLpPool", {"x": image}, p=3, function=_global_norm(3))
    yield single("GlobalAveragePool", {"x": image}, dynamic=())
    yield single("GlobalMaxPool", {"x": image}, dynamic=())
    yield single("GlobalLpPool", {"x": _x(2, 3, 5)}, function=lambda x: (x**2).sum(axis=2, keepdims=True) ** 0.5)
    yield single("MaxPool", {"x": image}, outputs=2, kernel_shape=[3, 3], strides=[2, 2], storage_order=1, dynamic=())


def _shapes() -> Iterator[Case]:
    x = _x(2, 3, 4)
    for dynamic in (None, ("s", "e", "i", "r")):
        yield single("Reshape", {"x": x, "s": _i(0, -1)}, dynamic=dynamic)
        yield single("Transpose", {"x": x}, perm=[1, 2, 0], dynamic=dynamic)
        yield single("Concat", {"a": x, "b": _x(2, 1, 4), "c": _x(2, 2, 4)}, axis=1, dynamic=dynamic)
        yield single("Split", {"x": x, "s": _i(1, 2)}, outputs=2, axis=1, dynamic=dynamic)
        yield single("Tile", {"x": x, "r": _i(2, 1, 3)}, dynamic=dynamic)
        yield single("Expand", {"x": _x(3, 1), "s": _i(2, 1, 4)}, dynamic=dynamic)
        yield single("Flatten", {"x": x}, axis=2, dynamic=dynamic)
        yield single("Add", {"a": _x(3, 1), "b": _x(2, 1, 4)}, dynamic=dynamic, name="broadcast")
        yield single("Where", {"c": np.array([True, False, True, False]), "a": x, "b": _x(3, 1)}, dynamic=dynamic)
        for reduction in ("ReduceSum", "ReduceMean", "ReduceL2", "ReduceMax", "ReduceLogSumExp", "ReduceProd"):
            yield single(reduction, {"x": x, "a": _i(0, -1)}, keepdims=0, dynamic=dynamic)
            yield single(reduction, {"x": x}, keepdims=0, dynamic=dynamic)
        yield single(
            "Pad",
            {"x": x, "p": _i(1, 0, 2, 0, -1, 1)},
            dynamic=dynamic,
            function=lambda x: np.pad(x[:, :2], ((1, 0), (0, 0), (2, 1))),
        )
        for mode in ("reflect", "edge", "wrap"):
            yield single("Pad", {"x": x, "p": _i(0, 2, 1, 0, 0, 2)}, mode=mode, dynamic=dynamic)
            yield single(
                "Pad", {"x": _x(2, 7), "p": _i(2, 3), "_v": x, "a": _i(-1)}, mode=mode, dynamic=dynamic and ("p",)
            )
            yield single("Pad", {"x": _x(7, 2), "p": _i(0, 0, 3, 0)}, mode=mode, dynamic=dynamic)
    yield single("DepthToSpace", {"x": _x(1, 8, 2, 3)}, blocksize=2, mode="CRD", dynamic=())
    yield single("DepthToSpace", {"x": _x(1, 8, 2, 3)}, blocksize=2, mode="DCR", dynamic=())
    yield single("SpaceToDepth", {"x": _x(1, 2, 4, 6)}, blocksize=2, dynamic=())
    for dynamic in ((), ("s",)):
        yield single("CenterCropPad", {"x": _x(5, 6), "s": _i(7, 3)}, dynamic=dynamic)
        yield single("CenterCropPad", {"x": _x(5, 6, 2), "s": _i(7)}, axes=[1], dynamic=dynamic)


def _indexing() -> Iterator[Case]:
    x = _x(5, 6, 4)
    for dynamic in (None, ("s", "e", "i", "r")):
        yield single("Slice", {"x": x, "s": _i(1, -3), "e": _i(4, 100), "a": _i(0, 2)}, dynamic=dynamic)
        yield single(
            "Slice", {"x": x, "s": _i(-1, 1), "e": _i(-100, 6), "a": _i(0, 1), "t": _i(-1, 2)}, dynamic=dynamic
        )
        yield single("Slice", {"x": x, "s": _i(0), "e": _i(3)}, dynamic=dynamic, name="no axes")
        feeds = {"x": x, "s": _i(-1, 1), "e": _i(-100, 6), "a": _i(0, 1), "t": _i(-1, 2)}
        yield single("Slice", feeds, dynamic=dynamic and (*dynamic, "a", "t"), name="computed axes")
        yield single("Gather", {"x": x, "i": np.array([[0, -1], [2, 2]])}, axis=1, dynamic=dynamic)
        yield single("Gather", {"x": x, "i": _i(3, 0, 0)}, axis=0, dynamic=dynamic)
        yield single("Gather", {"x": x, "i": np.array(-2)}, axis=2, dynamic=dynamic)
        yield single(
            "GatherElements", {"x": _x(3, 4), "i": np.array([[0, 1, 1, 2], [2, 2, 2, 0]])}, axis=0, dynamic=dynamic
        )
        yield single("GatherND", {"x": x, "i": np.array([[0, 1], [4, -1], [0, 1]])}, dynamic=dynamic)
        yield single(
            "GatherND", {"x": _x(2, 3, 4), "i": np.array([[[1], [0]], [[2], [2]]])}, batch_dims=1, dynamic=dynamic
        )
        yield single("ScatterND", {"x": x, "i": np.array([[0, 1], [4, 5]]), "u": _x(2, 4)}, dynamic=dynamic)
        yield single(
            "ScatterND", {"x": x, "i": np.array([[0], [0]]), "u": _x(2, 6, 4)}, reduction="add", dynamic=dynamic
        )
        yield single(
            "ScatterElements", {"x": _x(3, 4), "i": np.array([[0, 1, 1, 2]]), "u": _x(1, 4)}, axis=0, dynamic=dynamic
        )
    yield single("TopK", {"x": _x(3, 7), "k": _i(3)}, outputs=2, axis=1)
    yield single("TopK", {"x": _x(3, 7), "k": _i(2)}, outputs=2, axis=0, largest=0)


def _sampling() -> Iterator[Case]:
    image, grid = _x(2, 3, 5, 4), _x(2, 3, 2, 2)
    for mode, padding in product(("linear", "cubic", "nearest"), ("zeros", "border", "reflection")):
        for aligned, dynamic in ((0, None), (1, ())):
            yield _by_oracle(
                "GridSample",
                {"x": image, "g": grid},
                mode=mode,
                padding_mode=padding,
                align_corners=aligned,
                dynamic=dynamic,
            )
    volume = {"x": _x(1, 2, 3, 5, 4), "g": _x(1, 2, 3, 2, 3)}
    for padding in ("border", "reflection"):
        yield _by_oracle("GridSample", volume, padding_mode=padding, dynamic=())
    yield _by_oracle("GridSample", {"x": image, "g": grid}, mode="bicubic", version=16)
    yield _by_oracle("AffineGrid", {"t": _x(2, 2, 3), "s": _i(2, 1, 3, 4)}, version=20, dynamic=("s",))

    regions = np.array([[0.3, 0.8, 7.2, 5.4], [-3.0, 1.1, 2.3, 12.7], [2.2, 2.1, 2.6, 2.5]], np.float32)
    feeds = {"x": _x(2, 3, 6, 5), "r": regions, "i": _i(1, 0, 1)}
    for mode, ratio, coordinates in product(("avg", "max"), (0, 2), ("half_pixel", "output_half_pixel")):
        yield single(
            "RoiAlign",
            feeds,
            mode=mode,
            sampling_ratio=ratio,
            coordinate_transformation_mode=coordinates,
            output_height=2,
            output_width=3,
            spatial_scale=0.8,
            dynamic=("i",) if ratio else None,
            version=16,
        )

    # Image, left, top, right, bottom; the last one lies outside.
    boxes = np.array([[1, 0.4, 1.2, 6.8, 5.3], [0, -2, 3, 2, 8], [1, 3, 3, 3, 3], [0, 40, 0, 50, 3]], np.float32)
    feeds = {"x": _x(2, 3, 6, 8), "r": boxes}
    for dynamic in (None, ()):
        yield replace(_by_oracle("MaxRoiPool", feeds, pooled_shape=[2, 3], dynamic=dynamic), controls=("r",))
        yield replace(
            _by_oracle("MaxRoiPool", feeds, pooled_shape=[1, 2], spatial_scale=0.7, dynamic=dynamic), controls=("r",)
        )

    moved = {"x": _x(2, 4, 5, 6), "w": _x(6, 2, 3, 2), "o": _x(2, 24, 2, 3), "_b": _x(6), "m": _x(2, 12, 2, 3)}
    shape = {"group": 2, "offset_group": 2, "strides": [2, 2], "pads": [1, 0, 1, 1], "dilations": [2, 1]}
    for dynamic in (None, ()):
        yield _by_oracle("DeformConv", moved, kernel_shape=[3, 2], dynamic=dynamic, **shape)
    plain = {"x": _x(1, 2, 4, 4), "w": _x(3, 2, 2, 2), "o": _x(1, 8, 3, 3), "b": _x(3)}
    yield _by_oracle("DeformConv", plain)


def _by_oracle(operator: str, feeds: dict[str, np.ndarray], **attributes: Any) -> Case:
    """A case whose reference is one of ours."""
    case = single(operator, feeds, **attributes)
    return replace(case, function=ORACLES[operator](case.node, feeds))


def _rest() -> Iterator[Case]:
    row, matrix, stack = _x(4), _x(4, 5), _x(2, 3, 4, 5)
    for dynamic in (None, ("s", "e", "i", "r")):
        for name, feeds in {
            "row": {"a": row, "b": matrix},
            "column": {"a": matrix, "b": _x(5)},
            "inner": {"a": row, "b": _x(4)},
            "batched row": {"a": row, "b": stack},
            "batched column": {"a": stack, "b": _x(5)},
            "broadcast": {"a": _x(3, 2, 4), "b": _x(2, 1, 4, 5)},
        }.items():
            yield single("MatMul", feeds, dynamic=dynamic, name=name)
        yield single(
            "Gemm",
            {"a": _x(4, 3), "b": _x(5, 4), "c": _x(1, 5)},
            transA=1,
            transB=1,
            alpha=0.5,
            beta=2.0,
            dynamic=dynamic,
        )
        yield single("Gemm", {"a": _x(3, 4), "b": _x(4, 5), "c": _x(3, 1)}, dynamic=dynamic)
        yield single("PRelu", {"x": _x(2, 3, 4), "s": _x(3, 1)}, dynamic=dynamic)
        yield single("LayerNormalization", {"x": _x(2, 3, 4), "s": _x(3, 4), "b": _x(4)}, axis=1, dynamic=dynamic)
        yield single(
            "BatchNormalization",
            {"x": _x(2, 3, 4), "s": _x(3), "b": _x(3), "m": _x(3), "v": np.abs(_x(3)) + 1},
            dynamic=dynamic,
        )
        yield single(
            "Resize",
            {"x": _x(1, 2, 3, 4), "_roi": _x(1), "s": np.array([1, 1, 2, 1.5], np.float32)},
            mode="linear",
            dynamic=dynamic,
        )
    yield single("GroupNormalization", {"x": _x(2, 4, 3), "s": _x(2), "b": _x(2)}, num_groups=2, version=18)
    yield single("GroupNormalization", {"x": _x(2, 4, 3, 2), "s": _x(4), "b": _x(4)}, num_groups=2)
    yield single("Einsum", {"a": _x(2, 3, 4), "b": _x(2, 5, 4)}, equation="bij,bkj->bik")
    yield single("Einsum", {"a": _x(3, 4), "b": _x(4)}, equation="ij,k->k")
    yield single("Pow", {"x": np.abs(_x(3, 2)) + 1, "p": _x(2)}, name="live exponent")
    yield single("Mod", {"a": _x(3, 4) * 5, "b": np.abs(_x(4)) + 1}, fmod=1)
    yield single("Max", {"a": _x(3, 4), "b": _x(4), "c": _x(3, 1)})
    yield single("Clip", {"x": _x(9), "low": np.array(-0.5, np.float32), "high": np.array(0.7, np.float32)})
    yield single("HardSigmoid", {"x": 4 * _x(20)}, alpha=1 / 6, beta=0.5)
    yield single("HardSwish", {"x": 3 * _x(20)})
    yield single(
        "LpNormalization", {"x": _x(3, 4)}, axis=0, p=1, function=lambda x: x / np.abs(x).sum(axis=0, keepdims=True)
    )
    yield single("Swish", {"x": _x(9)}, alpha=1.5, version=24)
    yield single("Cast", {"x": _x(5)}, to=TensorProto.FLOAT)
    yield single("CastLike", {"x": _x(5), "like": _x(1)})
    yield single("Celu", {"x": _x(9)}, alpha=2.0)
    yield single("CumSum", {"x": _x(3, 4), "a": np.array(1, np.int64)}, exclusive=1)
    yield single("Trilu", {"x": _x(3, 4)}, upper=0)


def _einsums() -> Iterator[Case]:
    square, stack = _x(4, 4), _x(2, 3, 4)
    for dynamic in (None, ()):
        for equation, feeds in {
            "...ij,...jk": {"a": stack, "b": _x(4, 5)},
            "...ij,jk...->...ik": {"a": stack, "b": _x(4, 5, 2)},
            "a...b,...b->a...": {"a": stack, "b": _x(1, 4)},
            "ii->i": {"a": square},
            "ii": {"a": square},
            "...ii->...": {"a": _x(2, 4, 4)},
            "iji,jk->ik": {"a": _x(4, 3, 4), "b": _x(3, 2)},
            "iii->i": {"a": _x(3, 3, 3)},
            "ij,jk,kl,i->l": {"a": _x(2, 3), "b": _x(3, 4), "c": _x(4, 2), "d": _x(2)},
            ",ij->ij": {"a": _x(), "b": square},
            ",": {"a": _x(), "b": _x()},
            "ij->": {"a": square},
            "BA,cB->Ac": {"a": _x(2, 3), "b": _x(4, 2)},
            "i j , j -> i": {"a": _x(2, 3), "b": _x(3)},
        }.items():
            yield single("Einsum", feeds, equation=equation, dynamic=dynamic)


def _scattered() -> Iterator[Case]:
    x, places = _x(3, 4), np.array([[0, -1, 1, 2], [0, 2, 1, 2]])
    for dynamic in (None, ("i",)):
        for reduction in ("none", "add", "mul", "max", "min"):
            feeds = {
                "x": x,
                "i": places[:1] if reduction == "none" else places,
                "u": _x(1 if reduction == "none" else 2, 4),
            }
            yield single("ScatterElements", feeds, axis=0, reduction=reduction, dynamic=dynamic)
            feeds = {
                "x": _x(3, 4, 2),
                "i": np.array([[0, 1], [2, -1], [-3, 2 if reduction == "none" else 1]]),
                "u": _x(3, 2),
            }
            yield single("ScatterND", feeds, reduction=reduction, dynamic=dynamic)
        yield single(
            "TensorScatter",
            {"x": _x(2, 3, 5, 4), "u": _x(2, 3, 3, 4), "i": _i(3, 1)},
            mode="circular",
            version=24,
            dynamic=dynamic,
        )
        yield single("TensorScatter", {"x": _x(2, 5, 4), "u": _x(2, 3, 4)}, axis=1, version=24, dynamic=dynamic)
    yield single("ScatterElements", {"x": x, "i": np.array([[1, 1, 3]]), "u": _x(1, 3)}, axis=-1, name="duplicates")
    yield single("ScatterND", {"x": x, "i": np.array([[1], [0], [-2]]), "u": _x(3, 4)}, name="duplicates")
    yield single("ScatterND", {"x": _x(4), "i": np.array([[[2], [0]]]), "u": _x(1, 2)}, reduction="mul")
    yield single("Scatter", {"x": x, "i": places[:1], "u": _x(1, 4)}, axis=0, version=10, function=_scatter)


def _scatter(x: np.ndarray, updates: np.ndarray) -> np.ndarray:
    written = x.astype(np.float64)
    written[[0, 2, 1, 2], [0, 1, 2, 3]] = updates[0]
    return written


def _selected() -> Iterator[Case]:
    x, mask = _x(3, 4), np.array([False, True, True])
    for dynamic in (None, ("i",)):
        yield single("Compress", {"x": x, "i": mask}, axis=-1, dynamic=dynamic)
        yield single("Compress", {"x": x, "i": mask}, axis=0, dynamic=dynamic)
        yield single("Compress", {"x": x, "i": mask}, dynamic=dynamic)
        yield single("Compress", {"x": x, "i": mask[1:]}, axis=1, dynamic=dynamic, name="short")
        yield single("Unique", {"x": x}, outputs=4, dynamic=dynamic)
        yield single("Unique", {"x": x}, outputs=2, sorted=0, dynamic=dynamic, function=np.ravel)
        yield single("Unique", {"x": x}, axis=1, dynamic=dynamic)
        yield single("OneHot", {"i": _i(1, -1, 7), "d": np.array(4), "v": _x(2)}, axis=0, dynamic=dynamic)
        yield single("OneHot", {"i": np.array([[1, 0]]), "d": np.array(3), "v": _x(2)}, axis=-2, dynamic=dynamic)
        yield single(
            "ReverseSequence", {"x": _x(3, 4, 2), "i": _i(1, 3, 4)}, batch_axis=0, time_axis=1, dynamic=dynamic
        )
        yield single("ReverseSequence", {"x": _x(4, 3), "i": _i(1, 3, 4)}, dynamic=dynamic)
        for attributes in ({}, {"exclusive": 1}, {"reverse": 1}, {"exclusive": 1, "reverse": 1}):
            for name in ("CumSum", "CumProd"):
                yield single(name, {"x": x, "i": np.array(-1)}, version=26, dynamic=dynamic, **attributes)
    yield single("Range", {"a": np.float32(1.0), "b": np.float32(3.1), "c": np.float32(0.5)})
    yield single("Range", {"a": np.float32(1.0), "b": np.float32(-3.1), "c": np.float32(-0.5)}, name="downwards")
    for size in (1, 2, 5):
        yield single("Det", {"x": _x(size, size)}, name=f"{size}")
        yield single("Det", {"x": _x(2, 3, size, size)}, name=f"batch of {size}")


def _spectra() -> Iterator[Case]:
    real, complex_ = _x(2, 6, 3, 1), _x(2, 6, 3, 2)
    for dynamic in (None, ("n",)):
        for x in (real, complex_):
            for length in (5, 6, 8):
                yield single("DFT", {"x": x, "n": np.array(length)}, axis=1, version=17, dynamic=dynamic)
                feeds = {"x": x, "n": np.array(length), "i": np.array(-3)}
                yield single("DFT", feeds, inverse=1, version=20, dynamic=dynamic)
        for length in (5, 6, 7):
            feeds = {"x": real, "n": np.array(length), "i": np.array(1)}
            yield single("DFT", feeds, onesided=1, version=20, dynamic=dynamic)
            feeds = {"x": complex_[:, : length // 2 + 1], "n": np.array(length)}
            yield single("DFT", feeds, onesided=1, inverse=1, axis=1, version=17, dynamic=dynamic)
        yield single("DFT", {"x": complex_}, version=20, dynamic=dynamic)
        yield single("DFT", {"x": complex_}, onesided=1, inverse=1, version=20, dynamic=dynamic)
        signal, window = _x(2, 20, 1), np.abs(_x(8))
        for onesided in (0, 1):
            feeds = {"x": signal, "s": np.array(3), "w": window, "l": np.array(8)}
            yield single("STFT", feeds, onesided=onesided, version=17, dynamic=dynamic)
        yield single(
            "STFT", {"x": _x(2, 20, 2), "s": np.array(5), "_w": window, "l": np.array(7)}, onesided=0, dynamic=dynamic
        )


def _reductions() -> Iterator[Case]:
    """Axes that only the run tells, none at all, and both readings of that."""
    x = _x(2, 3, 4)
    operators = ("ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd")
    for operator in (*operators, "ReduceSum", "ReduceSumSquare"):
        for dynamic in (None, (), ("a",)):
            for axes in (_i(), _i(-1), _i(2, 0)):
                for keepdims, noop in ((0, 0), (1, 0), (0, 1)):
                    attributes = {"keepdims": keepdims, "noop_with_empty_axes": noop}
                    yield single(
                        operator, {"x": x, "a": axes}, dynamic=dynamic, name=f"{axes} {attributes}", **attributes
                    )
        yield single(operator, {"x": _x(2, 1, 3), "a": _i(1)}, name="single")
    for operator in ("ReduceMax", "ReduceMean", "ReduceProd", "ReduceSum"):
        yield single(operator, {"x": _x()}, keepdims=0, name="scalar")
    yield single("ReduceSum", {"x": _x(2, 0, 3)}, keepdims=0, name="empty")
    yield single("ReduceLogSum", {"x": np.abs(x) + 1, "a": _i(1)}, dynamic=("a",), keepdims=0)
