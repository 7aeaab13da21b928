"""Poolings with ceil_mode whose shapes ONNX infers wrongly below operator set 22.

A window that would start behind the input and its leading padding is left out (operator set 22, and runtimes for every
set). Older inference counts it: 1 x 1 windows two apart on 8 columns would be five. Such poolings are rewritten to
round down over trailing padding that gives the same windows.
"""

from __future__ import annotations

import onnx
from onnx import NodeProto, helper

from explainserve.onnx_vjp.subgraphs import is_standard, subgraphs

RIGHT_SINCE = 22
_POOLS = ("AveragePool", "LpPool", "MaxPool")


def round_pools_down(graph: onnx.GraphProto) -> None:
    """Rewrite, in place, the poolings of a graph and its subgraphs that leave a window out."""
    for node in graph.node:
        for subgraph in subgraphs(node):
            round_pools_down(subgraph)
        if any(is_standard(node, pool) for pool in _POOLS):
            _round_down(node)


def _round_down(node: NodeProto) -> None:
    """Nothing, where no window can be left out, or where padding would count in an average."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    kernel = attributes.get("kernel_shape", ())
    ones = [1] * len(kernel)
    strides, dilations = (attributes.get(name, ones) for name in ("strides", "dilations"))
    pads = attributes.get("pads", [0] * (2 * len(kernel)))
    ends = pads[len(kernel) :]
    leaves_out = any(size <= stride + end for size, stride, end in zip(kernel, strides, ends, strict=False))
    explicit = attributes.get("auto_pad", b"NOTSET") == b"NOTSET" and list(dilations) == ones
    if not (attributes.get("ceil_mode") and leaves_out and explicit) or attributes.get("count_include_pad"):
        return
    kept = [attribute for attribute in node.attribute if attribute.name not in ("ceil_mode", "pads")]
    del node.attribute[:]
    node.attribute.extend(kept)
    trailing = [_trailing(*axis) for axis in zip(kernel, strides, ends, strict=True)]
    node.attribute.append(helper.make_attribute("pads", [*pads[: len(kernel)], *trailing]))


def _trailing(size: int, stride: int, end: int) -> int:
    """Trailing padding with which as many windows fit when counted down: all that start in time where windows are
    shorter than their stride and the padding; else as many as with a stride less one more.
    """
    return size - 1 if size <= stride + end else end + stride - 1
