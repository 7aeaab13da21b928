"""The page on how to add a method, followed word by word on a copy of the service."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "how-to" / "add-a-method.md"

ASKS = """
import numpy as np
from explainserve.explanation import Instance, Question, Subject, Target
from explainserve.methods import METHODS, name_of
from explainserve.plan import Evaluation, SegmentEvaluation, Selector
from explainserve.rpc.methods import read, write
from explainserve.signature import MapSpec, Score, ScoreHead
from explainserve.v1.method_pb2 import MethodSpec

spec = MethodSpec(gradient_sign={"threshold": 0.5})
method = read(spec)
assert write(method) == spec and name_of(method) == "gradient_sign"
x = np.zeros(3, np.float32)
target = Target("y", Score.OUTPUT, ScoreHead.IDENTITY, Selector(np.array([0]), np.ones(1, np.float32)))
asked = Question(Subject({"x": MapSpec("x")}, {"x": (3,)}), Instance({"x": x}, {}), target, None, 0.0, None)
found = Evaluation((SegmentEvaluation(np.zeros(1), {"x": np.array([2.0, -0.4, -3.0], np.float32)}),))
assert method.attribution(asked, method.plan(asked), found).tensors["x"].tolist() == [1, 0, -1]
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def insert(path: Path, before: str, text: str) -> None:
    """In front of the first place that begins with `before`."""
    content = path.read_text(encoding="utf-8")
    position = content.index(before)
    path.write_text(content[:position] + text + content[position:], encoding="utf-8")


def test_the_page_is_followed(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    for name in ("service", "protos"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (message, field), (method, imported, line) = blocks("proto"), blocks("python")

    proto = tmp_path / "protos" / "explainserve" / "v1" / "method.proto"
    insert(proto, "// One attribution method with its options.", message + "\n")
    insert(proto, "    // Integrated Gradients.\n", field)
    generate = ["-m", "grpc_tools.protoc", "-Iprotos", "--python_out=service", "protos/explainserve/v1/method.proto"]
    subprocess.run([sys.executable, *generate], cwd=tmp_path, check=True)
    methods = tmp_path / "service" / "explainserve" / "methods"
    (methods / "gradient_sign.py").write_text(method, encoding="utf-8")
    insert(methods / "__init__.py", "\nMETHODS:", imported)
    insert(methods / "__init__.py", '    "integrated_gradients":', line)

    asks = "import sys; sys.path.insert(0, 'service')\n" + ASKS
    subprocess.run(
        [sys.executable, "-c", asks], cwd=tmp_path, check=True, env={"PYTHONPATH": str(tmp_path / "service")}
    )
