"""onnxruntime sessions: threads, optimization, and the device they really run on."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from explainserve.backends.contract import LoadOptions
from explainserve.backends.onnx_providers import provider_of, session_providers
from explainserve.backends.onnx_weights import Weights
from explainserve.errors import ModelRefused, first_line, is_out_of_memory

logger = logging.getLogger(__name__)

_SPIN_MICROSECONDS = 50
"""How long a thread that waits for the next operator of a batch spins before it sleeps. Waking it takes longer than a
small operator; but on a busy machine long spinning takes the processor from who has work, and after a batch any does.
"""


def quiet() -> onnxruntime.RunOptions:
    """For runs whose failure is caught and told: onnxruntime would print it on standard error besides."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    return options


QUIET = quiet()


_RECORDING = "gpu_graph_id"
"""onnxruntime's option of a run: the number of the recording that it makes or starts, a "CUDA graph"."""
_UNRECORDED = -1


class Interruption:
    """Lets another thread end the runs of one evaluation: onnxruntime looks between nodes, those of loops included.

    Attributes:
        options: for every run of the evaluation that is in progress.
        ended: whether somebody ended it.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A new evaluation, which nobody has ended."""
        self.ended = False
        self.options = quiet()

    def begin_releasing(self) -> None:
        """The same, and its runs give the memory back that sessions keep between runs."""
        self.begin()
        self.options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def begin_recorded(self, number: int | None) -> onnxruntime.RunOptions:
        """Options for the next run of the same evaluation, which is recorded under a number, or not at all."""
        options = quiet()
        options.add_run_config_entry(_RECORDING, str(_UNRECORDED if number is None else number))
        self.options = options
        options.terminate = self.ended  # also where that was said just now
        return options

    def interrupt(self) -> None:
        """Makes the runs raise that are in progress, and those that are to come before the next evaluation."""
        self.ended = True
        self.options.terminate = True


def open_session(
    model: onnx.ModelProto, options: LoadOptions, weights: Weights | None = None
) -> onnxruntime.InferenceSession:
    """A session on `options.device`, of a model that may refer to `weights`.

    Raises:
        ModelRefused: onnxruntime refuses the graph (MODEL_NOT_RUNNABLE), or runs it elsewhere (DEVICE_UNAVAILABLE).
        MemoryError: memory ran out, which says nothing about the graph.
    """
    settings = _settings(options)
    if weights is not None and options.share_weights and options.device == "cpu":
        model = _optimized(model, options, weights)
        _share(settings, weights.values(model))
    compiled = _compiled(model, options)
    if weights is not None and provider_of(options.device).embeds:
        model = weights.embedded(model)
    elif weights is not None:
        _resolve(settings, weights.values(model))
    session = _session(model, settings, options, compiled)
    _check_provider(session, options.device)
    return session


def thread_count(options: LoadOptions) -> int:
    """Threads of one evaluation."""
    return options.thread_count or len(os.sched_getaffinity(0))


def _settings(options: LoadOptions) -> onnxruntime.SessionOptions:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = thread_count(options)
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.log_severity_level = 3  # errors
    settings.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_MICROSECONDS))
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    _share_arena()
    settings.add_session_config_entry("session.use_env_allocators", "1")
    # A plan of the memory for each shape that was ever run would be kept, with a block of its own for each.
    settings.enable_mem_pattern = False
    return settings


@functools.cache
def _share_arena() -> None:
    """One arena for all sessions of the process, few of which run at a time: each would keep the most it ever took."""
    host = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(host, onnxruntime.OrtArenaCfg({}))


def _compiled(model: onnx.ModelProto, options: LoadOptions) -> Path | None:
    """A folder of its own for each graph: TensorRT takes engines of other weights for those of this graph."""
    if options.cache is None or not provider_of(options.device).embeds:
        return None
    digest = hashlib.sha256(model.SerializeToString(deterministic=True))  # references hold digests of the weights
    digest.update(options.precision.value.encode())
    folder = options.cache / "engines" / digest.hexdigest()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _session(
    model: onnx.ModelProto, settings: Any, options: LoadOptions, compiled: Path | None = None
) -> onnxruntime.InferenceSession:
    try:
        providers = session_providers(options, compiled)
        return onnxruntime.InferenceSession(model.SerializeToString(), settings, providers)
    except Exception as error:  # onnxruntime's own exceptions derive from Exception directly
        if is_out_of_memory(error):
            raise MemoryError(first_line(error)) from error
        raise ModelRefused("MODEL_NOT_RUNNABLE", f"onnxruntime refuses the graph: {first_line(error)}") from error


def _resolve(settings: Any, values: Mapping[str, Any]) -> None:
    settings.add_external_initializers(list(values), list(values.values()))


def _share(settings: Any, values: Mapping[str, Any]) -> None:
    """Reads the weights where they are. onnxruntime must not optimize then: it would change some of them in place, and
    the shared ones would come back in their stead.
    """
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.add_session_config_entry("session.disable_prepacking", "1")
    for name, value in values.items():
        settings.add_initializer(name, value)


def _optimized(model: onnx.ModelProto, options: LoadOptions, weights: Weights) -> onnx.ModelProto:
    """What onnxruntime makes of a graph, short of layouts in blocks, which are copies of the weights; new weights are
    held with the others.
    """
    settings = _settings(options)
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    settings.add_session_config_entry("session.disable_prepacking", "1")
    _resolve(settings, weights.values(model))
    with tempfile.TemporaryDirectory() as folder:
        settings.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        _session(model, settings, options)
        optimized = onnx.load(settings.optimized_model_filepath)
    weights.take(optimized)
    return optimized


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
    if provider_of(options.device).name not in available:
        raise _unavailable(options.device, f"this onnxruntime has only {', '.join(available)}")
    if provider_of(options.device).memory == "cuda":
        onnxruntime.preload_dlls()
    open_session(_identity_model(), options)


def memory_of(device: str) -> tuple[str, int]:
    """Kind and number, as onnxruntime names them, of the memory that sessions of a device compute in."""
    kind, index = provider_of(device).memory, device.partition(":")[2]
    return (kind, 0 if kind == "cpu" else int(index or "0"))


def _check_provider(session: onnxruntime.InferenceSession, device: str) -> None:
    """onnxruntime falls back to the CPU without an error."""
    found = session.get_providers()
    if provider_of(device).name not in found:
        raise _unavailable(device, f"onnxruntime runs on {', '.join(found)}")


def _unavailable(device: str, why: str) -> ModelRefused:
    return ModelRefused("DEVICE_UNAVAILABLE", f"device {device!r} is unavailable: {why}", device=device)


def _identity_model() -> onnx.ModelProto:
    """The smallest model, to find out what a device's sessions run on."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "identity", [x], [y])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
