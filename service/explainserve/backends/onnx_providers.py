"""The execution providers of onnxruntime: their options, the precisions that they have, and how they are fed.

None of these options is taken as it is by default: onnxruntime's own are for one model that runs alone, as fast as it
may, in TensorFloat-32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from explainserve.backends.contract import LoadOptions
from explainserve.errors import ModelRefused
from explainserve.model_config import Precision

CPU = "CPUExecutionProvider"

Options = dict[str, str]
_TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"
"""The only way to keep TensorRT from TensorFloat-32: for the whole process, and read once."""


@dataclass(frozen=True)
class Provider:
    """An execution provider.

    Attributes:
        name: what onnxruntime calls it.
        options: of a session, from the number of the device, and a folder for what it compiles where there is one.
        memory: the kind of memory that it computes in, as onnxruntime calls it.
        missing: why it has no kernels of a precision, or "".
        helpers: names of devices whose providers take the nodes that this one lacks, before the CPU does.
        binds: whether rows go in and sums come out through buffers in its memory, of a few sizes.
        captures: whether it can record what it runs and run it again as a whole.
        embeds: whether it is handed the serialized graph, and cannot follow references to weights.
    """

    name: str
    options: Callable[[str, LoadOptions, Path | None], Options]
    missing: Callable[[Precision], str]
    memory: str = "cpu"
    helpers: tuple[str, ...] = ()
    binds: bool = False
    captures: bool = False
    embeds: bool = False


def _cuda_options(index: str, options: LoadOptions, compiled: Path | None) -> Options:
    tensor_cores = options.precision is not Precision.FLOAT32
    return {
        "device_id": index,
        "use_tf32": str(int(options.precision is Precision.TF32)),  # on by default, but float32 means float32
        "prefer_nhwc": str(int(tensor_cores)),  # the layout that these compute convolutions in
        "enable_cuda_graph": str(int(options.captures)),
        "cudnn_conv_algo_search": "HEURISTIC",  # by default all are tried again for every new size of a micro-batch
        "arena_extend_strategy": "kSameAsRequested",  # by default the arena doubles, beside those of other sessions
    }


def _tensorrt_options(index: str, options: LoadOptions, compiled: Path | None) -> Options:
    found = {
        "device_id": index,
        "trt_fp16_enable": str(int(options.precision is Precision.FLOAT16)),
        "trt_bf16_enable": str(int(options.precision is Precision.BFLOAT16)),
    }
    if compiled is not None:  # building an engine takes minutes
        found |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(compiled)}
        found |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": str(compiled)}
    return found


def _openvino_options(index: str, options: LoadOptions, compiled: Path | None) -> Options:
    return {"device_type": "CPU", "precision": "FP32"}


_NO_BFLOAT16 = "onnxruntime has few kernels of bfloat16, and none on the CPU to compare gradients with"


def _missing_on_cpu(precision: Precision) -> str:
    reasons = {Precision.TF32: "TensorFloat-32 is a mode of CUDA devices", Precision.BFLOAT16: _NO_BFLOAT16}
    return reasons.get(precision, "")


def _missing_on_cuda(precision: Precision) -> str:
    return _NO_BFLOAT16 if precision is Precision.BFLOAT16 else ""


def _missing_on_tensorrt(precision: Precision) -> str:
    exact = os.environ.get(_TF32_OVERRIDE) == "0"
    if precision is Precision.FLOAT32 and not exact:
        return f"TensorRT computes in TensorFloat-32 unless the server is started with {_TF32_OVERRIDE}=0"
    if precision is Precision.TF32 and exact:
        return f"{_TF32_OVERRIDE}=0 turns TensorFloat-32 off"
    return ""


PROVIDERS: Mapping[str, Provider] = {
    "cpu": Provider(CPU, lambda index, options, compiled: {}, _missing_on_cpu),
    "cuda": Provider("CUDAExecutionProvider", _cuda_options, _missing_on_cuda, "cuda", binds=True, captures=True),
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        _tensorrt_options,
        _missing_on_tensorrt,
        "cuda",
        helpers=("cuda",),
        binds=True,
        embeds=True,
    ),
    "openvino": Provider("OpenVINOExecutionProvider", _openvino_options, _missing_on_cpu, embeds=True),
}
"""By the name of a device, without its number."""


def provider_of(device: str) -> Provider:
    """The provider of a device such as "cuda:1"."""
    return PROVIDERS[device.partition(":")[0]]


def session_providers(options: LoadOptions, compiled: Path | None = None) -> list[str | tuple[str, Options]]:
    """What a session is opened with, in the order in which nodes are handed out."""
    name, _, index = options.device.partition(":")
    chosen = [PROVIDERS[each] for each in (name, *PROVIDERS[name].helpers) if each != "cpu"]
    return [*((each.name, each.options(index or "0", options, compiled)) for each in chosen), CPU]


def require_precision(device: str, precision: Precision) -> None:
    """Passes what a device can compute in.

    Raises:
        ModelRefused: it has no kernels for it (PRECISION_UNAVAILABLE).
    """
    reason = provider_of(device).missing(precision)
    if reason:
        raise ModelRefused(
            "PRECISION_UNAVAILABLE",
            f"precision {precision.value!r} is not available for ONNX files on {device}: {reason}",
            precision=precision.value,
            device=device,
        )
