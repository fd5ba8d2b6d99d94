"""Reading .npz data: what is refused, and that the message says why."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

import fastgpu.cli.data
from fastgpu.cli.data import load_data
from fastgpu.errors import FileError


def npz(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    return path


def declares(shape: tuple[int, ...], path: Path) -> Path:
    """An .npz whose array says that it is of `shape`, and holds 8 bytes."""
    file = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inputs.npy", file.getvalue() + b"\0" * 8)
        archive.writestr("labels.npy", file.getvalue() + b"\0" * 8)
    return path


def test_inputs_and_labels_come_back(tmp_path: Path) -> None:
    x, y = np.ones((3, 2), np.float32), np.arange(3)
    batch = load_data(npz(tmp_path / "one.npz", inputs=x, labels=y))
    np.testing.assert_array_equal(batch["inputs"], x)
    np.testing.assert_array_equal(batch["labels"], y)


def test_several_inputs_come_back_in_order(tmp_path: Path) -> None:
    arrays = {f"input_{i}": np.full((2, 1), i) for i in range(11)}
    batch = load_data(npz(tmp_path / "many.npz", labels=np.zeros(2), **arrays))
    assert [int(array[0, 0]) for array in batch["inputs"]] == list(range(11))


def test_a_compressed_file_and_an_empty_dimension_are_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "c.npz", inputs=np.zeros((4, 0)), labels=np.zeros(4))
    assert load_data(tmp_path / "c.npz")["inputs"].shape == (4, 0)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.npz"
    text.write_text("inputs,labels")
    whole = npz(tmp_path / "whole.npz", inputs=np.zeros((50, 2)), labels=np.zeros(50))
    truncated = tmp_path / "truncated.npz"
    truncated.write_bytes(whole.read_bytes()[:-40])
    damaged = tmp_path / "damaged.npz"
    data = bytearray(whole.read_bytes())
    data[300] ^= 0xFF  # inside of the first array
    damaged.write_bytes(data)
    other = tmp_path / "other.npz"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("notes.txt", "not an array")
    objects = npz(tmp_path / "o.npz", inputs=np.array([{}, {}], object), labels=np.zeros(2))
    cases = {
        tmp_path / "missing.npz": "is not a file",
        tmp_path: "is not a file",
        text: "is not an .npz file",
        truncated: "is truncated",
        damaged: "CRC",
        other: "cannot be read",
        objects: "Python objects",
        declares((10**12, 10**12), tmp_path / "absurd.npz"): "declares another size than it has",
        npz(tmp_path / "names.npz", x=np.zeros(2), y=np.zeros(2)): "lacks an array",
        npz(tmp_path / "lengths.npz", inputs=np.zeros((3, 2)), labels=np.zeros(2)): "do not fit",
        npz(tmp_path / "scalar.npz", inputs=np.zeros(()), labels=np.zeros(())): "do not fit",
        npz(tmp_path / "empty.npz", inputs=np.zeros((0, 2)), labels=np.zeros(0)): "do not fit",
    }
    for path, said in cases.items():
        with pytest.raises(FileError, match=said) as error:
            load_data(path)
        assert error.value.expected and error.value.got, path


def test_what_is_too_large_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = npz(tmp_path / "large.npz", inputs=np.zeros((100, 8)), labels=np.zeros(100))
    monkeypatch.setattr(fastgpu.cli.data, "LIMIT_BYTES", 1000)
    with pytest.raises(FileError, match="too large") as error:
        load_data(path)
    assert "iterable of batches" in str(error.value.fix)
