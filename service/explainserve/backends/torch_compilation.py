"""Whether a model runs compiled: where a compiler is there, what it makes gives the same maps, and is faster.

A compiler takes minutes, may need more memory than there is, and may crash, and nothing ends it from within. So it
first runs in a process of its own, with limits, and leaves what it makes in a folder, from where it is loaded here in
seconds.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from explainserve.backends.contract import Compilation, LoadedModel, LoadOptions
from explainserve.backends.precision import map_error
from explainserve.backends.probe import has_free_axes
from explainserve.backends.timing import is_faster, random_row, repeated
from explainserve.backends.torch_inductor import TYPICAL_ROWS
from explainserve.backends.torch_rows import TorchModel
from explainserve.backends.trial_main import Task
from explainserve.backends.trial_process import TrialProcess
from explainserve.errors import ModelRefused, first_line
from explainserve.model_config import ModelConfig
from explainserve.plan import Rows

logger = logging.getLogger(__name__)

_MEMORY_BYTES = 4 << 30
_MEMORY_PER_BYTE = 12
"""Memory of the process that compiles, beyond that of its libraries, and for each byte of the file. The C++ compilers
that it starts have as much each."""

_TOLD = {
    "MODEL_LOAD_TIMEOUT": "the compiler did not end within {task.seconds:g} s (--compile-seconds)",
    "MODEL_LOAD_MEMORY": "the compiler needed more than {task.memory_bytes} bytes",
    "MODEL_CRASHES": "the process that compiled it crashed",
}
"""What refusals of a trial say of a compiler."""


class NotCompiled(Exception):
    """A model is not compiled, with the reason."""


def where_faster(
    model: TorchModel,
    compiled: Callable[[], TorchModel],
    largest_map_error: float,
    faster: Callable[[LoadedModel, LoadedModel, Rows], bool] = is_faster,
) -> TorchModel:
    """The compiled form of a model where that is right and faster, else the model; either says what came of it.

    Args:
        compiled: makes that form.
        largest_map_error: relative L2 difference of maps that is taken for rounding.
        faster: whether the first of two models evaluates a micro-batch faster than the second.
    """
    try:
        _require_gradient(model)
        found = compiled()
        found.compilation = Compilation(_map_error(found, model, largest_map_error))
        _require_speed(found, model, faster)
    except Exception as error:  # whatever a compiler raises
        logger.info("a model is not compiled: %s", first_line(error))
        model.compilation = Compilation(refusal=first_line(error))
        return model
    return found


def _require_gradient(model: TorchModel) -> None:
    if model.gaps or model.signature.undifferentiable_reason:
        raise NotCompiled("it has no gradient, and forward passes alone are not compiled")
    if has_free_axes(model.signature):
        raise NotCompiled("its inputs have free axes, whose extents code has to know; state them in model.toml")


def _map_error(found: TorchModel, model: TorchModel, largest: float) -> float:
    error = map_error(found, model)
    if error is None or not error <= largest:
        what = "cannot be compared" if error is None else f"differ by a relative {error:.2g}"
        raise NotCompiled(f"maps of random rows, compiled and not, {what}")
    return error


def _require_speed(
    found: TorchModel, model: TorchModel, faster: Callable[[LoadedModel, LoadedModel, Rows], bool]
) -> None:
    if not faster(found, model, typical_rows(model)):
        raise NotCompiled("it was compiled, and is not faster for it")


def typical_rows(model: TorchModel) -> Rows:
    """A micro-batch with the number of rows that code is chosen for."""
    return repeated(random_row(model), 1 if model.fixed_batch else TYPICAL_ROWS)


def compile_elsewhere(path: Path, config: ModelConfig, options: LoadOptions) -> None:
    """Fills `code_folder(config, options)`, in a process of its own.

    Args:
        options: with the layout of images.

    Raises:
        NotCompiled: the compiler is missing, failed, or went beyond a limit.
    """
    memory_bytes = _MEMORY_BYTES + _MEMORY_PER_BYTE * path.stat().st_size
    own = replace(options, cache=_cache(options), compile_seconds=0)
    task = Task("compile", path.absolute(), config, own, options.compile_seconds, memory_bytes)
    process = TrialProcess()
    try:
        process.answer(task)
    except ModelRefused as refusal:
        known = refusal.reason in _TOLD
        raise NotCompiled(_TOLD[refusal.reason].format(task=task) if known else refusal.message) from refusal
    finally:
        process.kill()


def code_folder(config: ModelConfig, options: LoadOptions) -> Path:
    """What holds compiled code. Each precision has one, since torch's own keys do not tell all of them apart."""
    return _cache(options) / "inductor" / config.precision.value


def _cache(options: LoadOptions) -> Path:
    return options.cache or Path(_own_folder().name)


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """One that is deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="explainserve-")
