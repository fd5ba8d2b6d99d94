"""Arrays of a file, read with suspicion: no declared size is taken on trust, no path followed out.

External data may lie only in the model's own folder, and no byte of it is read twice.
"""

import math
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from fastgpu.errors import FileError, UnsupportedLayerError, require
from fastgpu.importers.onnx.dtypes import element_type

_FOUR_BITS = (21, 22, 23)
_LARGEST_RANK = 32
# Fields of TensorProto that hold single elements, by element type; the rest is in int32_data.
_FIELDS = {
    1: "float_data",
    7: "int64_data",
    11: "double_data",
    12: "uint64_data",
    13: "uint64_data",
}
_COMPLEX = {14: "float_data", 15: "double_data"}


class ExternalData:
    """The files beside a model that hold arrays; `folder` is None for a model without a path."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.unread: dict[Path, int] = {}

    def read(self, tensor: Any, size: int, where: str) -> bytes:
        """The bytes of one array, after its place and size were judged."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        path = self._path(entries.get("location", ""), where)
        try:
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
            stored = path.stat().st_size
        except (ValueError, OSError) as error:
            raise FileError(
                f"{where} lies in a file that cannot be read", got=str(error), fix="copy all files"
            ) from error
        unread = self.unread.setdefault(path, stored)
        if offset < 0 or length != size or offset + size > stored or size > unread:
            raise FileError(
                f"{where} does not fit the file that should hold it",
                expected=f"{size:,} bytes of the {stored:,} in {path.name}, each read once",
                got=f"{length:,} from {offset:,} on",
                fix="copy the model and its data again; they may be truncated",
            )
        self.unread[path] = unread - size
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise FileError(
                f"{where} ended early", expected=f"{size:,} bytes", got=f"{len(data):,}"
            )
        return data

    def _path(self, location: str, where: str) -> Path:
        if self.folder is None:
            raise FileError(
                f"{where} lies in another file",
                expected="a model with all its arrays in it",
                got=f"external data {location!r}",
                fix="pass the path of the model instead of its bytes",
            )
        leaves = "\0" in location or any(
            pure.is_absolute() or pure.drive or ".." in pure.parts or not pure.parts
            for pure in (PurePosixPath(location), PureWindowsPath(location))
        )
        path = self.folder / location if not leaves else self.folder
        if not leaves:
            leaves = not path.resolve().is_relative_to(self.folder.resolve())
        if leaves or not path.is_file():
            raise FileError(
                f"{where} lies in {location[:200]!r}, which "
                + ("leaves the model's folder" if leaves else "is no file"),
                expected=f"a file in {self.folder}",
                fix="do not load this file" if leaves else "copy the model's data files too",
            )
        return path


def read_tensor(tensor: Any, where: str, external: ExternalData) -> np.ndarray:
    """A TensorProto as an array. Raises `FileError` if what is stored is not what is declared."""
    dtype = element_type(tensor.data_type, where)
    dims = tuple(tensor.dims)
    count = math.prod(dims)
    if len(dims) > _LARGEST_RANK or any(size < 0 for size in dims):
        raise FileError(f"{where} has an impossible shape", got=str(list(dims))[:200])
    four = tensor.data_type in _FOUR_BITS
    size = (count + 1) // 2 if four else count * dtype.itemsize
    if tensor.HasField("segment"):
        raise UnsupportedLayerError(f"{where} is stored in segments")
    if tensor.data_location == 1:  # EXTERNAL
        data = external.read(tensor, size, where)
    elif tensor.HasField("raw_data"):
        data = tensor.raw_data
    else:
        return _from_fields(tensor, dims, dtype, count, where)
    if len(data) != size:
        raise _wrong_size(where, f"{size:,} bytes for {dtype}{list(dims)}", f"{len(data):,}")
    if four:
        halves = np.frombuffer(data, np.uint8)
        nibbles = np.stack((halves & 15, halves >> 4), 1).reshape(-1)[:count]
        return _four_bits(nibbles, dtype).reshape(dims)
    array = np.frombuffer(data, dtype.newbyteorder("<") if dtype.isbuiltin == 1 else dtype)
    return array.astype(dtype, copy=False).reshape(dims)


def _from_fields(
    tensor: Any, dims: tuple[int, ...], dtype: np.dtype[Any], count: int, where: str
) -> np.ndarray:
    kind = tensor.data_type
    four = kind in _FOUR_BITS
    field = _COMPLEX.get(kind) or _FIELDS.get(kind, "int32_data")
    stored = getattr(tensor, field)
    expected = count * 2 if kind in _COMPLEX else (count + 1) // 2 if four else count
    if len(stored) != expected:
        raise _wrong_size(
            where, f"{expected:,} numbers for {dtype}{list(dims)}", f"{len(stored):,}"
        )
    helper = require("onnx.numpy_helper", "onnx")
    if four:
        halves = np.asarray(stored, np.int64).astype(np.uint8)
        nibbles = np.stack((halves & 15, halves >> 4), 1).reshape(-1)[:count]
        return _four_bits(nibbles, dtype).reshape(dims)
    with np.errstate(all="ignore"):
        return np.asarray(helper.to_array(tensor)).astype(dtype, copy=False).reshape(dims)


def _four_bits(nibbles: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Four-bit numbers, two of which a file keeps in a byte; ml_dtypes keeps one."""
    if dtype.name == "int4":
        return ((nibbles.astype(np.int8) ^ 8) - 8).astype(dtype)
    return nibbles.astype(dtype) if dtype.name == "uint4" else nibbles.view(dtype)


def _wrong_size(where: str, expected: str, got: str) -> FileError:
    return FileError(
        f"{where} holds another number of elements than it declares",
        expected=expected,
        got=got,
        fix="copy the file again; it may be truncated",
    )
