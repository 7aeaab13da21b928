"""What the package exports, and what it needs."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys

import explainserve_client
from explainserve_client import errors


def test_every_exported_name_is_there_once_and_in_order() -> None:
    names = explainserve_client.__all__

    assert names == sorted(set(names))
    assert all(hasattr(explainserve_client, name) for name in names)


def test_nothing_else_is_public() -> None:
    modules = {module.name for module in pkgutil.iter_modules(explainserve_client.__path__)}
    public = {name for name in vars(explainserve_client) if not name.startswith("_")} | {"__version__"}

    assert public - modules == set(explainserve_client.__all__)


def test_every_error_and_every_dataclass_is_exported() -> None:
    internal = {"CallContext", "Instances", "Tick"}
    for module in pkgutil.iter_modules(explainserve_client.__path__, "explainserve_client."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(value) and (value.__module__, value.__name__) == (module.name, name):
                exported = issubclass(value, errors.ExplainServeError) or hasattr(value, "__dataclass_fields__")
                assert not exported or name in {*explainserve_client.__all__, *internal}, name


def test_everything_public_is_documented() -> None:
    for name in set(explainserve_client.__all__) - {"__version__"}:
        value = getattr(explainserve_client, name)
        methods = [member for key, member in vars(value).items() if not key.startswith("_") and callable(member)]
        assert all(inspect.getdoc(member) for member in [value, *methods]), name


def test_importing_it_needs_only_the_base_dependencies() -> None:
    """Anything else would make the client heavy for applications that only call a server."""
    program = (
        "import sys, explainserve_client;"
        "print(*sorted({name.split('.')[0] for name in sys.modules} & set(sys.argv[1:])))"
    )
    heavy = [
        "torch",
        "onnx",
        "onnxruntime",
        "PIL",
        "matplotlib",
        "pydantic",
        "typer",
        "prometheus_client",
        "grpc_status",
    ]
    found = subprocess.run([sys.executable, "-c", program, *heavy], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == ""


def test_the_version_is_told() -> None:
    assert explainserve_client.__version__
