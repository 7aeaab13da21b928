"""Which devices a server has, and which of them hold a model.

A device is a name such as "cpu", "cuda:1" or "cpu:0". Each has an engine of its own; several of the processor, "cpu:0"
and "cpu:1", share its cores.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence

from explainserve.errors import ModelRefused
from explainserve.model_config import ModelConfig

_NUMBERED = ("cuda", "tensorrt")
"""Kinds of devices of which a machine may have several."""


def cuda_device_count() -> int:
    """CUDA devices that this process may use (CUDA_VISIBLE_DEVICES), as the driver counts them; 0 without a driver."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def devices(stated: Sequence[str], count_cuda: Callable[[], int] = cuda_device_count) -> tuple[str, ...]:
    """The devices of a server, each once: "cuda" and "tensorrt" stand for all that there are, at least for the first,
    so that whoever loads a model says what is missing.
    """
    return tuple(dict.fromkeys(name for own in stated for name in _each(own, count_cuda)))


def thread_count(stated: int, devices: Sequence[str]) -> int:
    """Threads of one evaluation: as stated, or where that is 0 and several devices share the processor, their share."""
    sharing = sum(_kind(device) == "cpu" for device in devices)
    if stated or sharing < 2:
        return stated
    return max(1, len(os.sched_getaffinity(0)) // sharing)


def placed(config: ModelConfig, held: Mapping[str, int]) -> tuple[str, ...]:
    """Devices that a model is loaded on: all, or those that its model.toml names; where it wants fewer replicas, those
    that hold the least.

    Args:
        held: bytes of models that each device of the server holds, in the server's order.

    Raises:
        ModelRefused: the server has none of the named devices (NO_SUCH_DEVICE).
    """
    allowed = [device for device in held if not config.devices or {device, _kind(device)} & set(config.devices)]
    if not allowed:
        raise ModelRefused(
            "NO_SUCH_DEVICE",
            f"model.toml names {', '.join(config.devices)}; this server has {', '.join(held)}",
            devices=", ".join(config.devices),
            known=", ".join(held),
        )
    emptiest = sorted(allowed, key=lambda device: held[device])[: config.replicas]
    return tuple(device for device in allowed if device in emptiest)


def where_it_runs(device: str, found: str) -> str:
    """Name of the device that evaluates a model which was loaded for `device` and runs on `found`: another one where
    the device is missing and falling back to the processor is allowed.
    """
    return device if _kind(device) == _kind(found) else found


def _each(stated: str, count_cuda: Callable[[], int]) -> list[str]:
    if stated not in _NUMBERED:
        return [stated]
    return [f"{stated}:{index}" for index in range(max(1, count_cuda()))]


def _kind(device: str) -> str:
    return device.partition(":")[0]
