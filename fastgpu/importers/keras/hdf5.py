"""HDF5 read with suspicion: plain datasets only, nothing linked in, no size taken on trust.

The guards follow those that Keras has after CVE-2025-9905 and CVE-2026-0897.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import ml_dtypes
import numpy as np
from h5py import h5o  # pyright: ignore[reportAttributeAccessIssue]

from fastgpu.errors import FastGPUError, FileError

# Compressed float weights shrink a few times; a thousandfold is an array that is not there.
_LARGEST_EXPANSION = 1000
_SMALL_ENOUGH = 1 << 20
_DEEPEST = 64


@contextmanager
def damaged(source: str, expected: str) -> Iterator[None]:
    """Turn whatever a parser raises on a damaged file into a `FileError` that names the file."""
    try:
        yield
    except FastGPUError:
        raise
    except (Exception, RecursionError) as error:
        # zipfile, json and h5py document no closed list of what damaged input makes them raise.
        raise FileError(
            f"{source} cannot be read",
            expected=expected,
            got=f"{type(error).__name__}: {error}",
            fix="save the model again, or copy the file again: it may be truncated",
        ) from error


def open_hdf5(file: Path | BinaryIO) -> h5py.File:
    """Open an HDF5 file, or the bytes of one, for reading."""
    return h5py.File(file, "r")


def datasets(group: h5py.Group, source: str) -> dict[str, h5py.Dataset]:
    """Every dataset below `group`, by path. Links and external storage raise `FileError`."""
    found: dict[str, h5py.Dataset] = {}
    seen: set[Any] = set()
    todo: list[tuple[str, h5py.Group, int]] = [("", group, 0)]
    while todo:
        prefix, parent, depth = todo.pop()
        for name in map(str, parent):
            path = f"{prefix}{name}"
            child = _child(parent, name, f"{source}:{path}")
            address = h5o.get_info(child.id).addr
            if address in seen or depth > _DEEPEST:
                raise FileError(
                    f"{source}:{path} is a second name of one object, or nested too deep"
                )
            seen.add(address)
            if isinstance(child, h5py.Group):
                todo.append((f"{path}/", child, depth + 1))
            else:
                found[path] = child
    return found


def _child(parent: h5py.Group, name: str, where: str) -> h5py.Group | h5py.Dataset:
    link = parent.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise FileError(
            f"{where} is a link out of its group",
            expected="weights stored in the file itself",
            got=type(link).__name__,
            fix="do not load this file; save the model again where it was trained",
        )
    child = parent[name]
    if not isinstance(child, h5py.Group | h5py.Dataset):
        raise FileError(f"{where} is neither a group nor a dataset")
    if isinstance(child, h5py.Dataset) and (child.external or child.is_virtual):
        raise FileError(
            f"{where} keeps its data in other files",
            expected="weights stored in the file itself",
            fix="do not load this file; save the model again where it was trained",
        )
    return child


def read_array(dataset: h5py.Dataset, source: str) -> np.ndarray:
    """A dataset of numbers as an array; bfloat16 is stored as two opaque bytes.

    Raises `FileError` before memory is taken if it declares far more than it stores.
    """
    declared = math.prod(dataset.shape) * dataset.dtype.itemsize
    stored = dataset.id.get_storage_size()
    if declared > _SMALL_ENOUGH and declared > _LARGEST_EXPANSION * stored:
        raise FileError(
            f"{source}:{dataset.name} declares a size that it does not have",
            expected=f"at most {_LARGEST_EXPANSION} times what is stored ({stored:,} bytes)",
            got=f"{declared:,} bytes",
            fix="do not load this file; save the model again where it was trained",
        )
    dtype = dataset.dtype
    if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None:
        return dataset[()].view(ml_dtypes.bfloat16)
    if dtype.kind not in "fiub":
        raise FileError(f"{source}:{dataset.name} holds {dtype}, expected numbers")
    return np.asarray(dataset[()])


def text_attribute(group: h5py.Group, name: str) -> str | None:
    """A text attribute; Keras 2 wrote bytes."""
    value = group.attrs.get(name)
    return value.decode("utf-8") if isinstance(value, bytes) else value


def names_attribute(group: h5py.Group, name: str) -> list[str]:
    """A list of names; one too long for an HDF5 header is split into `name0`, `name1`, ..."""
    chunks = [name] if name in group.attrs else []
    while not chunks or chunks[0] != name:
        if f"{name}{len(chunks)}" not in group.attrs:
            break
        chunks.append(f"{name}{len(chunks)}")
    values = [value for chunk in chunks for value in np.ravel(np.asarray(group.attrs[chunk]))]
    return [value.decode("utf-8") if isinstance(value, bytes) else str(value) for value in values]
