"""Which devices a server has, and which of them hold a model."""

from __future__ import annotations

import os

import pytest

from explainserve.errors import ModelRefused
from explainserve.model_config import ModelConfig
from explainserve.placement import devices, placed, thread_count, where_it_runs


@pytest.mark.parametrize(
    ("stated", "count", "expected"),
    [
        (["cpu"], 4, ["cpu"]),
        (["cuda"], 3, ["cuda:0", "cuda:1", "cuda:2"]),
        (["cuda:2"], 3, ["cuda:2"]),
        (["cuda:1", "cuda"], 2, ["cuda:1", "cuda:0"]),
        (["tensorrt", "cpu"], 2, ["tensorrt:0", "tensorrt:1", "cpu"]),
        (["cpu:0", "cpu:1", "cpu:0"], 0, ["cpu:0", "cpu:1"]),
    ],
)
def test_kinds_stand_for_all_that_there_are(stated: list[str], count: int, expected: list[str]) -> None:
    assert devices(stated, lambda: count) == tuple(expected)


def test_a_kind_that_is_missing_stands_for_its_first() -> None:
    """So that loading a model says what is missing."""
    assert devices(["cuda"], lambda: 0) == ("cuda:0",)


def test_devices_of_the_processor_share_its_cores() -> None:
    cores = len(os.sched_getaffinity(0))

    assert thread_count(0, ["cpu:0", "cpu:1"]) == max(1, cores // 2)
    assert thread_count(3, ["cpu:0", "cpu:1"]) == 3
    assert thread_count(0, ["cpu", "cuda:0"]) == 0, "all of them"


HELD = {"cuda:0": 30, "cuda:1": 10, "cuda:2": 20, "cpu": 0}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ["cuda:0", "cuda:1", "cuda:2", "cpu"]),
        ({"devices": ["cuda"]}, ["cuda:0", "cuda:1", "cuda:2"]),
        ({"devices": ["cuda:2", "cuda:0"]}, ["cuda:0", "cuda:2"]),
        ({"devices": ["cuda"], "replicas": 1}, ["cuda:1"]),
        ({"devices": ["cuda"], "replicas": 2}, ["cuda:1", "cuda:2"]),
        ({"devices": ["cuda"], "replicas": 9}, ["cuda:0", "cuda:1", "cuda:2"]),
        ({"devices": ["cuda:1", "openvino"]}, ["cuda:1"]),
    ],
)
def test_a_model_is_placed_where_it_may_be_and_least_is_held(config: dict[str, object], expected: list[str]) -> None:
    assert placed(ModelConfig.model_validate(config), HELD) == tuple(expected)


def test_a_model_without_a_device_is_refused() -> None:
    with pytest.raises(ModelRefused) as refused:
        placed(ModelConfig(devices=("cuda:7",)), HELD)

    assert refused.value.reason == "NO_SUCH_DEVICE"
    assert refused.value.metadata == {"devices": "cuda:7", "known": "cuda:0, cuda:1, cuda:2, cpu"}


def test_the_device_that_is_told_is_the_one_that_evaluates() -> None:
    assert where_it_runs("cpu:1", "cpu") == "cpu:1"
    assert where_it_runs("cuda:1", "cuda:1") == "cuda:1"
    assert where_it_runs("cuda:1", "cpu") == "cpu", "it is missing, and the server may fall back"
