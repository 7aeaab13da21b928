"""Files that onnxruntime saved with channels in blocks: how many channels make a block on this processor."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from explainserve.onnx_vjp.rules.microsoft.layouts import BLOCK_SIZE, BLOCKED

_CHANNELS = 64


def state_block_size(model: onnx.ModelProto) -> None:
    """Write the size of a block into the metadata of a model that is laid out in blocks, where `onnx_vjp` reads it."""
    size = _size() if any(node.domain == BLOCKED for node in model.graph.node) else None
    if size is not None:
        stated = {entry.key: entry.value for entry in model.metadata_props}
        helper.set_model_props(model, stated | {BLOCK_SIZE: str(size)})


def _size() -> int | None:
    """The distance at which the second column follows the first in a blocked image of two columns; None where
    onnxruntime blocks nothing, and will refuse the model for that.
    """
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, _CHANNELS, 1, 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("ReorderInput", ["x"], ["y"], domain=BLOCKED)], "blocks", [x], [y])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(BLOCKED, 1)]
    probe = helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString()
    columns = np.tile(np.arange(2, dtype=np.float32), (1, _CHANNELS, 1, 1))
    try:
        session = onnxruntime.InferenceSession(probe, providers=["CPUExecutionProvider"])
        (blocked,) = session.run(None, {"x": columns})
    except Exception:  # onnxruntime's own exceptions derive from Exception directly
        return None
    return int(blocked.argmax())
