"""One server for all tests of the gRPC surface, over a real loopback connection."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")

from explainserve.settings import Settings
from explainserve.v1.explainer_service_pb2_grpc import ExplainerServiceStub
from rpc.folder import write_folder
from rpc.loopback import Loopback

LIMITS: dict[str, Any] = {
    "max_step_count": 512,
    "max_request_rows": 20_000,
    "max_waiting_rows": 30_000,
    "max_message_bytes": 2 * 1024 * 1024,
    "max_instances": 16,
    "thread_count": 1,
    "port": 0,
    "http_port": 0,
}
FEW = ("plain", "slow", "image", "wide")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder."""
    return write_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def service(folder: Path) -> Iterator[Loopback]:
    """The server that most tests share."""
    loopback = Loopback(Settings(models=folder, **LIMITS))
    yield loopback
    loopback.stop()


@pytest.fixture(scope="session")
def stub(service: Loopback) -> ExplainerServiceStub:
    """A client of it."""
    return service.stub


@pytest.fixture(scope="session")
def few_models(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that is loaded in a fraction of a second."""
    few = tmp_path_factory.mktemp("few")
    for name in FEW:
        shutil.copytree(folder / name, few / name)
    return few


@pytest.fixture
def serve(few_models: Path) -> Iterator[Callable[..., Loopback]]:
    """Starts further servers, by default of a few models; each is stopped after the test."""
    running: list[Loopback] = []

    def start(*, loaded: bool = True, **settings: Any) -> Loopback:
        running.append(Loopback(Settings(**{"models": few_models, **LIMITS, **settings}), loaded=loaded))
        return running[-1]

    yield start
    for loopback in running:
        loopback.stop()
