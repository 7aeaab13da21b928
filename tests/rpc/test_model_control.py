"""Loading and unloading models while the server answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from explainserve.settings import Settings
from explainserve.v1 import explainer_service_pb2 as pb
from explainserve.v1 import model_repository_service_pb2 as repository_pb
from explainserve.v1.model_repository_service_pb2_grpc import ModelRepositoryServiceStub
from rpc.conftest import LIMITS
from rpc.folder import WEIGHTS, write_plain, write_slow
from rpc.loopback import Array, Loopback, Refusal, normal, refusal, request, until

X = normal(1, 4, seed=81)


class Controlled:
    """A server of its own folder, whose models may be loaded and unloaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loopback = Loopback(Settings(models=folder, allow_model_control=True, **LIMITS))
        self.stub = ModelRepositoryServiceStub(self.loopback.channel)

    def load(self, name: str, version: int | None = None) -> tuple[int, str]:
        """The version that was loaded, and its state."""
        message = repository_pb.LoadModelRequest(model={"name": name, "version": version})
        return _line(self.stub.LoadModel(message, timeout=60).model)[1:]

    def unload(self, name: str, version: int | None = None) -> tuple[int, str]:
        message = repository_pb.UnloadModelRequest(model={"name": name, "version": version})
        return _line(self.stub.UnloadModel(message, timeout=60).model)[1:]

    def index(self) -> list[tuple[str, int, str]]:
        return [_line(model) for model in self.stub.IndexModels(repository_pb.IndexModelsRequest(), timeout=60).models]

    def listed(self) -> list[tuple[str, int, str]]:
        return [_line(model) for model in self.loopback.stub.ListModels(pb.ListModelsRequest(), timeout=60).models]

    def scores(self, name: str = "plain") -> Array:
        """All scores of X, which tell the models apart."""
        message = pb.PredictRequest(model={"named": {"name": name}}, include_tensors=True)
        message.inputs["x"].CopyFrom(request(name, {"x": X}).inputs["x"])
        tensor = self.loopback.stub.Predict(message, timeout=60).predictions[0].tensor
        return np.frombuffer(tensor.data, "<f4")

    def scale(self, name: str = "plain") -> float:
        """The scale of the weights of the version that answers."""
        return float(np.mean(np.arctanh(self.scores(name).astype(np.float64)) / (X @ WEIGHTS["plain"])[0]))

    def state(self, state: str) -> float:
        return self.loopback.metric("explainserve_models", state=state)


def _line(model: Any) -> tuple[str, int, str]:
    return (
        model.name,
        model.version,
        type(model)
        .DESCRIPTOR.fields_by_name["state"]
        .enum_type.values_by_number[model.state]
        .name.removeprefix("MODEL_STATE_"),
    )


@pytest.fixture
def controlled(tmp_path: Path) -> Iterator[Controlled]:
    write_plain(tmp_path, "plain")
    server = Controlled(tmp_path)
    yield server
    server.loopback.stop()


RPCS: dict[str, Callable[[ModelRepositoryServiceStub], object]] = {
    "IndexModels": lambda stub: stub.IndexModels(repository_pb.IndexModelsRequest(), timeout=60),
    "LoadModel": lambda stub: stub.LoadModel(repository_pb.LoadModelRequest(model={"name": "plain"}), timeout=60),
    "UnloadModel": lambda stub: stub.UnloadModel(repository_pb.UnloadModelRequest(model={"name": "plain"}), timeout=60),
}


@pytest.mark.parametrize("rpc", RPCS)
def test_it_is_off_unless_it_is_allowed(service: Loopback, rpc: str) -> None:
    refused = refusal(lambda: RPCS[rpc](ModelRepositoryServiceStub(service.channel)))

    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_CONTROL_OFF")
    assert refused.metadata == {"setting": "allow_model_control"}


def test_what_lies_in_the_folder_is_indexed_and_can_be_loaded(controlled: Controlled) -> None:
    write_plain(controlled.folder, "later", scale=3)

    assert controlled.listed() == [("plain", 1, "READY")]
    assert controlled.index() == [("later", 1, "UNLOADED"), ("plain", 1, "READY")]
    assert controlled.load("later") == (1, "READY")
    assert controlled.index() == controlled.listed() == [("later", 1, "READY"), ("plain", 1, "READY")]
    assert controlled.scale("later") == pytest.approx(3, rel=1e-3)
    assert controlled.state("ready") == 2


def test_without_a_version_the_highest_in_the_folder_is_loaded(controlled: Controlled) -> None:
    for version in (2, 3):
        write_plain(controlled.folder, "plain", scale=version / 2, version=version)

    assert controlled.load("plain") == (3, "READY")
    assert controlled.scale() == pytest.approx(1.5, rel=1e-3)
    assert controlled.index()[1] == ("plain", 2, "UNLOADED")


def test_a_version_is_loaded_anew_from_the_folder_as_it_is_now(controlled: Controlled) -> None:
    write_plain(controlled.folder, "plain", scale=0.5)

    assert controlled.scale() == pytest.approx(1, rel=1e-3)
    assert controlled.load("plain", 1) == (1, "READY")
    assert controlled.scale() == pytest.approx(0.5, rel=1e-3)


def test_a_version_that_cannot_be_loaded_leaves_the_one_that_is_served(controlled: Controlled) -> None:
    path = write_plain(controlled.folder, "plain", scale=0.5)
    path.write_bytes(path.read_bytes()[:-20])
    refused = refusal(lambda: controlled.load("plain"))

    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_FILE_CORRUPT")
    assert controlled.listed() == [("plain", 1, "READY")]
    assert controlled.scale() == pytest.approx(1, rel=1e-3)


def test_a_version_that_was_not_served_and_cannot_be_loaded_says_why(controlled: Controlled) -> None:
    path = write_plain(controlled.folder, "bad")
    path.write_bytes(b"no model")
    reason = refusal(lambda: controlled.load("bad")).reason
    (entry, _) = controlled.loopback.stub.ListModels(pb.ListModelsRequest(), timeout=60).models

    assert entry.error_reason == reason
    assert controlled.listed()[0] == ("bad", 1, "FAILED")
    assert controlled.state("failed") == 1
    write_plain(controlled.folder, "bad")
    assert controlled.load("bad") == (1, "READY")
    assert controlled.state("failed") == 0


def test_what_was_unloaded_is_not_found_and_can_come_back(controlled: Controlled) -> None:
    assert controlled.unload("plain") == (1, "UNLOADED")
    refused = refusal(controlled.scores)

    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_UNLOADED")
    assert refused.metadata == {"model": "plain", "version": "1"}
    assert controlled.listed() == controlled.index() == [("plain", 1, "UNLOADED")]
    assert (controlled.state("ready"), controlled.state("unloaded")) == (0, 1)
    assert controlled.unload("plain") == (1, "UNLOADED")
    assert controlled.load("plain") == (1, "READY")
    assert controlled.scale() == pytest.approx(1, rel=1e-3)


def test_the_next_lower_version_answers_in_place_of_one_that_was_unloaded(controlled: Controlled) -> None:
    write_plain(controlled.folder, "plain", scale=2, version=2)
    controlled.load("plain")

    assert controlled.unload("plain") == (2, "UNLOADED")
    assert controlled.scale() == pytest.approx(1, rel=1e-3)


def test_what_has_left_the_folder_is_served_until_it_is_unloaded(controlled: Controlled) -> None:
    shutil.rmtree(controlled.folder / "plain")

    assert refusal(lambda: controlled.load("plain")).reason == "UNKNOWN_MODEL"
    assert controlled.scale() == pytest.approx(1, rel=1e-3)
    controlled.unload("plain")
    assert refusal(lambda: controlled.load("plain")).reason == "UNKNOWN_MODEL"
    assert controlled.listed() == []


@pytest.mark.parametrize("name", ["nothing", "..", "../plain", "plain/1", "", "."])
def test_only_models_of_the_folder_can_be_named(controlled: Controlled, name: str) -> None:
    refusals: list[Refusal] = [refusal(lambda: controlled.load(name)), refusal(lambda: controlled.unload(name))]

    assert {each.reason for each in refusals} == {"UNKNOWN_MODEL" if name else "MODEL_REQUIRED"}


def test_a_version_that_does_not_exist_is_not_found(controlled: Controlled) -> None:
    for change in (controlled.load, controlled.unload):
        refused = refusal(lambda change=change: change("plain", 9))  # type: ignore[misc]
        assert (refused.reason, refused.metadata["versions"]) == ("UNKNOWN_VERSION", "1")
    assert refusal(lambda: controlled.load("plain", -1)).reason == "VERSION_INVALID"


@pytest.mark.parametrize("change", ["load", "unload"])
def test_running_requests_finish_on_the_model_that_they_have(controlled: Controlled, change: str) -> None:
    write_slow(controlled.folder)
    controlled.load("slow")
    message = request("slow", {"x": X}, methods=[{"integrated_gradients": {"step_count": 200}}])
    alone = controlled.loopback.stub.Explain(message, timeout=60)
    running = controlled.loopback.stub.Explain.future(message, timeout=60)
    until(lambda: controlled.loopback.metric("explainserve_active_requests", method="Explain") == 1)
    shutil.rmtree(controlled.folder / "slow")
    shutil.copytree(controlled.folder / "plain", controlled.folder / "slow")

    getattr(controlled, change)("slow")
    was_running = not running.done()
    finished = running.result()

    assert was_running
    assert finished.provenance.model_sha256 == alone.provenance.model_sha256
    assert finished.attributions == alone.attributions


def test_a_load_goes_on_when_its_caller_leaves(controlled: Controlled) -> None:
    write_plain(controlled.folder, "later")
    loading = controlled.stub.LoadModel.future(repository_pb.LoadModelRequest(model={"name": "later"}), timeout=60)
    until(lambda: ("later", 1, "LOADING") in controlled.listed())
    loading.cancel()

    until(lambda: ("later", 1, "READY") in controlled.listed())
