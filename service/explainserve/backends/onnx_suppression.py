"""Outputs of detectors that lie behind a non-maximum suppression, which are not served.

Which boxes a suppression keeps, how many and in which order changes with the input. Element i behind it is one box here
and another one there: no gradient says what made it high, and no value at a baseline compares with it.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from explainserve.errors import ModelRefused
from explainserve.onnx_vjp.graph import consumed
from explainserve.onnx_vjp.subgraphs import is_standard, subgraphs
from explainserve.signature import SuppressedOutput


def leave_out_suppressed(model: onnx.ModelProto) -> tuple[SuppressedOutput, ...]:
    """Drops the outputs that depend on a NonMaxSuppression, in place, and returns what they were.

    Raises:
        ModelRefused: no output would be left (OUTPUT_SUPPRESSED).
    """
    behind = _behind_suppression(model)
    outputs = list(model.graph.output)
    found = tuple(SuppressedOutput(value.name, behind[value.name]) for value in outputs if value.name in behind)
    if found and len(found) == len(outputs):
        raise ModelRefused("OUTPUT_SUPPRESSED", str(found[0]), output=found[0].name, node=found[0].node)
    del model.graph.output[:]
    model.graph.output.extend(value for value in outputs if value.name not in behind)
    return found


def _behind_suppression(model: onnx.ModelProto) -> dict[str, str]:
    """The tensors that depend on a suppression, be it on how many boxes it keeps, with the name of its node."""
    functions = {(own.domain, own.name) for own in model.functions if _suppress(own.node)}
    behind: dict[str, str] = {}
    for node in model.graph.node:
        if _suppress([node]) or (node.domain, node.op_type) in functions:
            suppression: str | None = node.name
        else:
            suppression = next((behind[name] for name in consumed(node) if name in behind), None)
        if suppression is not None:
            behind.update((name, suppression) for name in node.output if name)
    return behind


def _suppress(nodes: Iterable[onnx.NodeProto]) -> bool:
    """Whether one of the nodes is a suppression, or has one in its branches or body."""
    return any(
        is_standard(node, "NonMaxSuppression") or any(_suppress(graph.node) for graph in subgraphs(node))
        for node in nodes
    )
