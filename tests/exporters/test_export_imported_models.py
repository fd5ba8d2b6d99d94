"""Keras models, imported and exported: TensorFlow alone gives the imported module's numbers."""

import jax
import numpy as np
import pytest

from fastgpu.exporters import Signature, export_saved_model
from fastgpu.importers import from_keras

# Keras 3.15 under NumPy 2: its variables are old-style array-likes.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
_RNG = np.random.default_rng(0)


def _convolutional(keras):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((12, 12, 3), name="image"),
            layers.Rescaling(1 / 3, offset=0.5),
            layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(max_value=6),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.MaxPooling2D(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(7, activation="softmax"),
        ]
    )


def _exact_gelu(keras):
    layers = keras.layers
    image = keras.Input((8, 8, 4), name="image")
    x = layers.DepthwiseConv2D(5, padding="same")(image)
    x = layers.LayerNormalization(epsilon=1e-6)(x)
    x = layers.Activation("gelu")(layers.Dense(16)(x))
    x = layers.Add()([image, layers.Dense(4)(x)])
    return keras.Model(image, layers.Dense(6)(layers.GlobalAveragePooling2D()(x)))


def _two_inputs(keras):
    layers = keras.layers
    image, extra = keras.Input((None, None, 2), name="image"), keras.Input((5,), name="extra")
    branch = keras.Sequential([layers.Conv2D(6, 3, activation="relu"), layers.BatchNormalization()])
    pooled = layers.GlobalAveragePooling2D()(branch(image))
    joined = layers.Concatenate()([pooled, layers.Dense(4, activation="tanh")(extra)])
    logits = layers.Dense(9, activation="sigmoid")(joined)
    return keras.Model([image, extra], {"tags": logits, "features": joined})


def _largest(module):
    """The three largest outputs and where they are, verified on random and on given inputs."""

    def largest(variables, image):
        return jax.lax.top_k(module.apply(variables, image), 3)

    sample = _RNG.normal(size=(2, 8, 8, 4))
    return {"largest": largest, "sampled": Signature(largest, sample=sample)}


_MODELS = {"convolutional": _convolutional, "exact_gelu": _exact_gelu, "two_inputs": _two_inputs}
_SHAPES = {
    "convolutional": {"image": (12, 12, 3)},
    "exact_gelu": {"image": (8, 8, 4)},
    "two_inputs": {"image": (10, 7, 2), "extra": (5,)},
}
_BATCHES = (1, 3, 64)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Each model saved by Keras, imported from the file, exported: folder and imported model."""
    import keras

    folder = tmp_path_factory.mktemp("models")
    found = {}
    for name, build in _MODELS.items():
        keras.utils.set_random_seed(0)
        model = build(keras)
        for variable in model.weights:
            variable.assign(_RNG.uniform(0.1, 0.9, variable.shape))
        model.save(folder / f"{name}.keras")
        imported = from_keras(folder / f"{name}.keras")
        report = export_saved_model(
            imported.module,
            imported.variables,
            folder / name,
            signatures=_largest(imported.module) if name == "exact_gelu" else None,
        )
        found[name] = (imported, report)
    return found


@pytest.fixture(scope="module")
def answers(exports, run_in_tensorflow):
    questions, calls = [], {}
    for name, shapes in _SHAPES.items():
        calls[name] = [
            {key: _RNG.normal(size=(b, *s)).astype(np.float32) for key, s in shapes.items()}
            for b in _BATCHES
        ]
        folder = str(exports[name][1].path)
        questions.append((folder, [("serving_default", inputs) for inputs in calls[name]]))
    got = dict(zip(_SHAPES, run_in_tensorflow(questions), strict=True))
    return {name: list(zip(calls[name], got[name][0], strict=True)) for name in _SHAPES}


@pytest.mark.parametrize("name", sorted(_MODELS))
def test_tensorflow_alone_gives_the_imported_models_numbers(exports, answers, name):
    imported, report = exports[name]
    assert max(c.relative_error for c in report.signatures[0].checks) < 1e-5
    for inputs, outputs in answers[name]:
        live = imported.module.apply(imported.variables, *inputs.values())
        live = live if isinstance(live, dict) else {"output_0": live}
        assert outputs.keys() == live.keys()
        for key, value in live.items():
            np.testing.assert_allclose(outputs[key][1], value, rtol=1e-5, atol=1e-5)


def test_an_imported_model_knows_its_inputs(exports):
    _, report = exports["two_inputs"]
    assert report.signatures[0].inputs == {
        "image": "float32[batch, d0_1, d0_2, 2]",
        "extra": "float32[batch, 5]",
    }
    assert report.trainable_variables < report.variables


def test_a_second_signature_takes_the_inputs_of_the_first(exports):
    _, report = exports["exact_gelu"]
    default, largest, sampled = report.signatures
    assert largest.inputs == sampled.inputs == default.inputs
    assert largest.outputs == {"output_0": "float32[batch, 3]", "output_1": "int32[batch, 3]"}
