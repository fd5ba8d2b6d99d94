"""The layout of `.keras` archives and `.weights.h5` files: groups named by class and count.

The weights of a layer lie in `layers/<class in snake case>[_<k>]/vars/<n>`, where k counts the
layers of one class in their model, and n its variables. The names of layers play no part.
"""

import re

import h5py

from fastgpu.errors import FileError
from fastgpu.importers.keras.graph import Graph
from fastgpu.importers.keras.hdf5 import datasets, read_array
from fastgpu.importers.keras.layers.layer import Path
from fastgpu.importers.keras.layers.operations import Operation
from fastgpu.importers.keras.weights import Stored

_OLDER = "_layer_checkpoint_dependencies"
_TRAINING_STATE = ("optimizer", "metrics", "_metrics", "_compile_metrics", "_loss_tracker")


class WeightsV3:
    """The weights in an open HDF5 file of this layout."""

    def __init__(self, file: h5py.File, source: str) -> None:
        self.file, self.source = file, source

    def find(self, graph: Graph) -> tuple[dict[Path, list[Stored]], dict[str, str]]:
        """See `WeightSource.find`."""
        if _OLDER in self.file:
            raise FileError(
                f"{self.source} was written by Keras 2",
                expected="weights in the layout of Keras 3",
                got=f"a group {_OLDER!r}",
                fix="load it in the Keras that wrote it and save it as .h5",
            )
        found = datasets(self.file, self.source)
        stored: dict[Path, list[Stored]] = {}
        for group, path in layer_groups(graph).items():
            names = sorted((name for name in found if _parent(name) == f"{group}/vars"), key=_order)
            for name in names:
                stored.setdefault(path, []).append(self._stored(name, found.pop(name)))
        return stored, {name: _reason(name) for name in found}

    def _stored(self, name: str, dataset: h5py.Dataset) -> Stored:
        return Stored(name, None, dataset.shape, lambda: read_array(dataset, self.source))


def layer_groups(graph: Graph, prefix: str = "") -> dict[str, Path]:
    """The group of every layer with the path of its variables, nested models included."""
    groups: dict[str, Path] = {}
    counts: dict[str, int] = {}
    for placed in graph.layers:
        if isinstance(placed.layer, Operation):
            continue
        name = snake_case(placed.class_name)
        count = counts.get(name, 0)
        counts[name] = count + 1
        group = f"{prefix}layers/{name}_{count}" if count else f"{prefix}layers/{name}"
        if isinstance(placed.layer, Graph):
            groups |= layer_groups(placed.layer, f"{group}/")
        else:
            groups[group] = placed.path
    return groups


def snake_case(name: str) -> str:
    """Keras's spelling of a class in a file.

    >>> [snake_case(name) for name in ("PReLU", "ConvLSTM2D", "RMSNormalization")]
    ['p_re_lu', 'conv_lstm2d', 'rms_normalization']
    """
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def _order(name: str) -> tuple[int, str]:
    """Variables are numbered; HDF5 lists them as text, "10" before "2"."""
    last = name.rpartition("/")[2]
    return (int(last) if last.isdecimal() else -1, last)


def _reason(name: str) -> str:
    """Why a dataset of no layer may be left where it is."""
    if name.split("/")[0] in _TRAINING_STATE:
        return "training state of Keras (optimizer or metrics)"
    if "seed_generator" in name:
        return "state of a random generator: pass rngs={'dropout': key}"
    return ""
