"""From the folder of a model version to the model that is served: read, checked, probed and timed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from explainserve import backends
from explainserve.backends import LoadedModel, LoadOptions, batch_size, pattern_file, precision, probe
from explainserve.backends.batch_size import BatchSize
from explainserve.backends.probe import ProbeResult
from explainserve.backends.trial import Trials
from explainserve.baselines import NAMED
from explainserve.errors import ModelRefused
from explainserve.model_config import BaselineConfig, Compile, ModelConfig, Precision
from explainserve.model_folder import ModelFolder, cause
from explainserve.served_model import ServedModel, row_by_row
from explainserve.signature import InputSpec, Signature

DEFAULT_BATCH_ROWS = 64


def open_model(
    folder: ModelFolder,
    options: LoadOptions,
    max_batch_rows: int = DEFAULT_BATCH_ROWS,
    trials: Trials | None = None,
    warm_up_seconds: float = 0.0,
) -> ServedModel:
    """Reads, checks, probes and times one version on the device of the options.

    Args:
        max_batch_rows: where the model states no limit of its own.
        trials: try the model in another process before it is loaded in this one; None trusts it.
        warm_up_seconds: to find the fastest size of micro-batches; see `batch_size.fastest`.

    Raises:
        ModelRefused: it cannot be served; the reason says why.
    """
    path, config = folder.model_file(), folder.config()
    files = model_files(path, trials)
    # Before loading: a backend may run what a file holds.
    sha256 = digest(files)
    _check_sha256(config.sha256, sha256, path)
    _check_default_baseline(config)
    if trials is not None:
        trials.check(files, sha256, config, options)
    loaded = backends.load(path, config, options)
    _check_default_baseline_inputs(config, loaded.signature)
    found = _checked(loaded, path, config, options)
    size = _batch_size(loaded, found, config.limits.max_batch_rows or max_batch_rows, warm_up_seconds)
    return ServedModel(
        name=folder.name,
        version=folder.version,
        device=options.device,
        path=path,
        file_bytes=sum(file.stat().st_size for file in files),
        sha256=sha256,
        format=folder.format,
        config=config,
        loaded=loaded,
        probe=found,
        max_batch_rows=size.rows,
        seconds_per_row=size.seconds_per_row,
        micro_batch_bytes=size.peak_bytes,
        default_target=_default_target(config.default_target, loaded.signature),
        data_baselines={
            name: _data_baseline(name, table, folder, loaded.signature) for name, table in config.baselines.items()
        },
    )


def _checked(loaded: LoadedModel, path: Path, config: ModelConfig, options: LoadOptions) -> ProbeResult:
    """What is found out about a model, beside itself in float32 where it is served in another precision."""
    if config.precision is Precision.FLOAT32:
        return probe.check(loaded)
    in_float32 = config.model_copy(update={"precision": Precision.FLOAT32, "compile": Compile.OFF})
    reference = backends.load(path, in_float32, precision.reference_options(options))
    return precision.check(loaded, reference, config.precision.value)


def model_files(path: Path, trials: Trials | None = None) -> tuple[Path, ...]:
    """A model file, then its external data files in the order of their names, and the patterns beside it.

    Args:
        trials: have another process read the file; None trusts it.

    Raises:
        ModelRefused: the file is not readable (MODEL_FILE_UNREADABLE) or not as its suffix says, or its backend is not
            installed.
    """
    if path.suffix == ".pt2":
        return (path, *pattern_file.beside(path))
    if path.suffix != ".onnx":
        return (path,)
    backends.loader(path.suffix)  # says what to install where onnx is missing
    from explainserve.backends import onnx_file

    with _told_unreadable(path):
        return onnx_file.files(path) if trials is None else trials.files(path)


def digest(files: Sequence[Path]) -> str:
    """SHA-256 of these files, one after the other, hexadecimal.

    Raises:
        ModelRefused: one is not readable (MODEL_FILE_UNREADABLE).
    """
    total = hashlib.sha256()
    with _told_unreadable(files[0]):
        for file in files:
            with file.open("rb") as data:
                while block := data.read(1 << 20):
                    total.update(block)
    return total.hexdigest()


@contextmanager
def _told_unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = Path(error.filename or path).name
        raise ModelRefused("MODEL_FILE_UNREADABLE", f"{name} cannot be read: {cause(error)}", file=name) from error


def _check_sha256(expected: str | None, actual: str, path: Path) -> None:
    if expected is not None and expected != actual:
        raise ModelRefused(
            "SHA256_MISMATCH",
            f"{path.name} has sha256 {actual}, model.toml expects {expected}",
            expected=expected,
            actual=actual,
        )


def _check_default_baseline(config: ModelConfig) -> None:
    if config.default_baseline not in NAMED and config.default_baseline not in config.baselines:
        raise ModelRefused(
            "CONFIG_MISMATCH",
            f"default_baseline {config.default_baseline!r} is none of {', '.join(NAMED)} and no [baselines] table",
            default_baseline=config.default_baseline,
        )


def _check_default_baseline_inputs(config: ModelConfig, signature: Signature) -> None:
    """Requests that name no baseline would all fail where the default one lacks an input."""
    table = config.baselines.get(config.default_baseline)
    lacking = sorted(set(signature.differentiable_inputs) - table.files.keys()) if table is not None else []
    if lacking:
        raise ModelRefused(
            "CONFIG_MISMATCH",
            f"default_baseline {config.default_baseline!r} has no file for {', '.join(lacking)}; "
            "it needs one for every floating-point input, such as one of zeros",
            default_baseline=config.default_baseline,
            inputs=", ".join(lacking),
        )


def _batch_size(loaded: LoadedModel, found: ProbeResult, limit: int, seconds: float) -> BatchSize:
    return batch_size.fastest(loaded, 1 if row_by_row(loaded, found) else limit, seconds)


def _default_target(stated: int | str | None, signature: Signature) -> int | None:
    """Resolves a label to its position; "argmax", or nothing, is None."""
    output = signature.outputs[0]
    if stated is None or (stated == "argmax" and stated not in output.labels):
        return None
    if isinstance(stated, str):
        if stated not in output.labels:
            raise ModelRefused(
                "CONFIG_MISMATCH",
                f"default_target {stated!r} is no label of output {output.name!r}",
                default_target=stated,
            )
        return output.labels.index(stated)
    size = None if output.class_axis is None else output.axes[output.class_axis].size
    if stated < 0 or (size is not None and stated >= size):
        raise ModelRefused(
            "CONFIG_MISMATCH", f"default_target {stated} of {size} classes", default_target=stated, class_count=size
        )
    return stated


def _data_baseline(
    name: str, table: BaselineConfig, folder: ModelFolder, signature: Signature
) -> dict[str, NDArray[np.float32]]:
    """Reads the .npy files of one `[baselines.NAME]` table; they lie in the folder of its model.toml."""
    assert folder.config_path is not None, "a baseline is stated by a model.toml"
    specs = {spec.name: spec for spec in signature.inputs if spec.differentiable}
    unknown = ", ".join(sorted(table.files.keys() - specs.keys()))
    if unknown:
        raise ModelRefused(
            "CONFIG_MISMATCH",
            f"baseline {name!r} names {unknown}, no floating-point input",
            baseline=name,
            input=unknown,
        )
    return {i: _read_baseline(name, folder.config_path.parent / file, specs[i]) for i, file in table.files.items()}


def _read_baseline(name: str, file: Path, spec: InputSpec) -> NDArray[np.float32]:
    try:
        values: NDArray[np.generic] = np.load(file, allow_pickle=False)
        array = np.asarray(values, np.float32, order="C")
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ModelRefused(
            "BASELINE_UNREADABLE", f"baseline {name!r}: {file.name} is no .npy file of numbers: {error}", baseline=name
        ) from error
    expected = tuple(axis.size for axis in spec.instance_axes)
    fits = len(expected) == array.ndim and all(
        size in (None, extent) for size, extent in zip(expected, array.shape, strict=True)
    )
    if not fits or not np.isfinite(array).all():
        raise ModelRefused(
            "CONFIG_MISMATCH",
            f"baseline {name!r}: {file.name} has shape {array.shape}, "
            f"input {spec.name!r} takes finite values of {expected}",
            baseline=name,
            expected=expected,
            actual=array.shape,
        )
    array.setflags(write=False)
    return array
