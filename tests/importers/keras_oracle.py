"""Build applications of Keras with seeded random weights, save them, and keep Keras's own outputs.

    python keras_oracle.py FOLDER NAME:SIZE[:ALPHA] ...

Runs Keras on TensorFlow: eager and without compilation it is the fastest, and it shares no
numerics with JAX. Writes FOLDER/NAME.keras and FOLDER/NAME.npz (x, y, parameters).
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np


def import_keras() -> Any:
    """Keras on TensorFlow, drawing no weights: all are replaced, and it takes most of the time."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import keras
    from keras.src.initializers import random_initializers as drawn

    for name in ("VarianceScaling", "RandomNormal", "RandomUniform", "TruncatedNormal"):
        zeros = lambda self, shape, dtype=None: keras.ops.zeros(shape, dtype)  # noqa: E731
        getattr(drawn, name).__call__ = zeros
    return keras


def randomize(model: Any, seed: int) -> None:
    """Random weights that keep activations in range."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        kind, shape = weight.path.rsplit("/", 1)[-1], tuple(weight.shape)
        if kind in ("moving_variance", "variance"):
            value = rng.uniform(0.5, 1.5, shape)
        elif kind == "gamma":
            value = rng.uniform(0.2, 0.6, shape)  # Above one, residuals amplify rounding errors.
        elif kind in ("beta", "bias", "moving_mean", "mean"):
            value = rng.normal(0, 0.2, shape)
        elif kind == "count":
            value = np.asarray(7)
        elif kind == "variable":  # ConvNeXt's LayerScale
            value = rng.uniform(0.1, 0.3, shape)
        else:
            fan_in = np.prod(shape[:-1]) if "depthwise" not in weight.path else np.prod(shape[:2])
            value = rng.standard_normal(shape, dtype="float32") * np.sqrt(2 / fan_in)
        if len(shape) > 1 and shape[-1] == 1000:
            value = value / 10  # The classifier: a softmax that is not one-hot.
        weight.assign(value.astype(weight.dtype))
    for layer in model.layers:
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()  # Normalization computes with copies of its weights.


def settle(model: Any, x: np.ndarray) -> None:
    """Set the batch statistics to those of `x`, so that a deep network neither blows up nor dies.

    Otherwise the softmax at its end is a one-hot vector, and the outputs say little.
    """
    norms = [layer for layer in model.layers if hasattr(layer, "moving_variance")]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 0.0
    model(x, training=True)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum


def main(folder: Path, names: list[str]) -> None:
    keras = import_keras()
    for seed, wanted in enumerate(names):
        name, size, *alpha = wanted.split(":")
        options = {"alpha": float(alpha[0])} if alpha else {}
        shape = (int(size), int(size), 3)
        model = getattr(keras.applications, name)(weights=None, input_shape=shape, **options)
        randomize(model, seed)
        x = np.random.default_rng(seed).uniform(0, 255, (4, *shape)).astype("float32")
        scales = {"Rescaling", "Normalization"} & {type(layer).__name__ for layer in model.layers}
        if not scales:
            x = x / 127.5 - 1
        settle(model, x)
        model.save(folder / f"{name}.keras")
        y = np.asarray(model(x))
        np.savez(folder / f"{name}.npz", x=x, y=y, parameters=model.count_params())
        keras.backend.clear_session()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
