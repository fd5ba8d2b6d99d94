"""Small Keras models with random weights and statistics; Keras runs on JAX in this process."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

# Run in a process of its own, with tf-keras.
collect_ignore = ["write_keras_2.py"]


@pytest.fixture(scope="session")
def keras() -> Any:
    import keras

    assert keras.backend.backend() == "jax"
    return keras


@pytest.fixture(autouse=True)
def no_initial_draws(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras compiles a sampler for every shape; the weights are replaced afterwards anyway."""
    if "keras" in request.fixturenames:
        from keras.src.initializers import random_initializers as drawn

        for name in ("VarianceScaling", "RandomNormal", "RandomUniform", "TruncatedNormal"):
            zeros = lambda self, shape, dtype=None: np.zeros(shape, dtype or "float32")  # noqa: E731
            monkeypatch.setattr(getattr(drawn, name), "__call__", zeros)


@pytest.fixture(scope="session")
def run() -> Callable[..., Any]:
    """Call a function as one compiled program, compiled quickly rather than well."""

    def call(function: Callable[..., Any], *args: Any) -> Any:
        options = {"xla_backend_optimization_level": 0}
        return jax.jit(function, compiler_options=options)(*args)

    return call


@pytest.fixture(scope="session")
def randomize() -> Callable[..., Any]:
    """Give a model seeded weights of unit scale and statistics that are not 0 and 1."""

    def apply(model: Any, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)
        for weight in model.weights:
            kind, shape = weight.path.rsplit("/", 1)[-1], tuple(weight.shape)
            if kind in ("gamma", "moving_variance", "variance"):
                weight.assign(rng.uniform(0.5, 1.5, shape))
            elif kind == "count":
                weight.assign(7)
            else:
                weight.assign(rng.normal(0, 0.5, shape))
        for layer in model.layers:
            if hasattr(layer, "finalize_state"):
                layer.finalize_state()  # Normalization computes with copies of its weights.
        return model

    return apply


@pytest.fixture
def small_model(keras: Any, randomize: Callable[..., Any]) -> Any:
    """A nested model with batch norm, a layer used twice, two inputs, a dict of outputs."""
    layers = keras.layers
    image = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(4, 3, name="conv", activation="relu")(image)
    pooled = layers.GlobalAveragePooling2D()(layers.BatchNormalization(name="norm")(x))
    encoder = keras.Model(image, pooled, name="encoder")

    left, right = keras.Input((8, 8, 3), name="left"), keras.Input((8, 8, 3), name="right")
    shared = layers.Dense(5, name="shared")
    a, b = shared(encoder(left)), shared(encoder(right))
    head = keras.Sequential([keras.Input((5,)), layers.Dense(2, name="out")], name="head")
    outputs = {"score": head(layers.Subtract()([a, b])), "parts": [a * 2.0, b]}
    return randomize(keras.Model([left, right], outputs, name="twins"))


@pytest.fixture(scope="session")
def onnx_models() -> Any:
    """The module of small ONNX models beside this file."""
    pytest.importorskip("onnxruntime")
    spec = importlib.util.spec_from_file_location(
        "onnx_models", Path(__file__).with_name("onnx_models.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
