"""Training data from an .npz file: no pickles, nothing larger than what the file holds."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastgpu.errors import FileError

LIMIT_BYTES = 32 * 2**30


def load_data(path: Path) -> dict[str, Any]:
    """`{"inputs": array or tuple of arrays, "labels": array}` from an .npz file.

    Raises `FileError` if the file is missing, is no .npz, is damaged, holds Python objects,
    declares other sizes than it has, or lacks an array; and if arrays differ in length.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "data.npz")
    >>> np.savez(path, inputs=np.zeros((4, 2)), labels=np.zeros(4, int))
    >>> load_data(path)["inputs"].shape
    (4, 2)
    """
    if not path.is_file():
        raise FileError(f"{path} is not a file", expected="an .npz file", got="nothing there")
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            start = file.read(8)
        raise FileError(
            f"{path} is not an .npz file, or is truncated",
            expected="a zip archive of arrays, as np.savez writes it",
            got=f"{path.stat().st_size} bytes that begin with {start!r}",
        )
    with _damage_named(path):
        _check_sizes(path)
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    return _batch(path, found)


def _check_sizes(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        total = sum(member.file_size for member in archive.infolist())
        if total > LIMIT_BYTES:
            raise FileError(
                f"{path} is too large to be read into memory",
                expected=f"at most {LIMIT_BYTES} bytes",
                got=f"{total} bytes",
                fix="call fastgpu.fit with an iterable of batches",
            )
        for member in archive.infolist():
            with archive.open(member) as file:
                declared = _declared_bytes(file) + file.tell()
            if declared != member.file_size:
                raise FileError(
                    f"{member.filename} in {path} declares another size than it has",
                    expected=f"{declared} bytes",
                    got=f"{member.file_size} bytes",
                )


def _declared_bytes(file: Any) -> int:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which could run code when it is read")
    count = 1
    for size in shape:
        count *= size  # Python integers: an absurd shape must not overflow
    return count * dtype.itemsize


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except FileError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise FileError(
            f"{path} cannot be read",
            expected="arrays of numbers, as np.savez writes them",
            got=str(error),
        ) from error


def _batch(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    names = sorted((name for name in arrays if name.startswith("input_")), key=_number)
    inputs: Any = arrays.get("inputs")
    if inputs is None and names:
        inputs = tuple(arrays[name] for name in names)
    if inputs is None or "labels" not in arrays:
        raise FileError(
            f"{path} lacks an array",
            expected="inputs (or input_0, input_1, ...) and labels",
            got=", ".join(arrays) or "no arrays",
            fix="np.savez(path, inputs=x, labels=y)",
        )
    batch = {"inputs": inputs, "labels": arrays["labels"]}
    all_arrays = (*inputs, batch["labels"]) if isinstance(inputs, tuple) else tuple(batch.values())
    lengths = {len(array) if array.ndim else 0 for array in all_arrays}
    if len(lengths) != 1 or 0 in lengths:
        raise FileError(
            f"the arrays in {path} do not fit together",
            expected="the same number of examples along the first axis, at least one",
            got=", ".join(str(array.shape) for array in all_arrays),
        )
    return batch


def _number(name: str) -> tuple[int, str]:
    digits = name.removeprefix("input_")
    return (int(digits), "") if digits.isdigit() else (2**31, name)
