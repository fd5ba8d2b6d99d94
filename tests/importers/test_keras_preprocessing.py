"""Preprocessing and augmentation layers against Keras on JAX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpu.errors import UnsupportedLayerError
from fastgpu.importers import from_keras
from fastgpu.importers.keras.layers.augmentation import INFERENCE_ONLY

IMAGE = (7, 9, 3)
_FACTOR = {"factor": 0.2}
OPTIONS: dict[str, dict[str, Any]] = {
    "RandomShear": {"x_factor": 0.2, "y_factor": 0.2},
    "RandomTranslation": {"height_factor": 0.2, "width_factor": 0.2},
    "RandomZoom": {"height_factor": 0.2},
    "RandomPosterization": {"factor": 4},
    **dict.fromkeys(
        (
            *("RandomColorDegeneration", "RandomContrast", "RandomErasing", "RandomHue"),
            *("RandomRotation", "RandomSaturation", "RandomSharpness"),
        ),
        _FACTOR,
    ),
}


def images(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 255, (2, *IMAGE)).astype("float32")


def assert_close(got: Any, want: Any) -> None:
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-3)


@pytest.mark.slow
def test_image_layers_equal_keras(keras: Any) -> None:
    layers, first = keras.layers, {"data_format": "channels_first"}
    x = keras.Input(IMAGE)
    outputs = [
        layers.Resizing(5, 6)(x),
        layers.Resizing(10, 12, interpolation="nearest")(x),
        layers.Resizing(5, 8, crop_to_aspect_ratio=True, antialias=True)(x),
        layers.Resizing(6, 4, pad_to_aspect_ratio=True, fill_value=3.0)(x),
        layers.Resizing(6, 4, interpolation="bicubic", **first)(x),
        layers.CenterCrop(4, 6)(x),
        layers.CenterCrop(10, 4)(x),
        layers.RandomCrop(4, 6)(x),
        layers.AutoContrast(value_range=(0, 255))(x),
        layers.Pipeline([layers.Resizing(5, 6), layers.Rescaling(1 / 255)])(x),
    ]
    model = keras.Model(x, outputs)
    imported = from_keras(model)
    got = imported.module.apply(imported.variables, images())
    assert_close(got, model(images(), training=False))


def test_resizing_keeps_integers(keras: Any) -> None:
    x = keras.Input(IMAGE, dtype="uint8")
    model = keras.Model(x, keras.layers.Resizing(5, 6, dtype="uint8")(x))
    batch = images().astype("uint8")
    imported = from_keras(model)
    assert_close(imported.module.apply(imported.variables, batch), model(batch))


@pytest.mark.slow
def test_encodings_equal_keras(keras: Any) -> None:
    layers = keras.layers
    tokens, numbers = keras.Input((4,), dtype="int32"), keras.Input((4,))
    single = keras.Input((1,), dtype="int32")
    outputs = [
        layers.CategoryEncoding(6)(tokens),
        layers.CategoryEncoding(6, output_mode="count")(tokens),
        layers.CategoryEncoding(6, output_mode="one_hot")(single),
        layers.Discretization([-0.5, 0.0, 0.5])(numbers),
        layers.Discretization([-0.5, 0.5], output_mode="multi_hot")(numbers),
    ]
    model = keras.Model([tokens, numbers, single], outputs)
    imported = from_keras(model)
    rng = np.random.default_rng(0)
    x = [rng.integers(0, 6, (3, 4)), rng.normal(size=(3, 4)), rng.integers(0, 6, (3, 1))]
    got = imported.module.apply(imported.variables, *x)
    want = model([np.asarray(a, s.dtype) for a, s in zip(x, model.inputs, strict=True)])
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize(
    "mode", ["int", *(pytest.param(m, marks=pytest.mark.slow) for m in ("one_hot", "multi_hot"))]
)
def test_integer_lookup_equals_keras(keras: Any, mode: str) -> None:
    layer = keras.layers.IntegerLookup(vocabulary=[12, 36, 7], mask_token=0, output_mode=mode)
    config = layer.get_config()
    x = keras.Input((4,), dtype="int32")
    model = keras.Model(x, keras.layers.Activation("linear", name="lookup", dtype="int32")(x))
    described = model.get_config()
    described["layers"][1] |= {"class_name": "IntegerLookup"}
    described["layers"][1]["config"] = {**config, "name": "lookup"}
    model.get_config = lambda: described
    tokens = np.array([[12, 7, 0, 99], [36, 36, 12, 1]])
    got = from_keras(model).module.apply({}, tokens)
    np.testing.assert_array_equal(got, np.asarray(layer(tokens)))


# Equalization hands its input through, which Keras's own graphs take for a cycle.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "RandomRotation" else pytest.mark.slow)
        for name in sorted(set(INFERENCE_ONLY) - {"Equalization"})
    ],
)
def test_augmentation_is_nothing_in_inference_and_refused_in_training(
    keras: Any, name: str
) -> None:
    layer = getattr(keras.layers, name)(**OPTIONS.get(name, {}))
    model = keras.Sequential([keras.Input(IMAGE), layer])
    module = from_keras(model).module
    np.testing.assert_array_equal(module.apply({}, images()), images())
    np.testing.assert_array_equal(model(images(), training=False), images())
    with pytest.raises(UnsupportedLayerError, match=f"{name}.*no equal in training"):
        module.apply({}, images(), train=True, rngs={"dropout": jax.random.key(0)})


def test_random_flips(keras: Any) -> None:
    model = keras.Sequential([keras.Input(IMAGE), keras.layers.RandomFlip("horizontal")])
    module = from_keras(model).module
    batch = np.repeat(images()[:1], 400, axis=0)
    np.testing.assert_array_equal(module.apply({}, batch), batch)
    out = module.apply({}, batch, train=True, rngs={"dropout": jax.random.key(0)})
    same = np.all(np.asarray(out) == batch, axis=(1, 2, 3))
    flipped = np.all(np.asarray(out) == batch[:, :, ::-1], axis=(1, 2, 3))
    assert np.all(same ^ flipped)
    assert np.mean(flipped) == pytest.approx(0.5, abs=0.1)


def test_random_brightness_and_crop(keras: Any) -> None:
    layers = keras.layers
    bright = keras.Sequential([keras.Input(IMAGE), layers.RandomBrightness(0.2)])
    batch = np.full((400, *IMAGE), 127.5, "float32")
    module = from_keras(bright).module
    out = module.apply({}, batch, train=True, rngs={"dropout": jax.random.key(0)})
    delta = np.asarray(out - batch)
    assert np.all(delta == delta[:, :1, :1, :1])
    assert 45 < np.abs(delta).max() <= 51
    assert float(jnp.std(delta)) == pytest.approx(102 / np.sqrt(12), rel=0.1)

    crop = from_keras(keras.Sequential([keras.Input(IMAGE), layers.RandomCrop(6, 4)])).module
    x = images()
    out = crop.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    parts = [x[:, top : top + 6, left : left + 4] for top in range(2) for left in range(6)]
    assert any(np.array_equal(out, part) for part in parts)
