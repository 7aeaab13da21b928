"""Imports flow one way: the picture of the README as a table."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SERVICE = ROOT / "service" / "explainserve"
CLIENT = ROOT / "clients" / "python" / "explainserve_client"

NOUNS = {"errors", "signature", "plan", "explanation"}
FIGURES = {"statistics", "normalization", "regions", "cautions"}

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "signature": {"errors"},
    "plan": {"signature"},
    "explanation": {"plan", "signature"},
    "statistics": set(),
    "normalization": {"statistics"},
    "regions": {"statistics"},
    "cautions": set(),
    "metrics": set(),
    "memory": {"errors", "metrics"},
    "settings": set(),
    "containment": set(),
    "process": set(),
    "fingerprint": set(),
    "byte_cache": set(),
    "model_config": {"containment", "errors", "signature"},
    "onnx_vjp": set(),
    "targets": NOUNS,
    "blur": set(),
    "baselines": NOUNS | {"blur"},
    "methods": NOUNS | {"blur"},
    "scheduling": NOUNS,
    "sharing": {"plan"},
    "backends": NOUNS | {"containment", "model_config", "onnx_vjp"},
    "placement": {"errors", "model_config"},
    "model_folder": {"backends", "errors", "model_config"},
    "served_model": NOUNS | {"backends", "baselines", "fingerprint", "model_config", "placement"},
    "opening": NOUNS | {"backends", "baselines", "model_config", "model_folder", "served_model"},
    "repository": {"backends", "errors", "model_folder", "opening", "placement", "served_model"},
    "inspection": NOUNS | {"backends", "model_config", "model_folder", "onnx_vjp", "opening"},
    "watchdog": {"backends", "errors", "scheduling", "served_model"},
    "engine": NOUNS | {"scheduling", "repository", "metrics", "process", "served_model", "watchdog"},
    "devices": {"engine", "errors", "plan", "repository", "scheduling", "served_model"},
    "query": NOUNS | {"baselines", "methods", "scheduling", "served_model", "targets"},
    "query_cost": NOUNS | {"methods", "query", "targets"},
    "end_points": NOUNS | {"query"},
    "questions": NOUNS | {"end_points", "methods", "query"},
    "explainer": NOUNS
    | {
        "devices",
        "end_points",
        "memory",
        "methods",
        "query",
        "query_cost",
        "questions",
        "scheduling",
        "served_model",
        "sharing",
    },
    "figures": NOUNS | FIGURES | {"explainer", "methods", "query"},
    "v1": set(),
    "rpc": NOUNS
    | FIGURES
    | {
        "__init__",
        "backends",
        "baselines",
        "byte_cache",
        "devices",
        "engine",
        "explainer",
        "figures",
        "fingerprint",
        "memory",
        "methods",
        "metrics",
        "placement",
        "model_folder",
        "process",
        "query",
        "query_cost",
        "repository",
        "scheduling",
        "served_model",
        "settings",
        "targets",
        "v1",
        "watchdog",
    },
    "cli": {"__init__", "errors", "inspection", "rpc", "settings", "logs", "backends"},
    "logs": set(),
    "__init__": set(),
    "__main__": {"cli"},
}
"""Part -> the other parts of the package that it may import."""

HEAVY = {
    "torch": {"backends"},
    "onnxruntime": {"backends"},
    "onnx": {"backends", "onnx_vjp", "inspection"},
    "skimage": {"methods"},
}
"""Library -> the only parts that may import it."""

PROTOBUF = {"google", "grpc", "grpc_status", "grpc_health", "grpc_reflection"}


def imported(path: Path, package: str, root: Path) -> set[str]:
    """Absolute dotted names that a file imports, names of `from` imports included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = [package, *path.relative_to(root).parent.parts]
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def part_of(path: Path, root: Path) -> str:
    """The first component below the package: a module or a sub-package."""
    return path.relative_to(root).parts[0].removesuffix(".py")


FILES = sorted(path for path in SERVICE.rglob("*.py") if "v1" not in path.relative_to(SERVICE).parts)
PARTS = {part_of(path, SERVICE) for path in SERVICE.rglob("*.py")}


def test_the_table_names_every_part() -> None:
    assert set(MAY_IMPORT) == PARTS


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SERVICE)))
def test_imports_flow_one_way(path: Path) -> None:
    part = part_of(path, SERVICE)
    own = {name.split(".")[1] for name in imported(path, "explainserve", SERVICE) if name.startswith("explainserve.")}

    assert own & PARTS - {part} <= MAY_IMPORT[part]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SERVICE)))
def test_heavy_libraries_and_protobuf_stay_in_their_place(path: Path) -> None:
    part = part_of(path, SERVICE)
    libraries = {name.split(".")[0] for name in imported(path, "explainserve", SERVICE)}

    for library, places in HEAVY.items():
        assert library not in libraries or part in places
    if part not in ("rpc", "cli"):
        assert not libraries & PROTOBUF


@pytest.mark.parametrize("path", sorted(CLIENT.rglob("*.py")), ids=lambda p: str(p.relative_to(CLIENT)))
def test_the_client_imports_only_the_stubs(path: Path) -> None:
    names = {name for name in imported(path, "explainserve_client", CLIENT) if name.split(".")[0] == "explainserve"}

    assert all(name == "explainserve" or name.startswith("explainserve.v1") for name in names)


def test_the_picture_has_no_cycle() -> None:
    done: list[str] = []

    def visit(part: str, path: tuple[str, ...]) -> None:
        assert part not in path, " -> ".join((*path, part))
        if part not in done:
            for other in MAY_IMPORT[part]:
                visit(other, (*path, part))
            done.append(part)

    for part in MAY_IMPORT:
        visit(part, ())
