"""The blocking client is generated from the asyncio one, and both have the same face."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

from explainserve_client import AsyncClient, Client

ROOT = Path(__file__).parents[2]
PAIRS = {"aclose": "close", "__aenter__": "__enter__", "__aexit__": "__exit__"}


def own(kind: type) -> dict[str, object]:
    return {name: value for name, value in vars(kind).items() if inspect.isfunction(value)}


def test_the_generated_client_is_not_stale() -> None:
    script = subprocess.run([sys.executable, ROOT / "scripts/unasync", "--check"], capture_output=True, text=True)

    assert script.returncode == 0, script.stderr


def test_a_stale_client_is_found(tmp_path: Path) -> None:
    for path in ("scripts/unasync", "_async/client.py", "_sync/client.py"):
        folder = "" if path.startswith("scripts") else "clients/python/explainserve_client/"
        target = tmp_path / folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((ROOT / folder / path).read_text())
    stale = tmp_path / "clients/python/explainserve_client/_sync/client.py"
    stale.write_text(stale.read_text().replace("timeout: float", "timeout: int", 1))
    command = [sys.executable, tmp_path / "scripts/unasync"]

    found = subprocess.run([*command, "--check"], capture_output=True, text=True)
    assert (found.returncode, "_sync/client.py" in found.stderr) == (1, True)
    subprocess.run(command, check=True)
    subprocess.run([*command, "--check"], check=True)


def test_both_clients_have_the_same_methods_and_parameters() -> None:
    blocking, over_asyncio = own(Client), own(AsyncClient)

    assert set(blocking) == {PAIRS.get(name, name) for name in over_asyncio}
    for name, function in over_asyncio.items():
        theirs = inspect.signature(blocking[PAIRS.get(name, name)])  # type: ignore[arg-type]
        ours = inspect.signature(function)  # type: ignore[arg-type]
        assert list(theirs.parameters) == list(ours.parameters)
        defaults = [parameter.default for parameter in ours.parameters.values()]
        assert [parameter.default for parameter in theirs.parameters.values()] == defaults


def test_only_one_of_them_is_asynchronous() -> None:
    assert not any(is_asynchronous(function) for function in own(Client).values())
    public = [name for name in own(AsyncClient) if not name.startswith("_")]
    assert all(is_asynchronous(own(AsyncClient)[name]) for name in public)


def is_asynchronous(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
