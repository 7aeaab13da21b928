"""What holds for every test: no telemetry, no time limit on examples, and a reason where torch is missing."""

import os
import tempfile

import pytest
from hypothesis import settings

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
_cache = tempfile.TemporaryDirectory(prefix="explainserve-tests-")
os.environ["EXPLAINSERVE_CACHE"] = _cache.name  # each model is tried once, whatever number of servers load it
settings.register_profile("explainserve", deadline=None)  # how long an example takes says nothing on a busy machine
settings.load_profile("explainserve")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("torch"):
        pytest.importorskip("torch")
