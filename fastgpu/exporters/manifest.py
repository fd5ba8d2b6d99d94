"""The JSON file that says what an exported StableHLO folder holds; read as a stranger's data."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fastgpu.errors import FileError
from fastgpu.exporters.lowering import LARGEST_PROGRAM
from fastgpu.exporters.signatures import InputSpec

FORMAT, VERSION = "fastgpu-stablehlo", 1
MANIFEST_FILE, PROGRAM_FILE, WEIGHTS_FILE = "stablehlo.json", "program.bin", "weights.safetensors"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_LARGEST_MANIFEST = 1 << 20
_LARGEST_RANK = 64
_LARGEST_STORED = LARGEST_PROGRAM + (1 << 20)
_EXPORT_AGAIN = "export the model again, or copy the whole folder from where it was exported"


@dataclass(frozen=True)
class StoredFile:
    """A file of the export: its size in bytes and the SHA-256 of its contents in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an exported program takes, returns, runs on, and which files it is made of.

    `weights` is None when they are constants of the program.
    """

    fastgpu: str
    jax: str
    calling_convention_version: int
    platforms: tuple[str, ...]
    inputs: tuple[InputSpec, ...]
    outputs: tuple[InputSpec, ...]
    program: StoredFile
    weights: StoredFile | None

    def to_json(self) -> str:
        """The manifest as JSON text, with the format and its version."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        document = {"format": FORMAT, "version": VERSION, **fields}
        return json.dumps(document, indent=1, default=_plain)


def describe_file(path: Path) -> StoredFile:
    """The size and hash of a file."""
    with path.open("rb") as file:
        return StoredFile(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported folder, every field checked.

    Raises `FileError` when it is missing, too large, no JSON, of another version, or has a field
    that is not what it should be.
    """
    path = folder / MANIFEST_FILE
    _check_regular(path)
    if path.stat().st_size > _LARGEST_MANIFEST:
        raise FileError(
            f"{path} is too large",
            expected=f"at most {_LARGEST_MANIFEST:,} bytes",
            got=f"{path.stat().st_size:,} bytes",
            fix=_EXPORT_AGAIN,
        )
    text = path.read_bytes()
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"{path} is damaged", expected="JSON", got=str(error), fix=_EXPORT_AGAIN
        ) from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise FileError(
            f"{path} is no manifest of a StableHLO export",
            expected=f'an object with "format": "{FORMAT}"',
            got=text[:60].decode(errors="replace"),
            fix="give the folder that export_stablehlo wrote",
        )
    if document.get("version") != VERSION or isinstance(document["version"], bool):
        raise FileError(
            f"{path} is of a version that this fastgpu does not know",
            expected=f"version {VERSION}",
            got=f"version {document.get('version')!r:.40}",
            fix="upgrade fastgpu, or export the model again with this one",
        )
    return _checked(document, path)


def check_file(path: Path, stored: StoredFile) -> Path:
    """`path`, if its contents are what the manifest says.

    Raises `FileError` when it is missing, no regular file, or of another size or hash.
    """
    _check_regular(path)
    found = describe_file(path) if path.stat().st_size == stored.bytes else None
    if found != stored:
        size = path.stat().st_size
        raise FileError(
            f"{path} is not the file that was exported",
            expected=f"{stored.bytes:,} bytes with SHA-256 {stored.sha256}",
            got=f"{size:,} bytes" + (f" with SHA-256 {found.sha256}" if found else ""),
            fix=_EXPORT_AGAIN,
        )
    return path


def _check_regular(path: Path) -> None:
    """Links are refused, because they could lead out of the folder."""
    if path.is_symlink() or not path.is_file():
        raise FileError(
            f"{path} cannot be read",
            expected="a file of its own, not a link",
            got="another kind of file" if os.path.lexists(path) else "nothing",
            fix=_EXPORT_AGAIN,
        )


def _plain(value: Any) -> Any:
    if isinstance(value, InputSpec):
        return {"name": value.name, "shape": list(value.shape), "dtype": value.dtype.name}
    return dataclasses.asdict(value)


def _checked(document: dict[str, Any], path: Path) -> Manifest:
    def field(name: str, check: Callable[[Any], Any], expected: str) -> Any:
        try:
            return check(document[name])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise FileError(
                f"{path}: the field {name!r} is damaged",
                expected=expected,
                got=f"{document.get(name)!r:.100}",
                fix=_EXPORT_AGAIN,
            ) from None

    arrays = "a list of names, shapes and dtypes"
    return Manifest(
        fastgpu=field("fastgpu", _text, "a version"),
        jax=field("jax", _text, "a version"),
        calling_convention_version=field("calling_convention_version", _count, "a number"),
        platforms=field("platforms", _platforms, f"platforms from {', '.join(PLATFORMS)}"),
        inputs=field("inputs", _arrays, arrays),
        outputs=field("outputs", _arrays, arrays),
        program=field("program", _program, f"bytes (up to {_LARGEST_STORED:,}) and sha256"),
        weights=field("weights", lambda given: None if given is None else _stored(given), "a file"),
    )


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError


def _text(given: Any) -> str:
    _require(isinstance(given, str))
    return given


def _count(given: Any) -> int:
    _require(isinstance(given, int) and not isinstance(given, bool) and given >= 0)
    return given


def _platforms(given: Any) -> tuple[str, ...]:
    _require(isinstance(given, list) and len(given) > 0)
    _require(all(name in PLATFORMS for name in given))
    return tuple(given)


def _arrays(given: Any) -> tuple[InputSpec, ...]:
    _require(isinstance(given, list))
    specs = tuple(_array(entry) for entry in given)
    _require(len({spec.name for spec in specs}) == len(specs))
    return specs


def _array(given: Any) -> InputSpec:
    shape, dtype = given["shape"], np.dtype(jax.numpy.dtype(_text(given["dtype"])))
    _require(isinstance(shape, list) and len(shape) <= _LARGEST_RANK)
    numeric = jax.numpy.issubdtype(dtype, np.number) or dtype == np.bool_
    _require(bool(numeric) and dtype.name == given["dtype"])
    sizes = tuple(size if isinstance(size, str) else _count(size) for size in shape)
    return InputSpec(_text(given["name"]), sizes, dtype)


def _stored(given: Any) -> StoredFile:
    _require(re.fullmatch(r"[0-9a-f]{64}", given["sha256"]) is not None)
    return StoredFile(_count(given["bytes"]), given["sha256"])


def _program(given: Any) -> StoredFile:
    stored = _stored(given)
    _require(stored.bytes <= _LARGEST_STORED)
    return stored
