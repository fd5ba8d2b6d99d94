"""A `keras.Model` in memory. Its classes are not needed: it is asked for its config and weights.

This is the only file that touches Keras objects.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastgpu.errors import UnsupportedLayerError
from fastgpu.importers.keras.files import Checkpoint, as_json
from fastgpu.importers.keras.graph import Graph
from fastgpu.importers.keras.layers.layer import Path
from fastgpu.importers.keras.layers.operations import Operation
from fastgpu.importers.keras.weights import Stored


def is_live_model(source: Any) -> bool:
    """Whether `source` behaves like a Keras model."""
    return all(hasattr(source, name) for name in ("get_config", "layers", "weights", "name"))


def from_live(model: Any) -> Checkpoint:
    """The config and the weights of a live model, as a file would hold them."""
    config = model.get_config()
    if "layers" not in config:
        raise UnsupportedLayerError(
            f"model {model.name!r} ({type(model).__name__}) is a subclassed model",
            expected="a Sequential or Functional model",
            got="a model whose forward pass is Python code",
            fix="build it with keras.Model(inputs, outputs)",
        )
    config = as_json(config)
    _mark_shared(config, model)
    entry = {"class_name": type(model).__name__, "config": config}
    module = type(model).__module__.split(".")[0]
    if module in ("keras", "tf_keras") and entry["class_name"] == "Model":
        entry["class_name"] = "Functional"
    source = f"keras.Model {model.name!r}"
    return Checkpoint(source, entry, _version(module), LiveWeights(model))


class LiveWeights:
    """The weights of the layers of a live model."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def find(self, graph: Graph) -> tuple[dict[Path, list[Stored]], dict[str, str]]:
        """See `WeightSource.find`."""
        stored: dict[Path, list[Stored]] = {}
        _collect(graph, self.model, stored)
        return stored, {}


def _collect(graph: Graph, model: Any, stored: dict[Path, list[Stored]]) -> None:
    layers = {layer.name: layer for layer in model.layers}
    for placed in graph.layers:
        if isinstance(placed.layer, Operation):
            continue
        layer = layers[placed.name]
        if isinstance(placed.layer, Graph):
            _collect(placed.layer, layer, stored)
        elif layer.weights:
            stored[placed.path] = [_stored(layer.name, weight) for weight in layer.weights]


def _stored(layer: str, weight: Any) -> Stored:
    where = f"{layer}/{weight.name}"
    return Stored(where, weight.name, tuple(weight.shape), lambda: np.asarray(weight))


def _mark_shared(config: Mapping[str, Any], model: Any) -> None:
    """Keras marks a layer that occurs in several models only when it saves; do it here too."""
    layers = {layer.name: layer for layer in model.layers}
    for entry in config["layers"]:
        layer = layers.get(entry["config"].get("name"))
        if layer is not None:
            entry["shared_object_id"] = id(layer)
            if "layers" in entry["config"]:
                _mark_shared(entry["config"], layer)


def _version(package: str) -> str:
    """The version of the Keras that the model came from, which is imported already."""
    import sys

    return str(getattr(sys.modules.get(package), "__version__", "unknown"))
