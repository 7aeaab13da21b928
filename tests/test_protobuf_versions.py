"""The client works beside other inference clients: its tests pass with the newest protobuf as well.

The environment of the tests has protobuf 6, as grpcio-tools 1.76 wants it.
"""

import os
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ["pytest", "pytest-asyncio", "pytest-timeout", "hypothesis", "pillow"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_clients_tests_pass_with_protobuf_7(tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    packages = ["protobuf>=7,<8", "grpcio", "numpy", "googleapis-common-protos", *TOOLS]
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, timeout=600)
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("service", "clients/python"))

    finished = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "tests/client"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )

    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    version = [python, "-c", "import google.protobuf as p; print(p.__version__)"]
    assert subprocess.run(version, capture_output=True, text=True, check=True).stdout.startswith("7.")
