"""The model folder: what is found in it, what is refused and why, and that a bad model never stops the others."""

from __future__ import annotations

import gc
import hashlib
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from explainserve import backends
from explainserve.backends import LoadOptions
from explainserve.errors import EvaluationFailed, ModelRefused, NotFound, NotReady, Unsupported
from explainserve.model_folder import NO_VERSION, ModelFolder, discover
from explainserve.opening import DEFAULT_BATCH_ROWS, digest, model_files, open_model
from explainserve.repository import ModelEntry, ModelState, Repository
from explainserve.served_model import ServedModel
from models import MODELS, write_model
from onnx_graphs import linear, make_external, model, node, save

OPTIONS = LoadOptions(thread_count=1)
WEIGHTS = np.array([[1.0, -2.0], [0.5, 3.0], [-1.5, 0.25]], np.float32)
LABELLED = '[[outputs]]\nname = "y"\nkind = "logits"\nlabels = ["cat", "dog"]\n'


def put(root: Path, name: str = "net", version: int | str = 1, proto: onnx.ModelProto | None = None) -> Path:
    """Writes one version; returns its model file."""
    return save(linear(WEIGHTS) if proto is None else proto, root / name / str(version))


def configured(root: Path, text: str, proto: onnx.ModelProto | None = None) -> ServedModel:
    """The only model of `root`, with a model.toml."""
    put(root, proto=proto)
    (root / "net" / "model.toml").write_text(text)
    (folder,) = discover(root)
    return open_model(folder, OPTIONS)


def refused(root: Path, text: str) -> ModelRefused:
    with pytest.raises(ModelRefused) as caught:
        configured(root, text)
    return caught.value


@pytest.fixture
def forbid(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Takes the permission to read a file or folder, and what is in it; for root too, whom modes do not stop."""
    forbidden: set[Path] = set()

    def guarded(name: str) -> None:
        original = getattr(Path, name)

        def call(path: Path, *args: object, **named: object) -> object:
            stopped = forbidden & {path, *path.parents} if name != "stat" else forbidden.intersection(path.parents)
            if stopped:
                raise PermissionError(13, "Permission denied", str(path))
            return original(path, *args, **named)

        monkeypatch.setattr(Path, name, call)

    for name in ("iterdir", "open", "stat"):
        guarded(name)
    return forbidden.add


class TestDiscover:
    def test_versions_come_in_order_of_name_and_number(self, tmp_path: Path) -> None:
        for name, version in (("b", 2), ("b", 10), ("a", 1), ("b", 1)):
            put(tmp_path, name, version)

        found = discover(tmp_path)

        assert [(folder.name, folder.version) for folder in found] == [("a", 1), ("b", 1), ("b", 2), ("b", 10)]
        assert found[0].path == tmp_path / "a" / "1" / "model.onnx"
        assert found[0].format == "onnx"

    def test_hidden_folders_plain_files_and_other_folders_are_passed_over(self, tmp_path: Path) -> None:
        put(tmp_path)
        put(tmp_path, ".cache")
        put(tmp_path, "net", "01")
        put(tmp_path, "net", "latest")
        put(tmp_path, "net", "0")
        (tmp_path / "README.md").write_text("models")
        (tmp_path / "net" / "1" / "notes.txt").write_text("notes")

        assert [(folder.name, folder.version) for folder in discover(tmp_path)] == [("net", 1)]

    def test_a_version_without_a_model_and_a_model_without_a_version_are_told_of(self, tmp_path: Path) -> None:
        (tmp_path / "empty" / "3").mkdir(parents=True)
        save(linear(WEIGHTS), tmp_path / "flat")

        found = discover(tmp_path)

        assert [(folder.name, folder.version, folder.path) for folder in found] == [
            ("empty", 3, None),
            ("flat", NO_VERSION, None),
        ]
        for folder in found:
            with pytest.raises(ModelRefused) as caught:
                open_model(folder, OPTIONS)
            assert caught.value.reason == "NO_MODEL_FILE"

    def test_two_model_files_in_one_version_are_ambiguous(self, tmp_path: Path) -> None:
        (put(tmp_path).parent / "model.pt2").write_bytes(b"")
        (folder,) = discover(tmp_path)

        with pytest.raises(ModelRefused) as caught:
            open_model(folder, OPTIONS)
        assert caught.value.reason == "AMBIGUOUS_MODEL_FILE"
        assert caught.value.metadata["files"] == "model.onnx, model.pt2"

    @pytest.mark.parametrize("name", ["has space", "-flag", "_x", "naïve", "a" * 129])
    def test_a_bad_name_is_refused(self, tmp_path: Path, name: str) -> None:
        put(tmp_path, name)
        (folder,) = discover(tmp_path)

        with pytest.raises(ModelRefused) as caught:
            open_model(folder, OPTIONS)
        assert caught.value.reason == "BAD_MODEL_NAME"

    def test_the_configuration_of_a_version_replaces_the_one_beside_it(self, tmp_path: Path) -> None:
        put(tmp_path, version=1)
        put(tmp_path, version=2)
        (tmp_path / "net" / "model.toml").write_text(LABELLED)
        (tmp_path / "net" / "2" / "model.toml").write_text("default_target = 1")

        first, second = (open_model(folder, OPTIONS) for folder in discover(tmp_path))

        assert first.signature.outputs[0].labels == ("cat", "dog")
        assert (second.signature.outputs[0].labels, second.default_target) == ((), 1)

    def test_a_name_that_is_no_text_is_told_of_and_stops_no_other(self, tmp_path: Path) -> None:
        put(tmp_path, os.fsdecode(b"caf\xe9"))
        put(tmp_path, "good")
        repository = Repository(tmp_path, OPTIONS)
        repository.load_all()

        bad, good = repository.entries
        assert (bad.name, bad.error_reason) == ("caf\\xe9", "BAD_MODEL_NAME")
        assert "caf\\xe9" in bad.reason
        assert all(text.encode() for text in (bad.name, bad.reason))
        assert good.state is ModelState.READY

    def test_a_root_that_is_no_folder_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(NotFound) as caught:
            discover(tmp_path / "nowhere")
        assert caught.value.reason == "NO_MODELS_FOLDER"

    def test_only_the_log_tells_where_the_folder_should_be(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Clients are told of it too."""
        with pytest.raises(NotFound) as caught:
            discover(tmp_path / "nowhere")

        told = [caught.value.message, *caught.value.metadata.values()]
        assert not any("nowhere" in text for text in told)
        assert str(tmp_path / "nowhere") in caplog.text


class TestDigest:
    def test_it_is_the_files_own(self, tmp_path: Path) -> None:
        path = put(tmp_path)
        expected = hashlib.sha256(path.read_bytes()).hexdigest()

        assert digest(model_files(path)) == expected
        assert configured(tmp_path, f'sha256 = "{expected}"').sha256 == expected

    def test_external_data_belongs_to_it(self, tmp_path: Path) -> None:
        proto = model(
            [node("MatMul", ["x", "W"], ["z"]), node("Add", ["z", "b"], ["y"])],
            [("x", ["batch", 3])],
            [("y", ["batch", 2])],
            {"W": WEIGHTS, "b": np.zeros(2, np.float32)},
        )
        for tensor, location in zip(proto.graph.initializer, ("w.bin", "a.bin"), strict=True):
            tmp_path.joinpath(location).write_bytes(numpy_helper.to_array(tensor).tobytes())
            make_external(tensor, location=location)
        path = save(proto, tmp_path)
        contents = [path.read_bytes(), (tmp_path / "a.bin").read_bytes(), (tmp_path / "w.bin").read_bytes()]

        assert digest(model_files(path)) == hashlib.sha256(b"".join(contents)).hexdigest()

    def test_another_one_than_expected_is_refused_before_the_file_is_loaded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unexpected(*_: object) -> None:
            raise AssertionError("the file was loaded")

        monkeypatch.setattr(backends, "load", unexpected)
        error = refused(tmp_path, f'sha256 = "{"0" * 64}"')

        assert error.reason == "SHA256_MISMATCH"
        assert error.metadata["actual"] == digest([tmp_path / "net" / "1" / "model.onnx"])


class TestOpen:
    def test_the_model_is_probed_and_batched(self, tmp_path: Path) -> None:
        served = configured(tmp_path, "[limits]\nmax_batch_rows = 5")

        assert served.max_batch_rows == 5
        assert served.probe.rows_independent
        assert served.loaded.gradient_mode == "gradient_graph"

    def test_rows_of_a_batch_are_the_servers_where_the_model_states_none(self, tmp_path: Path) -> None:
        put(tmp_path)
        (folder,) = discover(tmp_path)

        assert open_model(folder, OPTIONS, max_batch_rows=7).max_batch_rows == 7

    def test_the_size_of_micro_batches_is_measured_where_there_is_time_to(self, tmp_path: Path) -> None:
        put(tmp_path)
        (folder,) = discover(tmp_path)
        timed, untimed = open_model(folder, OPTIONS, warm_up_seconds=10.0), open_model(folder, OPTIONS)

        assert timed.max_batch_rows <= DEFAULT_BATCH_ROWS
        assert timed.seconds_per_row is not None and timed.seconds_per_row > 0
        assert untimed.seconds_per_row is None

    def test_a_model_that_mixes_rows_is_evaluated_row_by_row(self, tmp_path: Path) -> None:
        nodes = [
            node("ReduceMean", ["x", "first"], ["mean"], keepdims=1),
            node("Sub", ["x", "mean"], ["z"]),
            node("MatMul", ["z", "W"], ["m"]),
            node("MatMul", ["x", "W"], ["n"]),
            node("Add", ["m", "n"], ["y"]),
        ]
        mixing = model(nodes, [("x", ["batch", 3])], [("y", ["batch", 2])], {"first": np.array([0]), "W": WEIGHTS})
        served = configured(tmp_path, "", mixing)

        assert not served.probe.rows_independent
        assert served.probe.warnings
        assert served.max_batch_rows == 1

    def test_a_fixed_batch_or_an_input_without_one_is_evaluated_row_by_row(self, tmp_path: Path) -> None:
        unbatched = model([node("Mul", ["x", "s"], ["y"])], [("x", ["batch", 3]), ("s", [3])], [("y", ["batch", 3])])

        assert configured(tmp_path, "", unbatched).max_batch_rows == 1

    @pytest.mark.parametrize(
        ("stated", "expected"), [('"dog"', 1), ('"cat"', 0), ("1", 1), ('"argmax"', None), (None, None)]
    )
    def test_the_default_target_is_resolved(self, tmp_path: Path, stated: str | None, expected: int | None) -> None:
        line = "" if stated is None else f"default_target = {stated}\n"

        assert configured(tmp_path, line + LABELLED).default_target == expected

    @pytest.mark.parametrize("stated", ['"fox"', "2", "-1"])
    def test_a_default_target_that_does_not_exist_is_refused(self, tmp_path: Path, stated: str) -> None:
        assert refused(tmp_path, f"default_target = {stated}\n{LABELLED}").reason == "CONFIG_MISMATCH"

    def test_data_baselines_are_read(self, tmp_path: Path) -> None:
        (tmp_path / "net").mkdir()
        np.save(tmp_path / "net" / "mean.npy", np.array([1, 2, 3]))
        baseline = configured(tmp_path, '[baselines.mean]\nfiles = {x = "mean.npy"}').data_baselines["mean"]["x"]

        np.testing.assert_array_equal(baseline, np.array([1, 2, 3], np.float32))
        assert baseline.dtype == np.float32

    def test_a_baseline_of_a_single_number_is_read(self, tmp_path: Path) -> None:
        doubled = model([node("Add", ["x", "x"], ["y"])], [("x", ["batch"])], [("y", ["batch"])])
        (tmp_path / "net").mkdir()
        np.save(tmp_path / "net" / "one.npy", np.array(3.0))
        served = configured(tmp_path, '[baselines.one]\nfiles = {x = "one.npy"}', doubled)

        assert served.data_baselines["one"]["x"].shape == ()

    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            (np.zeros(4), "CONFIG_MISMATCH"),
            (np.zeros((1, 3)), "CONFIG_MISMATCH"),
            (np.array([0.0, np.nan, 0.0]), "CONFIG_MISMATCH"),
            (np.array([{}, {}, {}]), "BASELINE_UNREADABLE"),
            (np.array(["a", "b", "c"]), "BASELINE_UNREADABLE"),
            (None, "BASELINE_UNREADABLE"),
        ],
    )
    def test_a_baseline_that_does_not_fit_is_refused(
        self, tmp_path: Path, values: np.ndarray | None, reason: str
    ) -> None:
        (tmp_path / "net").mkdir()
        if values is not None:
            np.save(tmp_path / "net" / "b.npy", values, allow_pickle=True)

        assert refused(tmp_path, '[baselines.b]\nfiles = {x = "b.npy"}').reason == reason

    def test_a_default_baseline_that_lacks_an_input_is_refused(self, tmp_path: Path) -> None:
        """Else the model is READY and every request that names no baseline fails."""
        (tmp_path / "net").mkdir()
        np.save(tmp_path / "net" / "a.npy", np.ones(3, np.float32))
        both = model([node("Add", ["a", "b"], ["y"])], [("a", ["n", 3]), ("b", ["n", 3])], [("y", ["n", 3])])
        table = '[baselines.some]\nfiles = {a = "a.npy"}'

        with pytest.raises(ModelRefused) as caught:
            configured(tmp_path, f'default_baseline = "some"\n{table}', both)
        assert (caught.value.reason, caught.value.metadata["inputs"]) == ("CONFIG_MISMATCH", "b")
        assert set(configured(tmp_path, table, both).data_baselines["some"]) == {"a"}

    def test_a_model_that_runs_at_no_guessed_extent_is_evaluated_row_by_row(self, tmp_path: Path) -> None:
        odd = model([node("MatMul", ["x", "W"], ["y"])], [("x", ["n", "m"])], [("y", ["n", 2])], {"W": WEIGHTS})
        served = configured(tmp_path, "", odd)

        assert (served.max_batch_rows, served.probe.noise_floor) == (1, None)
        assert any("could not be checked" in warning for warning in served.probe.warnings)

    def test_a_baseline_of_an_unknown_input_is_refused(self, tmp_path: Path) -> None:
        assert refused(tmp_path, '[baselines.b]\nfiles = {image = "b.npy"}').reason == "CONFIG_MISMATCH"

    def test_an_invalid_configuration_is_refused(self, tmp_path: Path) -> None:
        assert refused(tmp_path, "colour = 3").reason == "CONFIG_INVALID"


class TestRepository:
    @pytest.fixture
    def mixed(self, tmp_path: Path) -> Repository:
        """Two good versions, two bad ones."""
        put(tmp_path, "good", 1)
        put(tmp_path, "good", 2)
        put(tmp_path, "good", 3).write_bytes(b"garbage" * 20)
        put(tmp_path, "bad", 1).write_bytes(b"garbage" * 20)
        repository = Repository(tmp_path, OPTIONS)
        repository.load_all()
        return repository

    def test_bad_models_are_told_of_and_stop_no_other(self, mixed: Repository) -> None:
        states = {(entry.name, entry.version): (entry.state, entry.error_reason) for entry in mixed.entries}

        assert states == {
            ("bad", 1): (ModelState.FAILED, "MODEL_FILE_CORRUPT"),
            ("good", 1): (ModelState.READY, ""),
            ("good", 2): (ModelState.READY, ""),
            ("good", 3): (ModelState.FAILED, "MODEL_FILE_CORRUPT"),
        }
        assert all(bool(entry.reason) == (entry.state is ModelState.FAILED) for entry in mixed.entries)
        assert all(entry.format == "onnx" for entry in mixed.entries)

    def test_no_version_means_the_highest_that_is_ready(self, mixed: Repository) -> None:
        assert mixed.get("good").version == 2
        assert mixed.get("good", 1).version == 1

    def test_a_version_that_failed_says_so(self, mixed: Repository) -> None:
        for name, version in (("good", 3), ("bad", 1), ("bad", None)):
            with pytest.raises(Unsupported) as caught:
                mixed.get(name, version)
            assert caught.value.reason == "MODEL_FAILED"
            assert caught.value.metadata["error_reason"] == "MODEL_FILE_CORRUPT"

    def test_what_does_not_exist_is_not_found(self, mixed: Repository) -> None:
        with pytest.raises(NotFound) as model_error:
            mixed.get("Good")
        with pytest.raises(NotFound) as version_error:
            mixed.get("good", 9)

        assert model_error.value.reason == "UNKNOWN_MODEL"
        assert model_error.value.metadata["models"] == "bad, good"
        assert version_error.value.reason == "UNKNOWN_VERSION"
        assert version_error.value.metadata["versions"] == "1, 2, 3"

    def test_a_model_that_failed_while_it_was_served_is_served_no_longer(self, mixed: Repository) -> None:
        model = mixed.get("good", 1)

        mixed.fail(model, EvaluationFailed("MODEL_HANGS", "it did not return"))

        with pytest.raises(Unsupported) as caught:
            mixed.get("good", 1)
        assert (caught.value.reason, caught.value.metadata["error_reason"]) == ("MODEL_FAILED", "MODEL_HANGS")
        assert "it did not return" in caught.value.message

    def test_a_model_that_was_replaced_fails_alone(self, mixed: Repository) -> None:
        old = mixed.get("good", 1)
        mixed.load("good", 1)

        mixed.fail(old, EvaluationFailed("MODEL_HANGS", "it did not return"))

        assert mixed.get("good", 1) is not old

    def test_every_state_is_reported_in_turn(self, tmp_path: Path) -> None:
        put(tmp_path, "good")
        put(tmp_path, "bad").write_bytes(b"")
        told: list[ModelEntry] = []
        Repository(tmp_path, OPTIONS, report=told.append).load_all()

        assert [(entry.name, entry.state.value) for entry in told] == [
            ("bad", "loading"),
            ("good", "loading"),
            ("bad", "failed"),
            ("good", "ready"),
        ]

    def test_a_model_that_still_loads_says_so(self, tmp_path: Path) -> None:
        put(tmp_path)
        reasons: list[str] = []

        def ask(entry: ModelEntry) -> None:
            if entry.state is ModelState.LOADING:
                with pytest.raises(NotReady) as caught:
                    repository.get("net")
                reasons.append(caught.value.reason)

        repository = Repository(tmp_path, OPTIONS, report=ask)
        repository.load_all()
        assert reasons == ["MODEL_LOADING"]

    @pytest.mark.parametrize(("loading", "told"), [(20.0, 20.0), (1e4, 60.0)])
    def test_who_waits_for_a_model_is_told_to_wait_as_long_again(
        self, loading: float, told: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(tmp_path)
        repository = Repository(tmp_path, OPTIONS)
        repository.find_all()
        later = SimpleNamespace(monotonic=lambda: time.monotonic() + loading)
        monkeypatch.setattr("explainserve.repository.time", later)

        with pytest.raises(NotReady) as caught:
            repository.get("net")
        assert caught.value.retry_after_seconds is not None
        assert told <= caught.value.retry_after_seconds < told + 30

    def test_what_nobody_expected_fails_that_model_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        put(tmp_path, "first")
        put(tmp_path, "second")
        load = backends.load

        def fragile(path: Path, *rest: object) -> object:
            if "first" in path.parts:
                raise MemoryError("no memory left")
            return load(path, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(backends, "load", fragile)
        repository = Repository(tmp_path, OPTIONS)
        repository.load_all()

        first, second = repository.entries
        assert (first.state, first.error_reason) == (ModelState.FAILED, "LOAD_FAILED")
        assert "no memory left" in first.reason
        assert second.state is ModelState.READY

    def test_what_cannot_be_read_is_told_of_and_stops_no_other(
        self, tmp_path: Path, forbid: Callable[[Path], None]
    ) -> None:
        for name in ("folder", "good", "version", "config", "file"):
            put(tmp_path, name)
        put(tmp_path, "version", 2)
        (tmp_path / "config" / "model.toml").write_text("default_target = 1")
        for path in ("folder", "version/2", "config/model.toml", "file/1/model.onnx"):
            forbid(tmp_path / path)
        repository = Repository(tmp_path, OPTIONS)
        repository.load_all()

        assert {(entry.name, entry.version): entry.error_reason for entry in repository.entries} == {
            ("config", 1): "CONFIG_INVALID",
            ("file", 1): "MODEL_FILE_UNREADABLE",
            ("folder", NO_VERSION): "MODEL_FOLDER_UNREADABLE",
            ("good", 1): "",
            ("version", 1): "",
            ("version", 2): "MODEL_FOLDER_UNREADABLE",
        }

    def test_a_root_that_cannot_be_read_says_so(self, tmp_path: Path, forbid: Callable[[Path], None]) -> None:
        forbid(tmp_path)

        with pytest.raises(NotFound) as caught:
            discover(tmp_path)
        assert caught.value.reason == "NO_MODELS_FOLDER"
        assert "read" in caught.value.message

    def test_an_empty_folder_has_no_models(self, tmp_path: Path) -> None:
        repository = Repository(tmp_path, OPTIONS)
        repository.load_all()

        assert repository.entries == ()
        with pytest.raises(NotFound):
            repository.get("anything")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path)
    monkeypatch.setitem(backends.LOADERS, ".onnx", "no_such_backend")

    with pytest.raises(ModelRefused) as caught:
        open_model(ModelFolder("net", 1, path.parent, (path,)), OPTIONS)
    assert caught.value.reason == "BACKEND_MISSING"


@pytest.mark.parametrize(
    "suffix", ["onnx", pytest.param("pt2", marks=pytest.mark.torch), pytest.param("pt", marks=pytest.mark.torch)]
)
@pytest.mark.parametrize("change", [Repository.load, Repository.unload])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_model_is_freed_with_its_last_user(tmp_path: Path, suffix: str, change: Callable[..., ModelEntry]) -> None:
    """At once: the garbage collector seldom looks at what has lived long."""
    write_model(MODELS["multi_output"], suffix, tmp_path)
    repository = Repository(tmp_path, OPTIONS)
    repository.load_all()
    user = repository.get("multi_output")
    freed = weakref.ref(user.loaded)
    gc.disable()
    try:
        change(repository, "multi_output")
        assert freed() is not None
        del user
        assert freed() is None
    finally:
        gc.enable()
