"""onnxruntime sessions: threads, optimization, and the device they really run on."""

from __future__ import annotations

import logging
import os
from typing import Any

import onnx
import onnxruntime

from explainserve.backends.contract import LoadOptions
from explainserve.errors import ModelRefused, first_line

logger = logging.getLogger(__name__)

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def open_session(model: onnx.ModelProto, options: LoadOptions) -> onnxruntime.InferenceSession:
    """A session on `options.device`.

    Raises:
        ModelRefused: onnxruntime refuses the graph (MODEL_NOT_RUNNABLE), or runs it elsewhere (DEVICE_UNAVAILABLE).
    """
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.thread_count or len(os.sched_getaffinity(0))
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.log_severity_level = 3  # errors
    # Threads that spin between batches take the processor from everything else on the machine.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), settings, _providers(options.device))
    except Exception as error:  # onnxruntime's own exceptions derive from Exception directly
        raise ModelRefused("MODEL_NOT_RUNNABLE", f"onnxruntime refuses the graph: {first_line(error)}") from error
    _check_provider(session, options.device)
    return session


def available_device(options: LoadOptions) -> str:
    """Where sessions really run: `options.device` with its number, or "cpu" where falling back to it is allowed.

    Raises:
        ModelRefused: the device is missing (DEVICE_UNAVAILABLE).
    """
    if options.device == "cpu":
        return "cpu"
    try:
        _try_device(options)
    except ModelRefused as error:
        if not options.allow_fallback:
            raise
        logger.warning("device %s is unavailable, models run on the CPU: %s", options.device, error.message)
        return "cpu"
    return options.device if ":" in options.device else f"{options.device}:0"


def _try_device(options: LoadOptions) -> None:
    available = onnxruntime.get_available_providers()
    if CUDA not in available:
        raise _unavailable(options.device, f"this onnxruntime has only {', '.join(available)}")
    onnxruntime.preload_dlls()
    open_session(_identity_model(), options)


def _providers(device: str) -> list[Any]:
    if device == "cpu":
        return [CPU]
    # float32 means float32: TensorFloat-32 is on by default there.
    return [(CUDA, {"device_id": device.partition(":")[2] or "0", "use_tf32": "0"}), CPU]


def _check_provider(session: onnxruntime.InferenceSession, device: str) -> None:
    """onnxruntime falls back to the CPU without an error."""
    found = session.get_providers()
    if (CPU if device == "cpu" else CUDA) not in found:
        raise _unavailable(device, f"onnxruntime runs on {', '.join(found)}")


def _unavailable(device: str, why: str) -> ModelRefused:
    return ModelRefused("DEVICE_UNAVAILABLE", f"device {device!r} is unavailable: {why}", device=device)


def _identity_model() -> onnx.ModelProto:
    """The smallest model, to find out what a device's sessions run on."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "identity", [x], [y])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
