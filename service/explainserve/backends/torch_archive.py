"""What may be inside a model file of torch, decided before torch loads it.

Both kinds of file are zip archives. `torch.export.load` unpickles some members without restriction, and evaluates
strings of the graph's description as Python; `torch.load` of a plain pickle runs whatever it says. So every member is
looked at here with the reader that torch itself uses, which only hands out bytes, and nothing is loaded that could
run code other than the model's. TorchScript and graphs may still compute what they like: only models of people one
trusts with that are served.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from explainserve.backends.exported_graph import require_plain_graph
from explainserve.errors import ModelRefused, first_line

MAX_INFLATION_BYTES = 256 << 20
"""How much larger than the file its members may declare to be: only source text is deflated, weights are raw."""

_PICKLE_START = b"\x80"
_ZIP_START = b"PK\x03\x04"
_PICKLE_SUFFIXES = (".pt", ".pth", ".pkl", ".pickle")
_FILE_OPERATORS = ("torch.save(", "torch.load(", "torch.from_file(", "ops.aten.save(", "ops.aten.from_file(")


@dataclass(frozen=True)
class TorchArchive:
    """An archive whose frame is sound; its members are named as torch names them, without the root folder."""

    path: Path
    members: tuple[str, ...]
    reader: Any

    def read(self, member: str) -> bytes:
        """Bytes of a member.

        Raises:
            ModelRefused: it is damaged (MODEL_FILE_CORRUPT).
        """
        try:
            content: bytes = self.reader.get_record(member)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise _corrupt(self.path, f"{member} cannot be read: {first_line(error)}") from error
        return content

    def matching(self, prefix: str, suffix: str = "") -> list[str]:
        """Names of members with this beginning and end."""
        return [name for name in self.members if name.startswith(prefix) and name.endswith(suffix)]

    @property
    def is_aotinductor(self) -> bool:
        """Whether it holds compiled code of AOTInductor."""
        return bool(self.matching("data/aotinductor/") or self.matching("", ".so"))

    @property
    def is_exported_program(self) -> bool:
        """Whether it was written by `torch.export.save`."""
        return "archive_format" in self.members and bool(self.matching("models/", ".json"))

    @property
    def is_torchscript(self) -> bool:
        """Whether it was written by `torch.jit.save`."""
        return "constants.pkl" in self.members and bool(self.matching("code/", ".py"))

    @property
    def is_pickle(self) -> bool:
        """Whether it was written by `torch.save`."""
        return "data.pkl" in self.members and not self.is_torchscript


def require_exported_program(path: Path) -> None:
    """Passes a `.pt2` file of `torch.export.save` that can be loaded without unpickling anything but plain tensors.

    Raises:
        ModelRefused: it is damaged (MODEL_FILE_CORRUPT), a plain pickle or holds one (PICKLE_REFUSED), compiled by
            AOTInductor (AOTINDUCTOR_PACKAGE), of another format (MODEL_FORMAT_MISMATCH), or its graph is not plain
            (UNSAFE_GRAPH).
    """
    archive = _open(path)
    if archive.is_aotinductor:
        raise ModelRefused(
            "AOTINDUCTOR_PACKAGE",
            f"{path.name} is an AOTInductor package: compiled code without a gradient; export the model with "
            "torch.export.save(torch.export.export(model, args), file) instead",
            file=path.name,
        )
    if not archive.is_exported_program:
        raise _other_format(archive, "a file of torch.export.save")
    _require_plain_payloads(archive)
    for name in archive.members:
        if name.endswith(_PICKLE_SUFFIXES):
            _require_tensors_only(archive, name)
    for name in archive.matching("models/", ".json"):
        require_plain_graph(_json(archive, name), path.name)


def require_torchscript(path: Path) -> str:
    """Passes a TorchScript file. TorchScript has an unpickler of its own that makes only tensors and its own classes.

    Returns:
        The source text of its code.

    Raises:
        ModelRefused: it is damaged (MODEL_FILE_CORRUPT), a plain pickle (PICKLE_REFUSED), of another format
            (MODEL_FORMAT_MISMATCH), or its code reads or writes files (UNSAFE_GRAPH).
    """
    archive = _open(path)
    if not archive.is_torchscript:
        raise _other_format(archive, "a TorchScript file")
    source = "\n".join(archive.read(name).decode("utf-8", "replace") for name in archive.matching("code/", ".py"))
    called = [operator[:-1] for operator in _FILE_OPERATORS if operator in source]
    if called:
        raise ModelRefused("UNSAFE_GRAPH", f"the code of {path.name} calls {', '.join(called)}", file=path.name)
    return source


def _open(path: Path) -> TorchArchive:
    with path.open("rb") as file:
        start = file.read(len(_ZIP_START))
    if start.startswith(_PICKLE_START):
        raise _pickle(path, "the file")
    if start != _ZIP_START:
        raise _corrupt(path, "it is not a zip archive")
    names = _declared_members(path)
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        members = tuple(str(name) for name in reader.get_all_records())
    except (RuntimeError, UnicodeDecodeError) as error:  # the latter where torch quotes damaged bytes in its message
        raise _corrupt(path, first_line(error)) from error
    root = names[0].split("/")[0]
    if sorted(f"{root}/{member}" for member in members) != sorted(names):
        raise _corrupt(path, "its members are not all in one folder")
    return TorchArchive(path, members, reader)


def _declared_members(path: Path) -> list[str]:
    """Names in the archive's directory, whose declared sizes are possible."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise _corrupt(path, first_line(error)) from error
    names = [info.filename for info in infos]
    file_size = path.stat().st_size
    repeated = [name for name, count in Counter(names).items() if count > 1]
    outside = [name for name in names if name.startswith("/") or ".." in name.split("/")]
    if not names or repeated or outside:
        raise _corrupt(path, f"its members are empty, repeated or outside it: {', '.join(repeated + outside)[:200]}")
    if sum(info.compress_size for info in infos) > file_size:
        raise _corrupt(path, "its members are larger than the file")
    if sum(info.file_size for info in infos) > file_size + MAX_INFLATION_BYTES:
        raise _corrupt(path, f"its members inflate to over {MAX_INFLATION_BYTES} bytes more than the file")
    return names


def _require_plain_payloads(archive: TorchArchive) -> None:
    """Weights and constants are raw bytes: neither pickled tensors nor pickled objects."""
    for name in archive.matching("data/", "_config.json"):
        payloads = _json(archive, name).get("config", {})
        for key, payload in payloads.items() if isinstance(payloads, dict) else ():
            plain = isinstance(payload, dict) and payload.get("use_pickle") is False
            if not plain or not str(payload.get("path_name")).startswith(("weight_", "tensor_")):
                raise _pickle(archive.path, f"{key!r} of {name}")


def _require_tensors_only(archive: TorchArchive, name: str) -> None:
    """torch.export.load unpickles freely whatever the restricted unpickler rejects."""
    content = archive.read(name)
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:
        raise _pickle(archive.path, name) from error


def _json(archive: TorchArchive, name: str) -> dict[str, Any]:
    try:
        content = json.loads(archive.read(name))
    except (ValueError, RecursionError) as error:
        raise _corrupt(archive.path, f"{name} is not JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise _corrupt(archive.path, f"{name} is not a JSON object")
    return content


def _other_format(archive: TorchArchive, expected: str) -> ModelRefused:
    if archive.is_pickle:
        return _pickle(archive.path, "the file")
    found = "a TorchScript file" if archive.is_torchscript else "something else"
    found = "a file of torch.export.save" if archive.is_exported_program else found
    return ModelRefused(
        "MODEL_FORMAT_MISMATCH",
        f"{archive.path.name} is {found}, and its suffix {archive.path.suffix} promises {expected}",
        file=archive.path.name,
        found=found,
        expected=expected,
    )


def _pickle(path: Path, what: str) -> ModelRefused:
    return ModelRefused(
        "PICKLE_REFUSED",
        f"{path.name}: {what} holds a Python pickle, which can run any code when it is read, so it was not read; "
        "export the model with torch.export.save, torch.jit.save or torch.onnx.export instead",
        file=path.name,
        member=what,
    )


def _corrupt(path: Path, why: str) -> ModelRefused:
    return ModelRefused("MODEL_FILE_CORRUPT", f"{path.name} is damaged: {why}", file=path.name)
