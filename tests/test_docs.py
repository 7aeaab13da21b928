"""What the README and the pages show is executed."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from explainserve.model_config import ModelConfig

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "two_digits"


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def address() -> Iterator[str]:
    """A server of the embedded models."""
    command = [sys.executable, "-m", "explainserve", "serve", "--models", str(EXAMPLE / "models")]
    with subprocess.Popen(
        [*command, "--port", "0", "--http-port", "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().removeprefix("gRPC listening on ").strip()
        process.terminate()


def test_the_python_of_the_readme_runs(address: str) -> None:
    sys.path.insert(0, str(EXAMPLE))
    import pictures
    from explainserve_client import Client

    (code,) = blocks(ROOT / "README.md", "python")
    with Client(address) as client:
        image = client.preprocess("two-digits", pictures.load_pairs()[0].picture.image).tensor
    names: dict[str, object] = {"image": image}

    exec(code.replace("localhost:8001", address), names)

    assert names["a"].tensor.shape == image.shape  # type: ignore[attr-defined]
    assert names["result"].attributions[1].target.label == "8"  # type: ignore[attr-defined]


def test_the_python_of_the_page_on_methods_runs(address: str) -> None:
    sys.path.insert(0, str(EXAMPLE))
    import pictures
    from explainserve_client import Client

    with Client(address) as client:
        image = client.preprocess("two-digits", pictures.load_pairs()[0].picture.image).tensor
    names: dict[str, object] = {"image": image}
    (code,) = blocks(ROOT / "docs" / "methods.md", "python")

    exec(code.replace("localhost:8001", address), names)

    assert len(names["by_method"]) == 4  # type: ignore[arg-type]
    assert names["saved"] > 0  # type: ignore[operator]


def test_the_page_on_methods_names_all_of_them() -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts" / "methods"), "--check"], check=True)


def test_the_python_of_the_page_on_anytime_answers_runs(address: str) -> None:
    sys.path.insert(0, str(EXAMPLE))
    import pictures
    from explainserve_client import Client

    with Client(address) as client:
        image = client.preprocess("two-digits", pictures.load_pairs()[0].picture.image).tensor
    names: dict[str, object] = {"image": image}

    for code in blocks(ROOT / "docs" / "anytime-answers.md", "python"):
        patient = code.replace("time_budget=0.2", "time_budget=20")  # a busy machine takes its time
        exec(patient.replace("localhost:8001", address), names)

    (own,) = names["result"].attributions  # type: ignore[attr-defined]
    assert names["tensor"].tobytes() == own.tensor.tobytes()  # type: ignore[attr-defined]
    assert names["recipe"] == own.normalization("SYMMETRIC_ABS_MAX", "CHANNEL_SUM")
    assert names["good_enough"].map_error < 0.1  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_model_toml_on_a_page_is_valid(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "toml"):
        config = ModelConfig.model_validate(tomllib.loads(block))
        assert config.inputs and config.outputs


def test_every_file_that_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:docs|protos|scripts|deploy|benchmarks|tests|clients|examples|service)/[\w./-]*)`", text)

    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_python_of_the_page_on_gradients_runs_and_adds_up() -> None:
    import numpy as np
    import onnx.parser

    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        network (float[n, 3, 8, 8] image) => (float[n, 5] logits)
        <float[4, 3, 3, 3] kernel, float[4, 5] head> {
            features = Conv <kernel_shape = [3, 3]> (image, kernel)
            active = Relu (features)
            pooled = GlobalAveragePool (active)
            flat = Flatten (pooled)
            logits = MatMul (flat, head)
        }"""
    )
    random = np.random.default_rng(1)
    for name, shape in {"kernel": (4, 3, 3, 3), "head": (4, 5)}.items():
        value = random.standard_normal(shape, dtype=np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    names: dict[str, object] = {"model": model}

    for code in blocks(ROOT / "docs" / "onnx-gradients.md", "python"):
        exec(code, names)

    by_image, rows, parts = names["by_image"], names["rows"], names["contributions"]
    difference = (names["logits"] - names["at_baseline"])[:, 3]  # type: ignore[operator]
    np.testing.assert_allclose(rows[3], by_image, rtol=1e-5, atol=1e-7)  # type: ignore[index, arg-type]
    np.testing.assert_allclose(parts.sum(axis=(1, 2, 3)), difference, rtol=1e-3)  # type: ignore[attr-defined]
