"""GridSample, AffineGrid, DeformConv and an aligned Resize in float64, by dense interpolation matrices.

onnx's reference evaluator holds their coordinates in float32, which no central difference can use.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from onnx import NodeProto, helper

from onnx_vjp.vjp_oracle import Function


def _attributes(node: NodeProto) -> dict[str, object]:
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def _sampled(image: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
    """(C, ...) read at points: one matrix (points, size) of weights per axis."""
    letters = "hwd"[: len(weights)]
    return np.einsum(f"c{letters},{','.join('p' + letter for letter in letters)}->cp", image, *weights)


def _keys(distance: np.ndarray) -> np.ndarray:
    near = ((1.25 * distance - 2.25) * distance) * distance + 1
    far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


_KERNELS = {"linear": (1, lambda distance: np.maximum(1 - distance, 0)), "cubic": (2, _keys)}


def _mirrored(value: np.ndarray, low: float, high: float) -> np.ndarray:
    turn = 2 * max(high - low, 1)
    rest = np.mod(value - low, turn)
    return low + np.minimum(rest, turn - rest)


def _weights(value: np.ndarray, size: int, mode: str, padding: str, margin: float) -> np.ndarray:
    """(points, size): how much of each pixel a coordinate reads, neighbour by neighbour."""
    low, high = -margin, size - 1 + margin
    value = np.rint(value) if mode == "nearest" else value
    if padding == "border" and mode == "linear":
        value = np.clip(value, 0, size - 1)
    reach, kernel = _KERNELS.get(mode, (0, np.ones_like))
    matrix, points = np.zeros((len(value), size)), np.arange(len(value))
    for step in range(1 - reach, reach + 1) if reach else (0,):
        position = np.floor(value) + step
        weight = kernel(np.abs(value - position))
        if padding == "zeros":
            weight = np.where((position < 0) | (position >= size), 0, weight)
        elif padding == "reflection":
            position = _mirrored(position, low, high)
        np.add.at(matrix, (points, np.clip(position, 0, size - 1).astype(int)), weight)
    return matrix


def grid_sample(node: NodeProto, _: dict[str, np.ndarray]) -> Function:
    """GridSample of any rank."""
    chosen = {"mode": "linear", "padding_mode": "zeros", "align_corners": 0, **_attributes(node)}
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(str(chosen["mode"]), str(chosen["mode"]))
    margin = 0.0 if chosen["align_corners"] else 0.5

    def function(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
        sizes = x.shape[2:]
        points = grid.reshape(len(grid), -1, len(sizes))[..., ::-1]
        values = (points * (np.array(sizes) - 1 + 2 * margin) + np.array(sizes) - 1) / 2
        read = [
            _sampled(
                image,
                [
                    _weights(v, size, mode, str(chosen["padding_mode"]), margin)
                    for v, size in zip(rows.T, sizes, strict=True)
                ],
            )
            for image, rows in zip(x, values, strict=True)
        ]
        return np.stack(read).reshape(*x.shape[:2], *grid.shape[1:-1])

    return function


def affine_grid(node: NodeProto, feeds: dict[str, np.ndarray]) -> Function:
    """AffineGrid for the size that the case feeds."""
    aligned = _attributes(node).get("align_corners", 0)
    sizes = [int(size) for size in feeds[node.input[1]][2:]]
    lines = [np.linspace(-1, 1, size) * (1 if aligned else (size - 1) / size) for size in sizes]
    points = np.stack([*np.meshgrid(*lines, indexing="ij")[::-1], np.ones(sizes)], axis=-1)
    return lambda theta, *_: np.einsum("nij,...j->n...i", theta, points)


def deform_conv(node: NodeProto, feeds: dict[str, np.ndarray]) -> Function:
    """DeformConv of rank 2, output position by kernel position."""
    chosen = {
        "group": 1,
        "offset_group": 1,
        "strides": [1, 1],
        "dilations": [1, 1],
        "pads": [0] * 4,
        **_attributes(node),
    }
    roles = ("x", "w", "offset", "b", "mask")
    present = [role for role, name in zip(roles, node.input, strict=False) if name]

    def function(*values: np.ndarray) -> np.ndarray:
        given = dict(zip(present, values, strict=True))
        x, w, offset = given["x"], given["w"], given["offset"]
        groups, offset_groups, taps = int(chosen["group"]), int(chosen["offset_group"]), int(np.prod(w.shape[2:]))
        batch, _, *out = offset.shape
        offset = offset.reshape(batch, offset_groups, taps, 2, *out)
        mask = given.get("mask", np.ones((batch, offset_groups * taps, *out))).reshape(batch, offset_groups, taps, *out)
        columns = np.zeros((batch, x.shape[1], taps, *out))
        share = x.shape[1] // offset_groups
        for n, o, tap in product(range(batch), range(offset_groups), range(taps)):
            weights = []
            for axis, within in enumerate(np.unravel_index(tap, w.shape[2:])):
                start = np.arange(out[axis]) * chosen["strides"][axis] - chosen["pads"][axis]
                start = start + within * chosen["dilations"][axis]
                moved = start.reshape((-1, 1) if axis == 0 else (1, -1)) + offset[n, o, tap, axis]
                weights.append(_weights(moved.ravel(), x.shape[2 + axis], "linear", "zeros", 0.5))
            channels = slice(o * share, (o + 1) * share)
            read = _sampled(x[n, channels], weights).reshape(share, *out)
            columns[n, channels, tap] = read * mask[n, o, tap]
        split = columns.reshape(batch, groups, -1, *out)
        kernels = w.reshape(groups, w.shape[0] // groups, -1)
        y = np.einsum("gmk,ngkhw->ngmhw", kernels, split).reshape(batch, w.shape[0], *out)
        return y + given["b"].reshape(-1, 1, 1) if "b" in given else y

    return function


def aligned_resize(node: NodeProto, feeds: dict[str, np.ndarray]) -> Function:
    """Resize of the last two axes with aligned corners, by the length that the result has.

    The reference evaluator and the results that onnx publishes take the length before rounding; the specification's
    text, onnxruntime and torch take this one.
    """
    mode, scales = str(_attributes(node)["mode"]), feeds[node.input[2]]

    def function(x: np.ndarray, *_: np.ndarray) -> np.ndarray:
        value = x
        for axis in (2, 3):
            size, length = x.shape[axis], int(x.shape[axis] * scales[axis])
            positions = np.arange(length) * (size - 1) / max(length - 1, 1)
            matrix = _weights(positions, size, mode, "border", 0.0)
            value = np.moveaxis(np.moveaxis(value, axis, -1) @ matrix.T, -1, axis)
        return value

    return function


def max_unpool(_: NodeProto, feeds: dict[str, np.ndarray]) -> Function:
    """MaxUnpool into a given shape: positions count in the output, as onnxruntime and torch have it. The reference
    evaluator counts in the shape that the attributes tell, and pads it.
    """

    def function(x: np.ndarray, indices: np.ndarray, shape: np.ndarray) -> np.ndarray:
        flat = np.zeros(int(np.prod(shape)))
        flat[indices.ravel()] = x.ravel()
        return flat.reshape(shape)

    return function


def max_roi_pool(node: NodeProto, _: dict[str, np.ndarray]) -> Function:
    """MaxRoiPool, which the reference evaluator lacks, bin by bin."""
    chosen = {"spatial_scale": 1.0, **_attributes(node)}
    scale, pooled = float(chosen["spatial_scale"]), tuple(chosen["pooled_shape"])

    def function(x: np.ndarray, rois: np.ndarray) -> np.ndarray:
        y = np.zeros((len(rois), x.shape[1], *pooled))
        for r, (image, *corners) in enumerate(rois):
            left, top, right, bottom = (int(np.floor(corner * scale + 0.5)) for corner in corners)
            extents = [(top, max(bottom - top + 1, 1)), (left, max(right - left + 1, 1))]
            for cell in np.ndindex(*pooled):
                bounds = []
                for at, count, (start, length), size in zip(cell, pooled, extents, x.shape[2:], strict=True):
                    low, high = np.floor(at * length / count) + start, np.ceil((at + 1) * length / count) + start
                    bounds.append(slice(*np.clip([low, high], 0, size).astype(int)))
                window = x[int(image)][:, bounds[0], bounds[1]]
                y[(r, slice(None), *cell)] = window.max(axis=(1, 2)) if window.size else 0
        return y

    return function


# By operator, or by the name of a case.
ORACLES = {
    "AffineGrid": affine_grid,
    "DeformConv": deform_conv,
    "GridSample": grid_sample,
    "MaxRoiPool": max_roi_pool,
    "test_maxunpool_export_with_output_shape": max_unpool,
    "test_resize_downsample_scales_cubic_align_corners": aligned_resize,
    "test_resize_downsample_scales_linear_align_corners": aligned_resize,
}
