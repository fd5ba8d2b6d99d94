"""The layout of `.h5` files: one group per layer of the outermost model, weights by name.

The order of weights within a group depends on what was frozen when the file was written, so
weights are matched by the layer and variable in their names, never by position in a nested model.
"""

import h5py

from fastgpu.errors import FileError
from fastgpu.importers.keras.graph import Graph
from fastgpu.importers.keras.hdf5 import datasets, names_attribute, read_array
from fastgpu.importers.keras.layers.layer import Path
from fastgpu.importers.keras.layers.placed import Placed
from fastgpu.importers.keras.weights import Stored


class LegacyWeights:
    """The weights below an open group that has `layer_names`."""

    def __init__(self, group: h5py.Group, source: str) -> None:
        self.group, self.source = group, source

    def find(self, graph: Graph) -> tuple[dict[Path, list[Stored]], dict[str, str]]:
        """See `WeightSource.find`."""
        stored: dict[Path, list[Stored]] = {}
        leftovers: dict[str, str] = {}
        layers = {placed.name: placed for placed in graph.layers}
        names = names_attribute(self.group, "layer_names")
        for name in [*names, "top_level_model_weights"]:
            if name not in self.group:
                continue
            weights = self._weights(name)
            if name not in layers:
                leftovers |= {found.where: "" for found in weights}
            else:
                leftovers |= _distribute(layers[name], weights, stored)
        return stored, leftovers

    def _weights(self, name: str) -> list[Stored]:
        group = self.group[name]
        if not isinstance(group, h5py.Group):
            raise FileError(f"{self.source}: {name!r} is not a group of weights")
        found = datasets(group, f"{self.source}:{name}")
        weights = []
        for weight in names_attribute(group, "weight_names"):
            if weight not in found:
                raise FileError(
                    f"{self.source}: layer {name!r} lists a weight that the file does not hold",
                    expected=weight,
                    got=", ".join(sorted(found)[:5]),
                )
            weights.append(self._stored(weight, found[weight]))
        return weights

    def _stored(self, name: str, dataset: h5py.Dataset) -> Stored:
        return Stored(
            name,
            name.rpartition("/")[2].split(":")[0],
            dataset.shape,
            lambda: read_array(dataset, self.source),
        )


def _distribute(
    placed: Placed, weights: list[Stored], stored: dict[Path, list[Stored]]
) -> dict[str, str]:
    """Give the weights of a group to its layer, or to the layers of its nested model."""
    if not isinstance(placed.layer, Graph):
        if weights:
            stored[placed.path] = weights
        return {}
    leaves = list(_leaves(placed.layer))
    leftovers: dict[str, str] = {}
    for found in weights:
        owner = found.where.split("/")[:-1]
        fits = [path for path in leaves if _common_suffix(path, owner)]
        best = max((_common_suffix(path, owner) for path in fits), default=0)
        owners = [path for path in fits if _common_suffix(path, owner) == best]
        if len(owners) != 1:
            leftovers[found.where] = ""
        else:
            stored.setdefault(owners[0], []).append(found)
    return leftovers


def _leaves(graph: Graph) -> list[Path]:
    paths: list[Path] = []
    for placed in graph.layers:
        nested = placed.layer
        paths += _leaves(nested) if isinstance(nested, Graph) else [placed.path]
    return paths


def _common_suffix(path: Path, owner: list[str]) -> int:
    """How many names the end of a layer's path and of a weight's owner have in common."""
    count = 0
    while count < min(len(path), len(owner)) and path[-1 - count] == owner[-1 - count]:
        count += 1
    return count
