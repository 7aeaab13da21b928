"""What libraries say when memory ran out, as they say it."""

from __future__ import annotations

import pytest

from explainserve.errors import is_out_of_memory

ONNXRUNTIME = "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node. "


@pytest.mark.parametrize(
    "told",
    [
        "CUDA out of memory. Tried to allocate 166.00 MiB. GPU 0 has a total capacity of 8.00 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes",
        f"{ONNXRUNTIME}Status Message: /onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 void* onnxruntime::"
        "BFCArena::AllocateRawInternal(size_t, bool) Failed to allocate memory for requested buffer of size 939524096",
        f"{ONNXRUNTIME}CUDA failure 2: out of memory ; GPU=0 ; hostname=host ; expr=cudaMalloc((void**)&p, size);",
        f"{ONNXRUNTIME}CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0 ; expr=cublasCreate(&cublas_handle_);",
        f"{ONNXRUNTIME}CUDNN failure 4004: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED ; GPU=0",
        "std::bad_alloc",
    ],
)
def test_memory_that_ran_out_is_recognised(told: str) -> None:
    assert is_out_of_memory(RuntimeError(told))


@pytest.mark.parametrize(
    "told",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`",
        f"{ONNXRUNTIME}CUDNN failure 5003: CUDNN_STATUS_EXECUTION_FAILED_CUDART ; GPU=0",
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
    ],
)
def test_other_failures_are_not_taken_for_it(told: str) -> None:
    assert not is_out_of_memory(RuntimeError(told))
