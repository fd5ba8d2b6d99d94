"""A Keras file to measure: saved from a live model, or copied with its dropout switched off."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import h5py

_RATES = {
    "Dropout": "rate",
    "SpatialDropout1D": "rate",
    "SpatialDropout2D": "rate",
    "SpatialDropout3D": "rate",
    "AlphaDropout": "rate",
    "GaussianDropout": "rate",
    "GaussianNoise": "stddev",
    "StochasticDepth": "drop_path_rate",
}


def file_of(source: Any, folder: Path) -> Path:
    """The path of a Keras file; a live model is saved into `folder` first."""
    if isinstance(source, str | Path):
        return Path(source).absolute()
    path = folder / "model.keras"
    source.save(path)
    return path


def without_dropout(path: Path, folder: Path) -> Path:
    """A copy of the file whose random layers do nothing; `path` itself if it has none.

    Frameworks draw different random numbers, so losses can be compared only without them.
    """
    copy = folder / f"without_dropout{path.suffix}"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
            if not _switch_off(config):
                return path
            with zipfile.ZipFile(copy, "w") as out:
                for name in archive.namelist():
                    data = archive.read(name)
                    out.writestr(name, json.dumps(config) if name == "config.json" else data)
        return copy
    with h5py.File(path) as file:
        config = json.loads(file.attrs["model_config"])  # pyright: ignore[reportArgumentType]
    if not _switch_off(config):
        return path
    shutil.copyfile(path, copy)
    with h5py.File(copy, "r+") as file:
        file.attrs["model_config"] = json.dumps(config)
    return copy


def _switch_off(config: Any) -> bool:
    """Set the rates in `config` to 0, in place; whether there were any."""
    if isinstance(config, list):
        return sum(map(_switch_off, config)) > 0  # every item, not only up to the first hit
    if not isinstance(config, dict):
        return False
    changed = sum(map(_switch_off, config.values())) > 0
    name = _RATES.get(str(config.get("class_name")))
    settings = config.get("config")
    if name and isinstance(settings, dict) and settings.get(name):
        settings[name] = 0.0
        changed = True
    return changed
