"""What a source is, judged by its first bytes and never by its name; and its config and weights."""

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fastgpu.errors import FileError
from fastgpu.importers.keras.hdf5 import damaged, open_hdf5, text_attribute
from fastgpu.importers.keras.weights import WeightSource
from fastgpu.importers.keras.weights_legacy import LegacyWeights
from fastgpu.importers.keras.weights_v3 import WeightsV3

_ZIP, _HDF5 = b"PK\x03\x04", b"\x89HDF\r\n\x1a\n"
_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
_EXPECTED = "a .keras archive, a full .h5, (config, weights) or a keras.Model"
# A config is text: even ConvNeXtXLarge's has less than 1 MB.
_LARGEST_CONFIG = 1 << 28
# Keras stores members uncompressed; a repacked archive of float weights shrinks a few times.
_LARGEST_EXPANSION = 100


@dataclass(frozen=True)
class Checkpoint:
    """A serialized model `{"class_name", "config"}`, where its weights are, and who wrote it."""

    source: str
    config: Mapping[str, Any]
    keras_version: str
    weights: WeightSource


@contextmanager
def open_file(path: Path) -> Iterator[Checkpoint]:
    """A `.keras` archive, its unzipped form (a folder), or a full `.h5`, told apart by content."""
    if path.is_dir():
        opener = _open_folder
    else:
        start = _first_bytes(path)
        if start.startswith(_ZIP):
            opener = _open_archive
        elif start.startswith(_HDF5):
            opener = _open_full_h5
        else:
            raise FileError(
                f"{path} is not a Keras model",
                expected=_EXPECTED,
                got=_kind(start),
                fix="save it with model.save('model.keras')",
            )
    with damaged(str(path), _EXPECTED), opener(path) as checkpoint:
        yield checkpoint


@contextmanager
def open_config_and_weights(config: Any, weights: Any) -> Iterator[Checkpoint]:
    """A config (dict, JSON text, or path of a JSON file) and the path of a `.weights.h5`."""
    path = Path(weights)
    start = _first_bytes(path)
    if not start.startswith(_HDF5):
        raise FileError(f"{path} is no HDF5 file", expected="a .weights.h5 file", got=_kind(start))
    with damaged(str(path), "a .weights.h5 file and its config"), open_hdf5(path) as file:
        model = serialized_model(_config_object(config))
        yield Checkpoint(str(path), model, _version(file, {}), _weights_in(file, str(path)))


def serialized_model(config: Any) -> Mapping[str, Any]:
    """Give `model.get_config()` the class name that the serialized form has."""
    if isinstance(config, dict) and "class_name" not in config and "layers" in config:
        return {
            "class_name": "Functional" if "input_layers" in config else "Sequential",
            "config": config,
        }
    if not isinstance(config, dict) or "class_name" not in config or "config" not in config:
        raise FileError(
            "the config describes no model",
            expected="an object with class_name and config",
            got=", ".join(sorted(config)) if isinstance(config, dict) else type(config).__name__,
            fix="write it with model.to_json() or model.get_config()",
        )
    return config


def _config_object(config: Any) -> Any:
    if isinstance(config, str) and config.lstrip().startswith("{"):
        return _json(config.encode(), "config")
    if isinstance(config, str | Path):
        return _json(_bounded_read(Path(config)), str(config))
    return as_json(config)


def as_json(config: Any) -> Any:
    """A config in memory as it would come out of a file: tuples as lists, arrays as lists."""
    return json.loads(json.dumps(config, default=lambda value: np.asarray(value).tolist()))


@contextmanager
def _open_archive(path: Path) -> Iterator[Checkpoint]:
    with zipfile.ZipFile(path) as archive:
        names = _checked_names(archive, path)
        if _CONFIG not in names:
            raise FileError(
                f"{path} is a zip archive, but not of a Keras model",
                expected=f"{_CONFIG}, {_METADATA} and {_WEIGHTS}",
                got=", ".join(sorted(names)[:5]),
                fix="save the model with model.save('model.keras')",
            )
        config = _json(_member(archive, path, _CONFIG, _LARGEST_CONFIG), f"{path}:{_CONFIG}")
        metadata: Any = {}
        if _METADATA in names:
            metadata = _json(_member(archive, path, _METADATA, _LARGEST_CONFIG), str(path))
        if _WEIGHTS not in names:
            raise _no_weights(path, names)
        with open_hdf5(io.BytesIO(_member(archive, path, _WEIGHTS, None))) as file:
            yield Checkpoint(
                str(path),
                serialized_model(config),
                _version(file, metadata),
                WeightsV3(file, str(path)),
            )


@contextmanager
def _open_folder(path: Path) -> Iterator[Checkpoint]:
    names = {child.name for child in path.iterdir()}
    if _CONFIG not in names:
        saved_model = "a TensorFlow SavedModel" if "saved_model.pb" in names else "another folder"
        raise FileError(
            f"{path} is not the folder form of a Keras archive",
            expected=f"{_CONFIG} and {_WEIGHTS}",
            got=saved_model,
            fix="load it in Keras and save it with model.save('model.keras')",
        )
    if _WEIGHTS not in names:
        raise _no_weights(path, names)
    config = _json(_bounded_read(path / _CONFIG), str(path / _CONFIG))
    metadata: Any = {}
    if _METADATA in names:
        metadata = _json(_bounded_read(path / _METADATA), str(path / _METADATA))
    with open_hdf5(path / _WEIGHTS) as file:
        yield Checkpoint(
            str(path),
            serialized_model(config),
            _version(file, metadata),
            WeightsV3(file, str(path)),
        )


@contextmanager
def _open_full_h5(path: Path) -> Iterator[Checkpoint]:
    with open_hdf5(path) as file:
        text = text_attribute(file, "model_config")
        if text is None:
            raise FileError(
                f"{path} holds weights without the model they belong to",
                expected="a full model with a model_config attribute",
                got=f"groups {', '.join(sorted(file)[:5])}",
                fix=f"pass the config too: from_keras((model.to_json(), {path.name!r}))",
            )
        config = serialized_model(_json(text.encode(), f"{path}:model_config"))
        yield Checkpoint(str(path), config, _version(file, {}), _weights_in(file, str(path)))


def _weights_in(file: Any, source: str) -> WeightSource:
    """The two layouts of Keras weights in HDF5: by layer name, or by path of attributes."""
    if "model_weights" in file:
        return LegacyWeights(file["model_weights"], source)
    if "layer_names" in file.attrs or "layer_names0" in file.attrs:
        return LegacyWeights(file, source)
    return WeightsV3(file, source)


def _version(file: Any, metadata: Any) -> str:
    found = metadata.get("keras_version") if isinstance(metadata, dict) else None
    for group in (file, file.get("model_weights")):
        found = found or (text_attribute(group, "keras_version") if group is not None else None)
    return str(found or "unknown")


def _checked_names(archive: zipfile.ZipFile, path: Path) -> set[str]:
    """The members of an archive; refuses names that leave it, and names that occur twice."""
    names = [info.filename for info in archive.infolist()]
    for name in names:
        parts = PurePosixPath(name.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in name:
            raise FileError(
                f"{path}: member {name!r} leaves the archive",
                expected="names relative to the archive",
                fix="do not load this file; save the model again where it was trained",
            )
        if names.count(name) > 1:
            raise FileError(f"{path}: member {name!r} occurs twice", expected="one of each name")
    return set(names)


def _member(archive: zipfile.ZipFile, path: Path, name: str, largest: int | None) -> bytes:
    """The bytes of a member, after its declared size was judged; its checksum is verified."""
    info = archive.getinfo(name)
    allowed = max(_LARGEST_EXPANSION * info.compress_size, 1 << 20)
    allowed = min(allowed, largest) if largest else allowed
    if info.file_size > allowed or info.compress_size > path.stat().st_size:
        raise FileError(
            f"{path}: member {name!r} declares an absurd size",
            expected=f"at most {allowed:,} bytes for {info.compress_size:,} stored",
            got=f"{info.file_size:,} bytes",
            fix="do not load this file; save the model again where it was trained",
        )
    return archive.read(info)


def _bounded_read(path: Path) -> bytes:
    if path.stat().st_size > _LARGEST_CONFIG:
        raise FileError(f"{path} is too large for a config", expected=f"{_LARGEST_CONFIG:,} bytes")
    return path.read_bytes()


def _json(data: bytes, source: str) -> Any:
    with damaged(source, "JSON text"):
        return json.loads(data)


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError as error:
        raise FileError(
            f"{path} cannot be opened", expected=_EXPECTED, got=error.strerror, fix="check the path"
        ) from error


def _kind(start: bytes) -> str:
    """What the first bytes suggest, in words."""
    if not start:
        return "an empty file"
    if start[4:8] == b"TFL3":
        return "a TFLite model"
    if start.lstrip().startswith((b"{", b"[")):
        return "JSON text (a config without weights?)"
    if start.startswith(b"\x80"):
        return "a Python pickle"
    return f"a file that starts with {start[:8]!r}"


def _no_weights(path: Path, names: set[str]) -> FileError:
    found = sorted(name for name in names if "weights" in name)
    return FileError(
        f"{path} has no {_WEIGHTS}",
        expected=_WEIGHTS,
        got=", ".join(found) or "no weights at all",
        fix="save it with weights_format='h5' and without sharding",
    )
