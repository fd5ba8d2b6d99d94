"""Keras models, from files or live, as linen modules. Neither Keras nor TensorFlow is needed.

    file or model -> config and weights -> graph -> module and variables

No code from a file runs: classes become rules of the table in `layers`, and only zip, JSON and
plain HDF5 datasets are read.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from fastgpu.errors import FileError
from fastgpu.importers.imported import Imported, ImportReport
from fastgpu.importers.keras.architecture import read_graph
from fastgpu.importers.keras.files import Checkpoint, open_config_and_weights, open_file
from fastgpu.importers.keras.hdf5 import damaged
from fastgpu.importers.keras.layers.registry import register_keras_layer
from fastgpu.importers.keras.live import from_live, is_live_model
from fastgpu.importers.keras.module import KerasModel
from fastgpu.importers.keras.weights import declare, fill

__all__ = ["KerasModel", "from_keras", "register_keras_layer"]


def from_keras(source: Any, custom_objects: Mapping[str, Any] | None = None) -> Imported:
    """Import a Keras model as a linen module with its variables.

    Args:
        source: the path of a `.keras` archive (or its unzipped folder) or of a full `.h5`; a pair
            (config, path of a `.weights.h5`), the config as a dict, JSON text or the path of a JSON
            file; or a live `keras.Model`.
        custom_objects: replacements by layer name, class name or activation name: a function of the
            layer's inputs; a `fastgpu.importers.keras.layers.Layer` subclass, built from the
            layer's config; or the name of a Keras class to treat it as.

    Returns:
        `Imported(module, variables, report)`. `module.apply(variables, *inputs)` equals the
        Keras model's inference; see `KerasModel` for training and for the collections.

    Raises:
        UnsupportedLayerError: layers or options without an equal, all of them by name, before any
            weight is read.
        WeightsError: weights missing, left over, or of another shape.
        FileError: anything else that is wrong with the file.

    >>> imported = from_keras("model.keras")  # doctest: +SKIP
    >>> imported.variables["params"]["dense"]["kernel"].shape  # doctest: +SKIP
    (3, 2)
    >>> imported.module.apply(imported.variables, np.ones((4, 3))).shape  # doctest: +SKIP
    (4, 2)
    """
    with _open(source) as checkpoint:
        report = ImportReport(checkpoint.source)
        with damaged(f"the config of {checkpoint.source}", "the config of a Keras model"):
            graph = read_graph(
                checkpoint.config, custom_objects or {}, checkpoint.keras_version, report
            )
        declared = declare(graph, checkpoint.source)
        stored, leftovers = checkpoint.weights.find(graph)
        variables = fill(declared, stored, leftovers, report)
    return Imported(KerasModel(graph), variables, report)


def _open(source: Any) -> AbstractContextManager[Checkpoint]:
    if isinstance(source, str | Path):
        return open_file(Path(source))
    if isinstance(source, tuple) and len(source) == 2:
        return open_config_and_weights(*source)
    if is_live_model(source):
        return nullcontext(from_live(source))
    raise FileError(
        "from_keras cannot read this",
        expected="a path, a pair (config, weights path) or a keras.Model",
        got=type(source).__name__,
        fix="pass the path of a file written by model.save('model.keras')",
    )
