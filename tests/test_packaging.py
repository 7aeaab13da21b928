"""What people install: the wheel, without the sources, and with nothing that its metadata does not name."""

import json
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import HeaderParser
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SOURCES = {"explainserve": ROOT / "service", "explainserve_client": ROOT / "clients" / "python"}
BASE = {"googleapis-common-protos", "grpcio", "numpy", "protobuf"}
BACKENDS = {"torch", "onnx", "onnxruntime", "onnxruntime-gpu"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the tree without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def base_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel, its base dependencies and nothing else."""
    folder = tmp_path_factory.mktemp("base")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    for name in installed_closure(BASE):
        link_distribution(distribution(name), site_packages)
    return python


def installed_closure(names: set[str]) -> set[str]:
    """These distributions and all that they need in turn, without extras."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found:
            found.add(name)
            waiting += [requirement.name for requirement in applicable(distribution(name).requires or [])]
    return found


def applicable(requirements: list[str], extra: str = "") -> Iterator[Requirement]:
    """Those that hold on this machine, with the given extra of the distribution that states them."""
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def link_distribution(source: Distribution, site_packages: Path) -> None:
    """Links each file of an installed distribution into another environment: folders may be shared (google/)."""
    for file in source.files or []:
        if ".." in file.parts or "__pycache__" in file.parts:
            continue
        target = site_packages / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(Path(str(source.locate_file(file))))


def run(python: Path, program: str) -> str:
    """What a program prints that sees nothing of this process: no PYTHONPATH, no working folder, no user site."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([python, "-Ic", program], capture_output=True, text=True, env=environment, cwd=python.parent)

    assert done.returncode == 0, done.stderr

    return done.stdout


def extra_closure(metadata: Message, extra: str) -> set[str]:
    """Distributions that an extra asks for by itself, through the distribution's other extras too."""
    found: set[str] = set()
    for requirement in applicable(metadata.get_all("Requires-Dist", []), extra):
        if requirement.name == "explainserve":
            found = found.union(*(extra_closure(metadata, other) for other in requirement.extras))
        else:
            found.add(canonicalize_name(requirement.name))
    return found


def test_base_dependencies_are_the_clients_four(metadata: Message) -> None:
    """Installed beside other inference clients, the client brings little that could conflict."""

    assert extra_closure(metadata, "") == BASE


@pytest.mark.parametrize(
    ("extra", "backends"),
    [
        ("cpu", {"onnx", "onnxruntime"}),
        ("gpu", {"onnx", "onnxruntime-gpu", "torch"}),
        ("torch", {"torch"}),
    ],
)
def test_each_backend_extra_brings_a_whole_server(metadata: Message, extra: str, backends: set[str]) -> None:
    closure = extra_closure(metadata, extra)

    assert closure & BACKENDS == backends
    assert closure >= extra_closure(metadata, "server")


def test_no_extra_brings_both_builds_of_onnxruntime(metadata: Message) -> None:
    """They share one import package: together they break each other, and pip does not notice."""
    both = {"onnxruntime", "onnxruntime-gpu"}

    assert not [extra for extra in metadata.get_all("Provides-Extra", []) if both <= extra_closure(metadata, extra)]


def test_every_source_file_is_in_the_wheel(wheel: Path) -> None:
    """Code, the generated stubs and their types, and the py.typed markers: all that version control would hold."""
    expected = {
        path.relative_to(folder).as_posix()
        for package, folder in SOURCES.items()
        for path in (folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}

    assert packed == expected
    assert {"explainserve/py.typed", "explainserve_client/py.typed", "explainserve/v1/tensor_pb2.pyi"} <= packed


def test_license_is_in_the_wheel(wheel: Path, metadata: Message) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()

    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_brings_the_command(base_python: Path) -> None:
    program = """
from importlib.metadata import entry_points
print(*(point.value for point in entry_points(group="console_scripts", name="explainserve")))
"""

    assert run(base_python, program).split() == ["explainserve.cli:main"]
    assert (base_python.parent / "explainserve").exists()


def test_client_needs_only_the_base_dependencies(base_python: Path) -> None:
    """In an environment that holds nothing else, the client imports, and comes from the wheel."""
    program = "import explainserve_client, sys; print(explainserve_client.__file__, sys.prefix)"
    file, prefix = run(base_python, program).split()

    assert Path(file).is_relative_to(prefix)


def test_client_does_not_import_the_server() -> None:
    """Where the server's libraries are installed too, importing the client loads none of them."""
    paths = [str(folder) for folder in SOURCES.values()]
    program = f"import json, sys; sys.path[:0] = {paths}; import explainserve_client; print(json.dumps([*sys.modules]))"
    loaded = {name.partition(".")[0] for name in json.loads(run(Path(sys.executable), program))}

    assert not loaded & {"torch", "onnx", "onnxruntime", "pydantic", "typer", "structlog", "prometheus_client", "PIL"}


def test_constraints_pin_every_dependency() -> None:
    """scripts/test installs the same versions everywhere; torch is pinned without a local version such as +cpu."""
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(pin.name): str(pin.specifier) for pin in map(Requirement, filter(is_pin, constraints))}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = [project["dependencies"], *project["optional-dependencies"].values()]
    named = {canonicalize_name(Requirement(line).name) for lines in stated for line in lines} - {"explainserve"}

    assert named <= pins.keys()
    assert [pin for pin in pins.values() if not pin.startswith("==") or "+" in pin] == []


def is_pin(line: str) -> bool:
    return bool(line) and not line.startswith("#")
