"""MODEL on the command line: a Keras or ONNX file, or the name of a model in `fastgpu.models`."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fastgpu import models
from fastgpu.errors import FastGPUError, FileError
from fastgpu.importers import Imported, from_keras, from_onnx


class LoadedModel(NamedTuple):
    """A module with its variables, and the type of one example of each input."""

    module: Any
    variables: dict[str, Any]
    inputs: tuple[jax.ShapeDtypeStruct, ...]


def is_model_file(model: str) -> bool:
    """Whether MODEL is meant as a file.

    >>> is_model_file("a/b.keras"), is_model_file("a/b.onnx"), is_model_file("resnet18")
    (True, True, False)
    """
    return Path(model).suffix in (".keras", ".h5", ".hdf5", ".onnx") or Path(model).exists()


def is_keras_file(model: str) -> bool:
    """Whether MODEL is meant as a file that Keras wrote.

    >>> is_keras_file("a/b.keras"), is_keras_file("a/b.onnx")
    (True, False)
    """
    return is_model_file(model) and Path(model).suffix != ".onnx"


def read_model_file(path: Path) -> Imported:
    """Import a file: ONNX by its ending, which is all that tells it apart, else Keras."""
    return from_onnx(path) if path.suffix == ".onnx" else from_keras(path)


def load_model(
    model: str,
    settings: dict[str, Any],
    inputs: Any = None,
    seed: int = 0,
) -> LoadedModel:
    """Read the file, or make the named model and draw its variables from `seed`.

    `inputs` (arrays with a batch axis, or None) tells the named model what it will be given.
    Raises `FileError`, `ModelError` and what the importers raise.

    >>> x = np.zeros((2, 8, 8, 1), np.float32)
    >>> loaded = load_model("convnet", {"num_classes": 3}, x)
    >>> loaded.inputs
    (ShapeDtypeStruct(shape=(8, 8, 1), dtype=float32),)
    """
    examples = None if inputs is None else tuple(map(_example, _tuple(inputs)))
    if is_model_file(model):
        if settings:
            raise FastGPUError(
                "--set is for models in fastgpu.models", got=", ".join(settings), fix="leave it out"
            )
        imported = read_model_file(Path(model))
        return LoadedModel(imported.module, imported.variables, examples or _declared(imported))
    if model not in models.names():
        raise FileError(
            f"{model!r} is neither a file nor a model of fastgpu",
            expected=f"a Keras or ONNX file, or one of {', '.join(models.names())}",
            got=model,
        )
    module = models.create(model, **settings)
    if examples is None:
        raise FastGPUError(
            f"the input of {model!r} is not known",
            expected="the shape of one example, without the batch",
            fix="add --shape, such as --shape 224,224,3",
        )
    batch = [np.zeros((1, *example.shape), example.dtype) for example in examples]
    variables = module.init(jax.random.key(seed), *batch)
    return LoadedModel(module, dict(variables), examples)


def _declared(imported: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The inputs that the file declares; a size that it leaves open counts as 1."""
    return tuple(
        jax.ShapeDtypeStruct([size or 1 for size in spec.shape[1:]], spec.dtype)
        for spec in imported.module.input_specs
    )


def _example(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape[1:], array.dtype)


def _tuple(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
