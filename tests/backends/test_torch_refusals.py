"""What the torch backends refuse, and that nothing in a refused file was run."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from explainserve import backends
from explainserve.backends import probe
from explainserve.backends.contract import LoadedModel, LoadOptions
from explainserve.errors import ModelRefused
from explainserve.model_config import ModelConfig, OutputConfig, read_model_config

torch = pytest.importorskip("torch")
nn = torch.nn

ModelFile = Callable[[str, str], Path]

_TOML = """
[[inputs]]
name = "x"
shape = ["batch", 4]
[[outputs]]
name = "y"
shape = ["batch", 3]
"""


@pytest.fixture(autouse=True)
def _no_news() -> Iterator[None]:
    """torch announces the end of TorchScript whenever a test writes such a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Payload:
    """A pickle that makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that a payload would make."""
    return tmp_path / "payload-ran"


def payloads(mark: Path) -> dict[str, bytes]:
    """The payload as a bare pickle, and as torch.save writes it now and wrote it formerly."""
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save(Payload(mark), zipped)
    torch.save(Payload(mark), legacy, _use_new_zipfile_serialization=False)
    return {"pickle": pickle.dumps(Payload(mark)), "zip": zipped.getvalue(), "legacy": legacy.getvalue()}


def rewritten(source: Path, target: Path, replace: dict[str, bytes]) -> Path:
    """A copy of an archive with members replaced or added, each below the root folder."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            new.writestr(name, replace.get(name.removeprefix(f"{root}/"), old.read(name)))
        for name in sorted(set(replace) - {name.removeprefix(f"{root}/") for name in old.namelist()}):
            new.writestr(f"{root}/{name}", replace[name])
    return target


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


def load(path: Path, toml: str = _TOML, options: LoadOptions | None = None) -> LoadedModel:
    (path.parent / "model.toml").write_text(toml)
    return backends.load(path, read_model_config(path.parent / "model.toml"), options or LoadOptions())


def refusal(path: Path, toml: str = _TOML, options: LoadOptions | None = None) -> str:
    with pytest.raises(ModelRefused) as refused:
        load(path, toml, options)
    return refused.value.reason


def exported(module: Any, path: Path, batch: int = 2, dynamic: bool = True, **options: Any) -> Path:
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) if dynamic else None
    torch.export.save(torch.export.export(module, (torch.randn(batch, 4),), dynamic_shapes=shapes), path, **options)
    return path


def scripted(module: Any, path: Path) -> Path:
    torch.jit.script(module).save(str(path))
    return path


# Pickles


@pytest.mark.parametrize("suffix", ["pt", "pt2", "ts"])
@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
def test_a_plain_pickle_is_never_read(tmp_path: Path, mark: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(payloads(mark)[kind])
    assert refusal(path) == "PICKLE_REFUSED"
    assert not mark.exists()


def test_weights_of_torch_save_are_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(4, 3).state_dict(), path)
    with pytest.raises(ModelRefused, match=r"torch\.export\.save"):
        load(path)


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
def test_a_payload_in_any_member_of_an_exported_program_never_runs(
    model_file: ModelFile, tmp_path: Path, mark: Path, kind: str
) -> None:
    source, payload = model_file("conv", "pt2"), payloads(mark)[kind]
    toml = (source.parents[1] / "model.toml").read_text()
    extra = [
        "extra/notes.txt",
        "data/constants/tensor_0",
        "data/weights/model.pt",
        "data/constants/model.pt",
        "data.pkl",
    ]
    others = ["serialized_state_dict.pt", "serialized_example_inputs.pt", "model.pkl", "data/constants/custom_obj_0"]
    for member in [*members(source), *extra, *others]:
        path = rewritten(source, tmp_path / "model.pt2", {member: payload})
        try:
            load(path, toml)
        except ModelRefused as refused:
            assert refused.reason in ("MODEL_FILE_CORRUPT", "PICKLE_REFUSED", "MODEL_FORMAT_MISMATCH"), member
        else:  # bytes that are weights, or that nobody reads
            assert member.startswith(
                ("data/weights/weight_", "data/constants/", "data.pkl", "model.pkl", ".data", "byteorder")
            )
        assert not mark.exists(), member


def test_a_payload_that_the_graph_calls_for_never_runs(model_file: ModelFile, tmp_path: Path, mark: Path) -> None:
    source = model_file("conv", "pt2")
    toml = (source.parents[1] / "model.toml").read_text()
    weights = json.loads(members(source)["data/weights/model_weights_config.json"])
    first = next(iter(weights["config"].values()))
    first["use_pickle"] = True
    pickled = {"data/weights/model_weights_config.json": json.dumps(weights).encode()}
    for payload in payloads(mark).values():
        path = rewritten(source, tmp_path / "model.pt2", pickled | {f"data/weights/{first['path_name']}": payload})
        assert refusal(path, toml) == "PICKLE_REFUSED"
        for name in ("opaque_obj_0", "custom_obj_0", "tensor_0"):
            entry = {"path_name": name, "is_param": False, "use_pickle": True, "tensor_meta": None}
            constants = json.dumps({"config": {"constant": entry}}).encode()
            replace = {"data/constants/model_constants_config.json": constants, f"data/constants/{name}": payload}
            assert refusal(rewritten(source, tmp_path / "model.pt2", replace), toml) == "PICKLE_REFUSED"
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
def test_a_payload_in_any_member_of_a_torchscript_file_never_runs(
    model_file: ModelFile, tmp_path: Path, mark: Path, kind: str
) -> None:
    source, payload = model_file("conv", "pt"), payloads(mark)[kind]
    toml = (source.parents[1] / "model.toml").read_text()
    for member in [*members(source), "extra/notes.txt", "attributes.pkl", "extra/data.pkl"]:
        path = rewritten(source, tmp_path / "model.pt", {member: payload})
        try:
            load(path, toml)
        except ModelRefused as refused:
            assert refused.reason in ("MODEL_FILE_CORRUPT", "PICKLE_REFUSED"), member
        assert not mark.exists(), member


# Descriptions of graphs that are more than that


def hostile_graphs(graph: dict[str, Any], mark: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Copies of a graph's description that would make the file if torch read them."""
    touch = f"__import__('pathlib').Path({str(mark)!r}).touch()"

    def changed(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        copy: dict[str, Any] = json.loads(json.dumps(graph))
        change(copy["graph_module"])
        return copy

    def expression(module: dict[str, Any]) -> None:
        sizes = next(iter(module["graph"]["tensor_values"].values()))["sizes"]
        sizes[0] = {"as_expr": {"expr_str": touch, "hint": None}}

    def hidden_expression(module: dict[str, Any]) -> None:
        meta = json.loads(json.dumps(next(iter(module["graph"]["tensor_values"].values()))))
        meta["sizes"] = [{"as_expr": {"expr_str": touch, "hint": None}}]
        module["graph"]["tensor_values"]["metadata"] = meta

    def symbol(module: dict[str, Any]) -> None:
        sizes = next(iter(module["graph"]["tensor_values"].values()))["sizes"]
        sizes[0] = {"as_expr": {"expr_str": f"Add({touch!r}, 1)", "hint": None}}

    def name(module: dict[str, Any]) -> None:
        own = json.dumps(module["graph"]["inputs"][-1]["as_tensor"]["name"])
        text = json.dumps(module).replace(own, json.dumps(f"x=({touch})"))
        module.clear()
        module.update(json.loads(text))

    def operator(target: str) -> Callable[[dict[str, Any]], None]:
        def change(module: dict[str, Any]) -> None:
            module["graph"]["nodes"][0]["target"] = target

        return change

    def tree(module: dict[str, Any]) -> None:
        module["module_call_graph"][0]["signature"]["in_spec"] = '[1, {"__enum__": true, "fqn": "os:environ"}]'

    yield "expression", changed(expression)
    yield "expression of a tensor called metadata", changed(hidden_expression)
    yield "string that sympy would parse", changed(symbol)
    yield "name", changed(name)
    yield "tree", changed(tree)
    for target in (
        "torch.os.system",
        "torch.load",
        "torch.ops.load_library.__func__",
        "torch.ops.aten.from_file.default",
    ):
        yield target, changed(operator(target))


def test_a_graph_that_is_python_is_refused(model_file: ModelFile, tmp_path: Path, mark: Path) -> None:
    source = model_file("conv", "pt2")
    toml = (source.parents[1] / "model.toml").read_text()
    graph = json.loads(members(source)["models/model.json"])
    for what, description in hostile_graphs(graph, mark):
        path = rewritten(source, tmp_path / "model.pt2", {"models/model.json": json.dumps(description).encode()})
        with pytest.raises(ModelRefused) as refused:
            load(path, toml)
            pytest.fail(f"{what} was loaded")
        assert refused.value.reason == "UNSAFE_GRAPH", what
        assert not mark.exists(), what


def test_a_script_that_writes_files_is_refused(tmp_path: Path, mark: Path) -> None:
    target = str(mark)

    class Writer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.target = target

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.save(x, self.target)
            return x[:, :3]

    assert refusal(scripted(Writer(), tmp_path / "model.pt")) == "UNSAFE_GRAPH"
    assert not mark.exists()


# Damaged files, and files of another format


@pytest.mark.parametrize("file_format", ["pt", "pt2"])
@pytest.mark.parametrize("kept", [0, 3, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_corrupt(model_file: ModelFile, tmp_path: Path, file_format: str, kept: float) -> None:
    content = model_file("linear", file_format).read_bytes()
    path = tmp_path / f"model.{file_format}"
    path.write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    assert refusal(path) == "MODEL_FILE_CORRUPT"


@pytest.mark.parametrize("file_format", ["pt", "pt2"])
def test_something_that_is_no_model_is_corrupt(tmp_path: Path, file_format: str) -> None:
    path = tmp_path / f"model.{file_format}"
    path.write_bytes(b"a picture of two birds" * 100)
    assert refusal(path) == "MODEL_FILE_CORRUPT"


@pytest.mark.parametrize("file_format", ["pt", "pt2"])
def test_members_that_inflate_absurdly_are_refused(model_file: ModelFile, tmp_path: Path, file_format: str) -> None:
    path = tmp_path / f"model.{file_format}"
    shutil.copy(model_file("linear", file_format), path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        root = archive.namelist()[0].split("/")[0]
        with archive.open(f"{root}/code/bomb.py", "w", force_zip64=True) as member:
            for _ in range(257):
                member.write(bytes(1 << 20))
    assert refusal(path) == "MODEL_FILE_CORRUPT"


@pytest.mark.parametrize("file_format", ["pt", "pt2"])
@pytest.mark.parametrize("name", ["../outside.py", "/outside.py", "elsewhere/member.py"])
def test_members_outside_the_folder_are_refused(
    model_file: ModelFile, tmp_path: Path, file_format: str, name: str
) -> None:
    path = tmp_path / f"model.{file_format}"
    shutil.copy(model_file("linear", file_format), path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"")
    assert refusal(path) == "MODEL_FILE_CORRUPT"


def test_formats_are_not_confused(model_file: ModelFile, tmp_path: Path) -> None:
    for file_format, suffix in (("pt", "pt2"), ("pt2", "pt")):
        path = tmp_path / f"model.{suffix}"
        shutil.copy(model_file("linear", file_format), path)
        assert refusal(path) == "MODEL_FORMAT_MISMATCH"


def test_an_aotinductor_package_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {
            "archive_format": b"pt2",
            "archive_version": b"0",
            ".data/version": b"6",
            "data/aotinductor/model/code.wrapper.so": b"\x7fELF",
            "data/aotinductor/model/code.wrapper_metadata.json": b"{}",
        }.items():
            archive.writestr(f"model/{name}", content)
    with pytest.raises(ModelRefused, match=r"AOTInductor.*torch\.export\.save") as refused:
        load(path)
    assert refused.value.reason == "AOTINDUCTOR_PACKAGE"


# Signatures


def test_torchscript_needs_its_signature_stated(model_file: ModelFile, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    shutil.copy(model_file("linear", "pt"), path)
    assert refusal(path, "") == "SIGNATURE_INCOMPLETE"
    assert refusal(path, _TOML.replace('shape = ["batch", 4]', "")) == "SIGNATURE_INCOMPLETE"
    assert refusal(path, _TOML + '[[outputs]]\nname = "z"\nshape = ["batch"]') == "CONFIG_MISMATCH"
    assert refusal(path, _TOML + '[[inputs]]\nname = "z"\nshape = ["batch"]') == "CONFIG_MISMATCH"


def test_an_exported_program_describes_itself(model_file: ModelFile, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    shutil.copy(model_file("multi_input", "pt2"), path)
    signature = load(path, "").signature
    assert [spec.name for spec in signature.inputs] == ["image", "ids"]
    assert [[axis.size for axis in spec.axes] for spec in signature.inputs] == [[None, 3, 4, 4], [None, 5]]
    assert signature.inputs[0].axes[0].name == "batch"


def test_names_of_an_exported_program_are_given_by_position_or_by_name(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"double": x * 2, "square": x * x}

    path = exported(Two(), tmp_path / "model.pt2")

    def names(*outputs: str) -> list[str]:
        config = ModelConfig(outputs=tuple(OutputConfig(name=name) for name in outputs))
        return [spec.name for spec in backends.load(path, config, LoadOptions()).signature.outputs]

    assert names() == ["double", "square"]
    assert names("square") == ["double", "square"]
    assert names("a", "b") == ["a", "b"]
    with pytest.raises(ModelRefused) as refused:
        names("a")
    assert refused.value.reason == "CONFIG_MISMATCH"


def test_outputs_of_a_script_are_found_by_key(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"double": x * 2, "square": x * x}

    toml = _TOML.replace('"y"\nshape = ["batch", 3]', '"square"\nshape = ["batch", 4]')
    path = scripted(Two(), tmp_path / "model.pt")
    both = toml + '[[outputs]]\nname = "double"\nshape = ["batch", 4]'
    values = {row.function.output: row for row in _one_row_of_each_output(load(path, both))}
    x = values["square"].segments[0].end["x"]
    model = load(path, both)
    np.testing.assert_allclose(model.evaluate(values["square"])[0].outputs[0], x * x, rtol=1e-6)
    np.testing.assert_allclose(model.evaluate(values["double"])[0].outputs[0], 2 * x, rtol=1e-6)


def test_outputs_that_are_no_tensors_are_refused_by_name(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
            return x, (x, x)

    class Number(nn.Module):
        def forward(self, x: torch.Tensor) -> int:
            return 3

    for index, module in enumerate((Nested(), Number())):
        path = scripted(module, tmp_path / f"{index}.pt")
        with pytest.raises(ModelRefused, match=r"tuple|int") as refused:
            load(path, _TOML)
        assert refused.value.reason == "UNSUPPORTED_OUTPUT"


def _one_row_of_each_output(model: LoadedModel) -> list[Any]:
    from explainserve.plan import Differentiation, Rows, Segment
    from explainserve.signature import ScoreHead

    (instance,) = probe.sample_instances(model.signature, 1)
    rows = []
    for spec in model.signature.outputs:
        function = Differentiation(spec.name, ScoreHead.IDENTITY)
        rows.append(Rows(function, (Segment(instance, instance, {}, function, np.ones(1), np.ones(1)),)))
    return rows


# Batches


def test_a_batch_baked_into_a_trace_is_found(tmp_path: Path) -> None:
    class Baked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(1, -1)[:, :3] * 2

    torch.jit.trace(Baked(), torch.randn(1, 4)).save(str(tmp_path / "model.pt"))
    model = load(tmp_path / "model.pt")
    assert model.fixed_batch
    assert probe.check(model).rows_independent


@pytest.mark.parametrize(("extent", "found"), [(10, True), (7, False)])
def test_a_batch_baked_into_a_trace_with_free_extents_is_found_where_a_guess_runs(
    tmp_path: Path, extent: int, found: bool
) -> None:
    class Baked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(1, extent)[:, :3] * 2

    torch.jit.trace(Baked(), torch.randn(1, extent)).save(str(tmp_path / "model.pt"))
    model = load(tmp_path / "model.pt", _TOML.replace('["batch", 4]', '["batch", "n"]'))
    assert model.fixed_batch is found
    assert probe.check(model).rows_independent is found


def test_a_static_batch_of_one_runs_row_by_row(model_file: ModelFile, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    shutil.copy(model_file("static_batch", "pt2"), path)
    assert load(path).fixed_batch


def test_a_static_batch_of_several_is_refused(tmp_path: Path) -> None:
    path = exported(nn.Linear(4, 3), tmp_path / "model.pt2", dynamic=False)
    assert refusal(path) == "STATIC_BATCH"
    assert refusal(path, "") == "STATIC_BATCH"


# Modes


def test_training_mode_is_refused(tmp_path: Path) -> None:
    for index, layer in enumerate((nn.Dropout(0.5), nn.BatchNorm1d(4))):
        module = nn.Sequential(layer, nn.Linear(4, 3)).train()
        assert refusal(exported(module, tmp_path / f"{index}.pt2")) == "TRAINING_MODE"
        torch.jit.trace(module, torch.randn(2, 4), check_trace=False).save(str(tmp_path / f"{index}.pt"))
        assert refusal(tmp_path / f"{index}.pt") == "TRAINING_MODE"


def test_a_script_saved_in_training_mode_is_evaluated(tmp_path: Path) -> None:
    path = scripted(nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 3)).train(), tmp_path / "model.pt")
    assert probe.check(load(path)).rows_independent


def test_a_model_that_draws_random_numbers_is_refused_by_the_probe(tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + torch.rand_like(x))[:, :3]

    for path in (scripted(Noisy(), tmp_path / "model.pt"), exported(Noisy(), tmp_path / "model.pt2")):
        with pytest.raises(ModelRefused) as refused:
            probe.check(load(path))
        assert refused.value.reason == "TRAINING_MODE"


def test_a_graph_without_gradients_is_refused(tmp_path: Path) -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return self.linear(x)

    assert refusal(exported(Silent(), tmp_path / "model.pt2")) == "NO_GRADIENT"
    assert refusal(scripted(Silent(), tmp_path / "model.pt")) == "NO_GRADIENT"


def test_parameters_need_no_gradient(tmp_path: Path) -> None:
    from explainserve.backends.torch_rows import TorchModel

    module = nn.Linear(4, 3)
    for path in (exported(module, tmp_path / "model.pt2"), scripted(module, tmp_path / "model.pt")):
        model = load(path)
        assert isinstance(model, TorchModel)
        assert not model._forward([torch.ones(1, 4)])[0].requires_grad


# Devices


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize("file_format", ["pt", "pt2"])
def test_a_missing_device_is_an_error_unless_falling_back_is_allowed(
    model_file: ModelFile, tmp_path: Path, file_format: str
) -> None:
    path = tmp_path / f"model.{file_format}"
    shutil.copy(model_file("linear", file_format), path)
    for device in ("cuda", "cuda:0", "tpu"):
        assert refusal(path, _TOML, LoadOptions(device=device)) == "DEVICE_UNAVAILABLE"
    assert load(path, _TOML, LoadOptions(device="cuda", allow_fallback=True)).device == "cpu"
