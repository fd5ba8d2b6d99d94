"""The layout of `.keras` archives and `.weights.h5` files: groups named by class and count.

The weights of a layer lie in `layers/<class in snake case>[_<k>]/vars/<n>`, where k counts the
layers of one class in their model, and n its variables. The names of layers play no part.
"""

from collections.abc import Mapping

import h5py

from fastgpu.errors import FileError
from fastgpu.importers.keras.graph import Graph
from fastgpu.importers.keras.hdf5 import datasets, read_array
from fastgpu.importers.keras.layers.layer import Layer, Path
from fastgpu.importers.keras.layers.operations import Operation
from fastgpu.importers.keras.layers.placed import Placed
from fastgpu.importers.keras.names import group_name
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
        leftovers: dict[str, str] = {}
        groups = layer_groups(graph)
        for name in sorted(found, key=_order):
            reason = _reason(name)
            path = None if reason else _path(name, groups)
            if path is None:
                leftovers[name] = reason
            else:
                stored.setdefault(path, []).append(self._stored(name, found[name]))
        for placed in groups.values():
            if isinstance(placed.layer, Layer) and placed.path in stored:
                own, count = stored[placed.path], placed.layer.saved_twice
                leftovers |= {weight.where: "a copy of a nested layer's" for weight in own[:count]}
                stored[placed.path] = own[count:]
        return stored, leftovers

    def _stored(self, name: str, dataset: h5py.Dataset) -> Stored:
        return Stored(name, None, dataset.shape, lambda: read_array(dataset, self.source))


def layer_groups(graph: Graph, prefix: str = "") -> dict[str, Placed]:
    """Every layer by its group, with those of nested models and those that layers wrap."""
    groups: dict[str, Placed] = {}
    counts: dict[str, int] = {}
    for placed in graph.layers:
        if isinstance(placed.layer, Operation):
            continue
        name = group_name(placed.class_name)
        count = counts.get(name, 0)
        counts[name] = count + 1
        group = f"{prefix}layers/{name}_{count}" if count else f"{prefix}layers/{name}"
        groups |= _with_children(group, placed)
    return groups


def _with_children(group: str, placed: Placed) -> dict[str, Placed]:
    if isinstance(placed.layer, Graph):
        return layer_groups(placed.layer, f"{group}/")
    groups = {group: placed}
    for child in placed.children():
        groups |= _with_children("/".join((group, *child.path[len(placed.path) :])), child)
    return groups


def _path(name: str, groups: Mapping[str, Placed]) -> Path | None:
    """The path of the layer, or of the part of a layer, that a dataset belongs to.

    Whether an attribute is private changes from version to version.
    """
    parent, found, number = name.rpartition("/vars/")
    if not found or "/" in number:
        return None
    parts = parent.split("/")
    for length in range(len(parts), 0, -1):
        group = "/".join(parts[:length])
        if group in groups:
            return (*groups[group].path, *(part.lstrip("_") for part in parts[length:]))
    return None


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
