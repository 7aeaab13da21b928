"""The geometry that convolution and pooling share: windows that slide over the spatial axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from explainserve.onnx_vjp.emitter import Emitter, Node
from explainserve.onnx_vjp.registry import Refusal
from explainserve.onnx_vjp.shapes import Dimension


@dataclass(frozen=True)
class Windows:
    """Kernel, strides and dilations per spatial axis; padding before and after each, negative never.

    `sizes` are the spatial sizes of the input and `counts` the numbers of windows, None where one of them is not known.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    sizes: tuple[int, ...] | None
    counts: tuple[int, ...] | None

    @property
    def rank(self) -> int:
        """The number of spatial axes."""
        return len(self.kernel)

    @property
    def spans(self) -> tuple[int, ...]:
        """The extent of a window, dilation included."""
        return tuple(dilation * (kernel - 1) + 1 for kernel, dilation in zip(self.kernel, self.dilations, strict=True))


def windows(op: Emitter, node: Node, kernel: Sequence[int]) -> Windows:
    """Read a node's window geometry, with auto_pad resolved to explicit padding."""
    rank = len(kernel)
    strides = tuple(node.attribute("strides") or [1] * rank)
    dilations = tuple(node.attribute("dilations") or [1] * rank)
    sizes, counts = _spatial(op, node.inputs[0], rank), _spatial(op, node.outputs[0], rank)
    pads = list(node.attribute("pads") or [0] * 2 * rank)
    mode = node.attribute("auto_pad", "NOTSET")
    if mode == "VALID":
        pads = [0] * 2 * rank
    elif mode.startswith("SAME"):
        spans = [dilation * (size - 1) + 1 for size, dilation in zip(kernel, dilations, strict=True)]
        totals = [_same_padding(*axis) for axis in zip(sizes, spans, strides, strict=True)]
        small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
        pads = small + large if mode == "SAME_UPPER" else large + small
    return Windows(
        tuple(kernel), strides, dilations, tuple(pads[:rank]), tuple(pads[rank:]), static(sizes), static(counts)
    )


def _spatial(op: Emitter, value: str, rank: int) -> tuple[Dimension, ...]:
    shape = op.shape(value)
    return shape[-rank:] if shape is not None else (None,) * rank


def static(dimensions: Sequence[Dimension]) -> tuple[int, ...] | None:
    """The dimensions where all of them are known, else None."""
    known = tuple(dimension for dimension in dimensions if isinstance(dimension, int))
    return known if len(known) == len(dimensions) else None


def _same_padding(size: Dimension, span: int, stride: int) -> int:
    if stride == 1:
        return span - 1
    if not isinstance(size, int):
        raise Refusal(
            "auto_pad SAME with a stride pads by an unknown input size",
            "fix the spatial sizes, or export explicit pads",
        )
    return max((-(-size // stride) - 1) * stride + span - size, 0)
