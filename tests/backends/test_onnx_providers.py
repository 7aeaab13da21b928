"""The table of execution providers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from explainserve.backends import onnx_session, precision
from explainserve.backends.contract import LoadOptions
from explainserve.backends.onnx_providers import CPU, PROVIDERS, Options, require_precision, session_providers
from explainserve.backends.onnx_weights import Weights
from explainserve.errors import ModelRefused
from explainserve.model_config import Precision
from onnx_graphs import linear


def options(device: str, chosen: Precision = Precision.FLOAT32, compiled: Path | None = None) -> Options:
    """Of the provider of a device."""
    first = session_providers(LoadOptions(device, precision=chosen), compiled)[0]
    assert not isinstance(first, str)
    return first[1]


def names(device: str) -> list[str]:
    return [each if isinstance(each, str) else each[0] for each in session_providers(LoadOptions(device))]


@pytest.mark.parametrize("device", PROVIDERS)
def test_the_cpu_comes_last_and_once(device: str) -> None:
    found = names(device)

    assert found[0] == PROVIDERS[device].name
    assert found.index(CPU) == len(found) - 1


def test_cuda_takes_what_tensorrt_leaves() -> None:
    assert names("tensorrt:1") == ["TensorrtExecutionProvider", "CUDAExecutionProvider", CPU]
    assert {each[1]["device_id"] for each in session_providers(LoadOptions("tensorrt:1"))[:-1]} == {"1"}  # type: ignore[index]


def test_float32_on_cuda_is_not_tensorfloat() -> None:
    assert options("cuda")["use_tf32"] == "0"
    assert options("cuda", Precision.TF32)["use_tf32"] == "1"
    assert options("cuda:3")["device_id"] == "3"


@pytest.mark.parametrize("device", PROVIDERS)
@pytest.mark.parametrize("chosen", Precision)
def test_a_precision_is_had_or_refused_with_a_reason(device: str, chosen: Precision) -> None:
    try:
        require_precision(f"{device}:0", chosen)
    except ModelRefused as refusal:
        assert refusal.reason == "PRECISION_UNAVAILABLE"
        assert refusal.metadata == {"precision": chosen.value, "device": f"{device}:0"}
    else:
        assert session_providers(LoadOptions(device, precision=chosen))


def test_tensorrt_has_float32_or_tensorfloat_as_its_process_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    require_precision("tensorrt", Precision.TF32)
    with pytest.raises(ModelRefused, match="NVIDIA_TF32_OVERRIDE=0"):
        require_precision("tensorrt", Precision.FLOAT32)

    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    require_precision("tensorrt", Precision.FLOAT32)
    with pytest.raises(ModelRefused):
        require_precision("tensorrt", Precision.TF32)


def test_what_a_precision_is_compared_with_is_float32() -> None:
    assert precision.reference_options(LoadOptions("tensorrt:1")).device == "cpu"
    assert precision.reference_options(LoadOptions("cuda:1")).device == "cuda:1"


def test_tensorrt_is_told_the_precision_and_where_engines_are_kept(tmp_path: Path) -> None:
    assert options("tensorrt", Precision.FLOAT16)["trt_fp16_enable"] == "1"
    assert options("tensorrt", Precision.BFLOAT16)["trt_bf16_enable"] == "1"
    assert options("tensorrt", Precision.TF32)["trt_fp16_enable"] == "0"
    assert options("tensorrt", compiled=tmp_path)["trt_engine_cache_path"] == str(tmp_path)
    assert "trt_engine_cache_enable" not in options("tensorrt")


def test_engines_of_other_weights_or_another_precision_are_kept_apart(tmp_path: Path) -> None:
    """TensorRT's provider tells graphs apart by their nodes only."""
    folders = set()
    for weights in (np.ones((20, 20), np.float32), np.zeros((20, 20), np.float32)):
        for chosen in (Precision.TF32, Precision.FLOAT16):
            held, graph = Weights(), linear(weights)
            held.take(graph)
            folders.add(onnx_session._compiled(graph, LoadOptions("tensorrt", cache=tmp_path, precision=chosen)))

    assert len(folders) == 4 and None not in folders
    assert all(folder.is_dir() for folder in folders if folder)
    assert onnx_session._compiled(graph, LoadOptions("cuda", cache=tmp_path)) is None
    assert onnx_session._compiled(graph, LoadOptions("tensorrt")) is None
