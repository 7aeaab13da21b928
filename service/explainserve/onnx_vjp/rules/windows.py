"""The geometry that convolution and pooling share: windows that slide over the spatial axes.

It is written as arithmetic on int64 vectors, one entry per spatial axis: what is static folds to constants, what is
dynamic stays in the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.shapes import Dimension


@dataclass(frozen=True)
class Windows:
    """Kernel, strides and dilations per spatial axis; padding before and after each, negative never, as int64 vectors.

    `pads` is the padding as node attributes have it, None where only the run tells.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: str
    after: str
    pads: tuple[int, ...] | None

    @property
    def rank(self) -> int:
        """The number of spatial axes."""
        return len(self.kernel)

    @property
    def axes(self) -> list[int]:
        """The spatial axes."""
        return list(range(2, 2 + self.rank))

    @property
    def spans(self) -> tuple[int, ...]:
        """The extent of a window, dilation included."""
        return tuple(dilation * (kernel - 1) + 1 for kernel, dilation in zip(self.kernel, self.dilations, strict=True))

    def reach(self, op: Emitter, y: str) -> str:
        """The extent of all windows together, where `y` has one element per window."""
        return op.Add(op.Mul(op.Sub(spatial(op, y), self._ones), list(self.strides)), list(self.spans))

    def missing(self, op: Emitter, x: str, y: str) -> str:
        """How many elements at the end of the padded input no window reaches; negative where windows go beyond."""
        return op.Sub(op.Add(op.Add(spatial(op, x), self.before), self.after), self.reach(op, y))

    def padded(self, op: Emitter, x: str) -> tuple[str, tuple[int, ...]]:
        """The input, and the padding that a node can apply to it: where only the run tells, it has been applied."""
        if self.pads is not None:
            return x, self.pads
        return op.Pad(x, self._around(op, self.before, self.after)), (0,) * 2 * self.rank

    def placed(self, op: Emitter, full: str, x: str) -> str:
        """All windows together, whose first element lies at minus the padding, filled or cut up to the extent of x."""
        lacking = op.Sub(op.Add(self.before, spatial(op, x)), spatial(op, full))
        filling = op.Max(lacking, op.array(np.zeros(self.rank, np.int64)))
        constant = op.constant(filling)
        if constant is None or constant.any():
            full = op.Pad(full, self._around(op, op.Sub(filling, filling), filling))
        return self.cut(op, full, x)

    def cut(self, op: Emitter, full: str, x: str) -> str:
        """The extent of x out of what starts at minus the padding and reaches at least as far."""
        start, size = self.before, spatial(op, x)
        sizes = op.constant(op.Sub(spatial(op, full), size))
        if sizes is not None and not sizes.any():
            return full
        return op.Slice(full, start, op.Add(start, size), self.axes)

    def _around(self, op: Emitter, before: str, after: str) -> str:
        return op.Concat([0, 0], before, [0, 0], after, axis=0)

    @property
    def _ones(self) -> list[int]:
        return [1] * self.rank


def spatial(op: Emitter, value: str) -> str:
    """The spatial sizes of (N, C, ...) as an int64 vector: a constant where they are static."""
    sizes = static((op.shape(value) or (None,) * 3)[2:])
    if sizes is not None:
        return op.array(np.array(sizes, np.int64))
    return op.Slice(op.dims(value), [2], [op.rank(value)])


def windows(op: Emitter, node: Node, kernel: Sequence[int]) -> Windows:
    """Read a node's window geometry, with auto_pad resolved to padding."""
    rank = len(kernel)
    strides = tuple(node.attribute("strides") or [1] * rank)
    dilations = tuple(node.attribute("dilations") or [1] * rank)
    pads = list(node.attribute("pads") or [0] * 2 * rank)
    mode = node.attribute("auto_pad", "NOTSET")
    if mode.startswith("SAME"):
        spans = [dilation * (size - 1) + 1 for size, dilation in zip(kernel, dilations, strict=True)]
        before, after = halves(op, _same_padding(op, node.inputs[0], spans, strides), mode)
    else:
        pads = [0] * 2 * rank if mode == "VALID" else pads
        before, after = op.array(np.array(pads[:rank])), op.array(np.array(pads[rank:]))
    return of_padding(op, kernel, strides, dilations, before, after)


def of_padding(
    op: Emitter, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], before: str, after: str
) -> Windows:
    """Windows with a padding that is given as vectors."""
    constant = op.constant(op.Concat(before, after, axis=0))
    pads = None if constant is None else tuple(int(pad) for pad in constant)
    return Windows(tuple(kernel), tuple(strides), tuple(dilations), before, after, pads)


def halves(op: Emitter, total: str, mode: str) -> tuple[str, str]:
    """A total padding before and after each axis; the odd element lies at the end in mode SAME_UPPER."""
    small = op.Div(total, op.array(np.array([2])))
    large = op.Sub(total, small)
    return (small, large) if mode == "SAME_UPPER" else (large, small)


def _same_padding(op: Emitter, x: str, spans: Sequence[int], strides: Sequence[int]) -> str:
    """As much as one window per stride needs: independent of the size where the stride is 1."""
    if all(stride == 1 for stride in strides):
        return op.array(np.array(spans) - 1)
    size, step, one = spatial(op, x), list(strides), [1] * len(strides)
    last = op.Mul(op.Div(op.Sub(size, one), step), step)
    return op.Max(op.Sub(op.Add(last, list(spans)), size), op.array(np.zeros(len(spans), np.int64)))


def static(dimensions: Sequence[Dimension]) -> tuple[int, ...] | None:
    """The dimensions where all of them are known, else None."""
    known = tuple(dimension for dimension in dimensions if isinstance(dimension, int))
    return known if len(known) == len(dimensions) else None
