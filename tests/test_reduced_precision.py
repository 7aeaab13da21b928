"""A trained network in sixteen bits, over gRPC: what is stated, and that the adaptive rule ends as it should."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator

import pytest

pytest.importorskip("torch")

from explainserve.settings import Settings
from explainserve_client import Client, IntegratedGradients
from rpc.loopback import Loopback
from three_formats import module_and_input, relative, two_digits

MODELS = {
    "float32": ("pt2", "float32"),
    "bfloat16": ("pt2", "bfloat16"),
    "float16": ("pt2", "float16"),
    "onnx-float16": ("onnx", "float16"),
}
"""Format and precision by name."""
narrow = pytest.mark.parametrize("name", list(MODELS)[1:])


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Of a server that holds the network as each of MODELS."""
    folder = tmp_path_factory.mktemp("precisions")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporters
        for suffix in ("pt2", "onnx"):
            two_digits(suffix, folder / suffix)
    for name, (suffix, precision) in MODELS.items():
        copied = folder / "models" / name
        shutil.copytree(folder / suffix, copied)
        config = copied / "model.toml"
        config.write_text(f'precision = "{precision}"\n{config.read_text()}')
    server = Loopback(Settings(models=folder / "models", port=0, http_port=0, thread_count=1, trial_seconds=0))
    with Client(server.address, timeout=240) as connected:
        yield connected
    server.stop()


def explain(client: Client, name: str, **options: object):  # type: ignore[no-untyped-def]
    _, x = module_and_input("two-digits")
    return client.explain(name, x, targets=3, method=IntegratedGradients(**options))  # type: ignore[arg-type]


@narrow
def test_the_precision_and_its_error_are_stated(client: Client, name: str) -> None:
    provenance, model = explain(client, name, step_count=4).provenance, client.model(name)

    assert provenance.precision == model.precision == MODELS[name][1]
    assert provenance.precision_map_error == model.precision_map_error
    assert 0 < model.precision_map_error < 0.5  # type: ignore[operator]


def test_float32_has_no_error_of_its_precision(client: Client) -> None:
    provenance = explain(client, "float32", step_count=4).provenance

    assert provenance.precision == "float32"
    assert provenance.precision_map_error is None


@narrow
def test_maps_are_those_of_float32_within_the_stated_errors(client: Client, name: str) -> None:
    reference = explain(client, "float32", step_count=256).attributions[0].tensor
    result = explain(client, name)
    found, stated = result.attributions[0], result.provenance.precision_map_error

    assert found.stop_reason == "CONVERGED"
    assert relative(found.tensor, reference) <= 3 * (found.map_error**2 + stated**2) ** 0.5


@narrow
def test_a_tolerance_below_the_precision_ends_in_time_and_is_not_called_converged(client: Client, name: str) -> None:
    found = explain(client, name, tolerance=1e-5, completeness_tolerance=1e-5, max_step_count=128).attributions[0]

    assert found.stop_reason in ("MAX_STEPS", "NON_CONVERGENT")
    assert found.step_count <= 128
    assert found.map_error > 1e-5
