"""Every layer of the table, one by one, against Keras; float32 within 1e-5 of the largest value."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fastgpu.errors import ConfigurationError, UnsupportedLayerError
from fastgpu.importers import from_keras, register_keras_layer
from fastgpu.importers.keras.layers import REFUSED, TABLE, Layer
from fastgpu.importers.keras.layers.activations import ACTIVATIONS
from fastgpu.importers.keras.layers.augmentation import INFERENCE_ONLY
from fastgpu.importers.keras.layers.initializers import ONES
from fastgpu.importers.keras.layers.layer import LayerState

IMAGE, SERIES, VOLUME, VECTOR = (7, 8, 6), (9, 6), (5, 6, 7, 4), (6,)
FIRST = {"data_format": "channels_first"}

# (class, options, input shape) for layers of one input.
CASES: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("Dense", {"units": 5, "activation": "tanh"}, VECTOR),
    ("Dense", {"units": 5, "use_bias": False}, SERIES),
    ("Identity", {}, VECTOR),
    ("Conv1D", {"filters": 4, "kernel_size": 3}, SERIES),
    ("Conv1D", {"filters": 4, "kernel_size": 3, "padding": "causal", "dilation_rate": 2}, SERIES),
    ("Conv1D", {"filters": 4, "kernel_size": 3, **FIRST}, SERIES),
    ("Conv2D", {"filters": 4, "kernel_size": 3, "activation": "relu"}, IMAGE),
    ("Conv2D", {"filters": 4, "kernel_size": (2, 3), "strides": 2, "padding": "same"}, IMAGE),
    ("Conv2D", {"filters": 4, "kernel_size": 3, "groups": 2, "use_bias": False}, IMAGE),
    ("Conv2D", {"filters": 4, "kernel_size": 3, "dilation_rate": (1, 2)}, IMAGE),
    ("Conv2D", {"filters": 4, "kernel_size": 3, "padding": "same", **FIRST}, IMAGE),
    ("Conv3D", {"filters": 3, "kernel_size": 2, "padding": "same", "strides": (1, 2, 1)}, VOLUME),
    ("DepthwiseConv1D", {"kernel_size": 3, "padding": "same"}, SERIES),
    ("DepthwiseConv2D", {"kernel_size": 3, "strides": 2, "padding": "same"}, IMAGE),
    ("DepthwiseConv2D", {"kernel_size": 3, "depth_multiplier": 2, "use_bias": False}, IMAGE),
    ("DepthwiseConv2D", {"kernel_size": 3, "depth_multiplier": 2, **FIRST}, IMAGE),
    ("SeparableConv1D", {"filters": 4, "kernel_size": 3, "padding": "same"}, SERIES),
    ("SeparableConv2D", {"filters": 4, "kernel_size": 3, "depth_multiplier": 2}, IMAGE),
    ("SeparableConv2D", {"filters": 4, "kernel_size": 3, "strides": 2, **FIRST}, IMAGE),
    ("BatchNormalization", {}, IMAGE),
    ("BatchNormalization", {"axis": 1, "epsilon": 0.1, "scale": False}, IMAGE),
    ("BatchNormalization", {"center": False}, VECTOR),
    ("LayerNormalization", {}, SERIES),
    ("LayerNormalization", {"axis": [1, 2], "center": False}, IMAGE),
    ("LayerNormalization", {"axis": 1, "scale": False}, IMAGE),
    ("LayerNormalization", {"rms_scaling": True}, IMAGE),
    ("Normalization", {}, IMAGE),
    ("Normalization", {"axis": None, "mean": 2.0, "variance": 4.0}, IMAGE),
    (
        "Normalization",
        {"axis": (1, -1), "mean": np.ones((7, 6)), "variance": np.full((7, 6), 3.0)},
        IMAGE,
    ),
    ("Normalization", {"mean": [0.0] * 6, "variance": [2.0] * 6, "invert": True}, IMAGE),
    ("Rescaling", {"scale": 1 / 255, "offset": -1}, IMAGE),
    ("Rescaling", {"scale": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "offset": 0.5}, IMAGE),
    ("Activation", {"activation": "softmax"}, SERIES),
    ("ELU", {"alpha": 0.7}, VECTOR),
    ("LeakyReLU", {"negative_slope": 0.1}, VECTOR),
    ("PReLU", {}, IMAGE),
    ("PReLU", {"shared_axes": [1, 2]}, IMAGE),
    ("ReLU", {}, VECTOR),
    ("ReLU", {"max_value": 6.0}, VECTOR),
    ("ReLU", {"max_value": 0.5, "negative_slope": 0.2}, VECTOR),
    ("ReLU", {"negative_slope": 0.2}, VECTOR),
    ("ReLU", {"max_value": 0.8, "negative_slope": 0.2, "threshold": 0.3}, VECTOR),
    ("Softmax", {}, SERIES),
    ("Softmax", {"axis": [1, 2]}, SERIES),
    ("AveragePooling1D", {"pool_size": 2}, SERIES),
    ("AveragePooling2D", {"pool_size": 3, "strides": 2, "padding": "same"}, IMAGE),
    ("AveragePooling2D", {"pool_size": (1, 2), "padding": "same", **FIRST}, IMAGE),
    ("AveragePooling3D", {"pool_size": 2}, VOLUME),
    ("MaxPooling1D", {"strides": 1}, SERIES),
    ("MaxPooling2D", {"pool_size": 3, "strides": 2, "padding": "same"}, IMAGE),
    ("MaxPooling2D", FIRST, IMAGE),
    ("MaxPooling3D", {"padding": "same"}, VOLUME),
    ("GlobalAveragePooling1D", {}, SERIES),
    ("GlobalAveragePooling2D", {"keepdims": True}, IMAGE),
    ("GlobalAveragePooling2D", FIRST, IMAGE),
    ("GlobalAveragePooling3D", {}, VOLUME),
    ("GlobalMaxPooling1D", {"keepdims": True}, SERIES),
    ("GlobalMaxPooling2D", FIRST, IMAGE),
    ("GlobalMaxPooling3D", {}, VOLUME),
    ("Cropping1D", {"cropping": (1, 2)}, SERIES),
    ("Cropping2D", {"cropping": ((1, 0), (2, 1))}, IMAGE),
    ("Cropping2D", {"cropping": (0, 2), **FIRST}, IMAGE),
    ("Cropping3D", {"cropping": 1}, VOLUME),
    ("Flatten", {}, IMAGE),
    ("Flatten", FIRST, IMAGE),
    ("Permute", {"dims": (2, 3, 1)}, IMAGE),
    ("RepeatVector", {"n": 3}, VECTOR),
    ("Reshape", {"target_shape": (-1, 3)}, IMAGE),
    ("UpSampling1D", {"size": 2}, SERIES),
    ("UpSampling2D", {"size": (2, 3)}, IMAGE),
    ("UpSampling2D", {"interpolation": "bilinear", **FIRST}, IMAGE),
    ("UpSampling2D", {"interpolation": "bicubic"}, IMAGE),
    ("UpSampling3D", {}, VOLUME),
    ("ZeroPadding1D", {"padding": (2, 1)}, SERIES),
    ("ZeroPadding2D", {"padding": ((1, 2), (0, 3))}, IMAGE),
    ("ZeroPadding2D", {"padding": 1, **FIRST}, IMAGE),
    ("ZeroPadding3D", {"padding": (1, 0, 2)}, VOLUME),
    ("AdaptiveAveragePooling1D", {"output_size": 4}, SERIES),
    ("AdaptiveAveragePooling2D", {"output_size": (3, 5)}, IMAGE),
    ("AdaptiveAveragePooling3D", {"output_size": 2, **FIRST}, VOLUME),
    ("AdaptiveMaxPooling1D", {"output_size": 4}, SERIES),
    ("AdaptiveMaxPooling2D", {"output_size": (3, 5), **FIRST}, IMAGE),
    ("AdaptiveMaxPooling3D", {"output_size": 3}, VOLUME),
    ("Conv1DTranspose", {"filters": 4, "kernel_size": 3, "strides": 2}, SERIES),
    ("Conv1DTranspose", {"filters": 4, "kernel_size": 3, "dilation_rate": 2}, SERIES),
    ("Conv2DTranspose", {"filters": 4, "kernel_size": 3, "padding": "same", "strides": 2}, IMAGE),
    ("Conv2DTranspose", {"filters": 4, "kernel_size": (2, 3), "use_bias": False, **FIRST}, IMAGE),
    (
        "Conv2DTranspose",
        {"filters": 2, "kernel_size": 4, "strides": 3, "padding": "same", "output_padding": 2},
        IMAGE,
    ),
    (
        "Conv2DTranspose",
        {"filters": 2, "kernel_size": 2, "strides": (2, 3), "output_padding": (1, 0)},
        IMAGE,
    ),
    ("Conv3DTranspose", {"filters": 3, "kernel_size": 2, "strides": (1, 2, 1)}, VOLUME),
    ("EinsumDense", {"equation": "abc,cd->abd", "output_shape": (None, 5)}, SERIES),
    (
        "EinsumDense",
        {"equation": "...x,xy->...y", "output_shape": 5, "bias_axes": "y", "activation": "relu"},
        IMAGE,
    ),
    (
        "EinsumDense",
        {"equation": "abc,cde->abde", "output_shape": (None, 2, 3), "bias_axes": "de"},
        SERIES,
    ),
    ("EinsumDense", {"equation": "ab...,bc->ac...", "output_shape": 3, "bias_axes": "c"}, SERIES),
    ("GroupNormalization", {"groups": 3}, IMAGE),
    ("GroupNormalization", {"groups": -1, "axis": 1, "center": False}, IMAGE),
    ("RMSNormalization", {}, SERIES),
    ("RMSNormalization", {"axis": [1, 2]}, SERIES),
    ("UnitNormalization", {}, SERIES),
    ("STFTSpectrogram", {"frame_length": 8, "mode": "magnitude"}, (40, 2)),
    ("STFTSpectrogram", {"frame_length": 8, "mode": "psd", "expand_dims": True}, (40, 2)),
    ("STFTSpectrogram", {"frame_length": 8, "mode": "stft", **FIRST}, (2, 40)),
    ("MelSpectrogram", {"fft_length": 32, "sequence_stride": 8, "num_mel_bins": 6}, (100,)),
    (
        "MelSpectrogram",
        {"fft_length": 32, "sequence_length": 20, "num_mel_bins": 6, "power_to_db": False},
        (100,),
    ),
    ("UnitNormalization", {"axis": [1, 2]}, IMAGE),
    ("ActivityRegularization", {"l1": 0.1}, VECTOR),
    ("AlphaDropout", {"rate": 0.5}, VECTOR),
    ("Dropout", {"rate": 0.5}, VECTOR),
    ("GaussianDropout", {"rate": 0.5}, VECTOR),
    ("GaussianNoise", {"stddev": 0.5}, VECTOR),
    ("SpatialDropout1D", {"rate": 0.5}, SERIES),
    ("SpatialDropout2D", {"rate": 0.5, **FIRST}, IMAGE),
    ("SpatialDropout3D", {"rate": 0.5}, VOLUME),
]
# Classes with tests of their own.
ELSEWHERE = {
    *("Embedding", "ReversibleEmbedding", "LayerScale", "CustomScaleLayer", "Wrapper", "Masking"),
    *("Dot", "Attention", "AdditiveAttention", "MultiHeadAttention", "SpectralNormalization"),
    *("GroupQueryAttention", "GroupedQueryAttention", "ThresholdedReLU", "LocallyConnected1D"),
    *("LocallyConnected2D", "CuDNNLSTM", "CuDNNGRU", "LSTM", "GRU", "SimpleRNN", "LSTMCell"),
    *("GRUCell", "SimpleRNNCell", "StackedRNNCells", "RNN", "Bidirectional", "TimeDistributed"),
    *("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D", "AutoContrast", "CategoryEncoding", "CenterCrop"),
    *("Discretization", "IntegerLookup", "Pipeline", "Resizing", "RandomBrightness"),
    *("RandomCrop", "RandomFlip", *INFERENCE_ONLY),
}
MERGES = ["Add", "Average", "Concatenate", "Maximum", "Minimum", "Multiply", "Subtract"]


def close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Equal structure, shapes and dtypes; values within `tolerance` of the largest."""
    jax.tree.map(lambda g, w: _close(np.asarray(g), np.asarray(w), tolerance), got, want)


def _close(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    got, want = got.astype("float64"), want.astype("float64")
    assert np.abs(got - want).max() <= tolerance * max(1.0, np.abs(want).max())


def assert_equal(
    run: Any, imported: Any, model: Any, *inputs: Any, tolerance: float = 1e-5
) -> None:
    got = run(imported.module.apply, imported.variables, *inputs)
    want = run(lambda *xs: model(list(xs) if len(xs) > 1 else xs[0]), *inputs)
    close(got, want, tolerance)


def batch(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (2, *shape)).astype("float32")


@pytest.mark.filterwarnings("ignore:You passed `rms_scaling=True`")
@pytest.mark.parametrize(("name", "options", "shape"), CASES)
def test_layer_equals_keras(
    keras: Any, run: Any, randomize: Any, name: str, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    model = keras.Sequential([keras.Input(shape), getattr(keras.layers, name)(**options)])
    imported = from_keras(randomize(model))
    x = batch(shape)
    assert_equal(run, imported, model, x)
    assert imported.report.parameter_count == model.count_params()


def test_dot_equals_keras(keras: Any, run: Any) -> None:
    dot = keras.layers.Dot
    a, b, c = keras.Input((4, 3)), keras.Input((5, 3)), keras.Input((3,))
    outputs = [
        dot(2)([a, b]),
        dot((2, 1), normalize=True)([a, c]),
        dot(-1)([c, b]),
        dot(1, normalize=True)([c, c]),
    ]
    model = keras.Model([a, b, c], outputs)
    x = [batch((4, 3)), batch((5, 3), seed=1), batch((3,), seed=2)]
    assert_equal(run, from_keras(model), model, *x)


def test_merges_equal_keras(keras: Any, run: Any) -> None:
    inputs = [keras.Input((4, 3)), keras.Input((4, 3))]
    model = keras.Model(inputs, {name: getattr(keras.layers, name)()(inputs) for name in MERGES})
    imported = from_keras(model)
    assert_equal(run, imported, model, batch((4, 3)), batch((4, 3), seed=1))


def test_merge_of_different_ranks_equals_keras(keras: Any, run: Any) -> None:
    inputs = [keras.Input((4, 3)), keras.Input((3,))]
    model = keras.Model(inputs, keras.layers.Add()(inputs))
    x = [batch((4, 3)), batch((3,), seed=1)]
    imported = from_keras(model)
    assert_equal(run, imported, model, *x)


def test_embedding_equals_keras(keras: Any, run: Any, randomize: Any) -> None:
    layers = [keras.Input((5,), dtype="int32"), keras.layers.Embedding(11, 4)]
    model = randomize(keras.Sequential(layers))
    x = np.random.default_rng(0).integers(0, 11, (2, 5))
    imported = from_keras(model)
    assert_equal(run, imported, model, x)


def test_reversible_embedding_equals_keras(keras: Any, run: Any, randomize: Any) -> None:
    tokens, outputs = keras.Input((5,), dtype="int32"), []
    for options in ({}, {"tie_weights": False, "logit_soft_cap": 0.5}):
        layer = keras.layers.ReversibleEmbedding(11, 4, **options)
        outputs.append(layer(layer(tokens), reverse=True))
    model = randomize(keras.Model(tokens, outputs))
    assert_equal(run, from_keras(model), model, np.array([[1, 2, 3, 4, 10]]))


@pytest.mark.parametrize(
    "name", ["Dense", *(pytest.param(n, marks=pytest.mark.slow) for n in ("Conv1D", "Embedding"))]
)
def test_spectral_normalization_equals_keras(
    keras: Any, randomize: Any, tmp_path: Path, name: str
) -> None:
    """In training the power iteration moves; Keras on JAX leaves the kernel where it is."""
    options = {"Dense": (3,), "Conv1D": (3, 2), "Embedding": (7, 3)}[name]
    x = keras.Input((5,), dtype="int32") if name == "Embedding" else keras.Input((5, 4))
    layer = keras.layers.SpectralNormalization(
        getattr(keras.layers, name)(*options), power_iterations=2, name="norm"
    )
    model = randomize(keras.Model(x, layer(x)))
    model.save(tmp_path / "m.keras")
    imported = from_keras(tmp_path / "m.keras")
    data = np.array([[1, 2, 3, 4, 5]]) if name == "Embedding" else batch((5, 4))
    close(imported.module.apply(imported.variables, data), np.asarray(model(data)))
    state = [v.value for v in model.non_trainable_variables]
    trainable = [v.value for v in model.trainable_variables]
    want, (moved,) = model.stateless_call(trainable, state, data, training=True)
    got, stats = imported.module.apply(
        imported.variables, data, train=True, mutable=["batch_stats"]
    )
    close(got, np.asarray(want))
    close(stats["batch_stats"]["norm"]["vector_u"], np.asarray(moved))


def test_layers_of_applications_equal_keras(keras: Any, run: Any, randomize: Any) -> None:
    from keras.src.applications.convnext import LayerScale
    from keras.src.applications.inception_resnet_v2 import CustomScaleLayer

    x = keras.Input((4,))
    scaled = LayerScale(0.5, 4)(x)
    model = randomize(keras.Model(x, CustomScaleLayer(0.17)([x, scaled])))
    imported = from_keras(model)
    assert_equal(run, imported, model, batch((4,)))


def test_every_class_of_keras_is_in_the_table_or_refused_with_a_reason(keras: Any) -> None:
    exported = {
        value.__name__
        for value in vars(keras.layers).values()
        if isinstance(value, type) and issubclass(value, keras.layers.Layer)
    }
    assert exported - {"InputLayer", "CLAHE"} <= set(TABLE) | set(REFUSED)
    assert not set(TABLE) & set(REFUSED)


def test_every_class_of_the_table_has_a_case() -> None:
    tested = {name for name, _, _ in CASES} | set(MERGES)
    assert not tested & ELSEWHERE
    assert tested | ELSEWHERE == set(TABLE)


def test_activations_equal_keras(keras: Any, run: Any) -> None:
    names = sorted(set(ACTIVATIONS) - {"hard_sigmoid (Keras 2)"})
    x = np.linspace(-4, 4, 32, dtype="float32").reshape(2, 16)
    got = run(lambda x: {name: ACTIVATIONS[name](x) for name in names}, x)
    close(got, run(lambda x: {name: keras.activations.get(name)(x) for name in names}, x))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_dtype_policy_is_kept(keras: Any, run: Any, randomize: Any, policy: str) -> None:
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, dtype=policy),
            layers.BatchNormalization(dtype=policy),
            layers.ReLU(dtype=policy),
            layers.GlobalAveragePooling2D(dtype=policy),
            layers.LayerNormalization(dtype=policy),
            layers.Dense(3, dtype=policy),
            layers.Activation("softmax", dtype="float32"),
        ]
    )
    imported = from_keras(randomize(model))
    x = batch((8, 8, 3))
    # bfloat16 keeps 8 bits: the two sides may round the same sum to neighbours.
    assert_equal(run, imported, model, x, tolerance=2**-7)
    stored = {str(leaf.dtype) for leaf in jax.tree.leaves(imported.variables)}
    assert stored == ({"bfloat16"} if policy == "bfloat16" else {"float32"})


def test_integer_images_are_cast_as_in_keras(keras: Any, run: Any, randomize: Any) -> None:
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((6, 6, 3)), layers.Rescaling(1 / 255), layers.Conv2D(2, 3), layers.Flatten()]
    )
    imported = from_keras(randomize(model))
    x = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3)).astype("uint8")
    assert_equal(run, imported, model, x)


def refusal(model: Any, **options: Any) -> str:
    with pytest.raises(UnsupportedLayerError) as caught:
        from_keras(model, **options)
    return str(caught.value)


def test_all_layers_without_a_rule_are_named_at_once(keras: Any) -> None:
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((5, 4)),
            layers.Hashing(4, name="bins"),
            layers.Lambda(lambda x: x * 2, name="twice"),
            layers.Dense(2, name="fine"),
            layers.BatchNormalization(renorm=True, name="renormed"),
        ]
    )
    message = refusal(model)
    assert "3 of its layers cannot be imported" in message
    assert "'bins' (Hashing: hashes strings, also those of numbers)" in message
    assert "'twice' (Lambda: holds Python bytecode, which is never run)" in message
    assert "'renormed' (BatchNormalization: option renorm=True)" in message
    assert "fine" not in message
    assert "custom_objects={" in message


def test_an_unknown_option_is_refused_by_name(keras: Any) -> None:
    model = keras.Sequential([keras.Input((5,), dtype="int32"), keras.layers.Embedding(9, 2)])
    config = model.get_config()
    config["layers"][1]["config"]["sparsity"] = 0.5
    with pytest.raises(UnsupportedLayerError, match=r"sparsity=0\.5"):
        from_keras(_with_config(model, config))


def _with_config(model: Any, config: dict[str, Any]) -> Any:
    class Live:
        name, layers, weights = model.name, model.layers, model.weights

        def get_config(self) -> dict[str, Any]:
            return config

    Live.__name__ = type(model).__name__
    return Live()


def test_quantized_policies_are_refused_by_name(keras: Any) -> None:
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.layers[0].quantize("int8")
    assert "dtype policy 'QuantizedDTypePolicy'" in refusal(model)


def test_a_custom_class_with_a_builtin_name_is_not_mistaken_for_it(keras: Any) -> None:
    class Dense(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return x + 1

    model = keras.Sequential([keras.Input((3,)), Dense(name="odd")])
    assert "'odd' (Dense: a custom class of" in refusal(model)


def test_lambda_is_replaced_by_a_function(keras: Any, run: Any, randomize: Any) -> None:
    layers = [keras.layers.Lambda(lambda x: x * 2, name="twice"), keras.layers.Dense(2)]
    model = randomize(keras.Sequential([keras.Input((3,)), *layers]))
    imported = from_keras(model, custom_objects={"twice": lambda x: x * 2})
    assert_equal(run, imported, model, batch((3,)))


def test_a_custom_layer_with_weights_gets_a_rule(keras: Any, run: Any, randomize: Any) -> None:
    class Scale(keras.layers.Layer):
        def __init__(self, power: int, **options: Any) -> None:
            super().__init__(**options)
            self.power = power

        def build(self, shape: Any) -> None:
            self.factor = self.add_weight(name="factor", shape=(shape[-1],))

        def call(self, x: Any) -> Any:
            return x * self.factor**self.power

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "power": self.power}

    @dataclass(frozen=True, kw_only=True)
    class ScaleRule(Layer):
        power: int

        def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
            return x * state.weight("factor", x.shape[-1:], ONES) ** self.power

    model = randomize(keras.Sequential([keras.Input((3,)), Scale(3, name="scale")]))
    imported = from_keras(model, custom_objects={"Scale": ScaleRule})
    assert imported.variables["params"]["scale"]["factor"].shape == (3,)
    assert_equal(run, imported, model, batch((3,)))


def test_a_registered_rule_holds_for_every_import(keras: Any, run: Any) -> None:
    @keras.saving.register_keras_serializable("tests")
    class Shift(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return x + 3

    @dataclass(frozen=True, kw_only=True)
    class ShiftRule(Layer):
        def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
            return x + 3

    model = keras.Sequential([keras.Input((3,)), Shift()])
    assert "a custom class" in refusal(model)
    assert register_keras_layer("tests>Shift")(ShiftRule) is ShiftRule
    assert_equal(run, from_keras(model), model, batch((3,)))
    with pytest.raises(ConfigurationError, match="registered already"):
        register_keras_layer("tests>Shift")(type("Other", (ShiftRule,), {}))
    with pytest.raises(ConfigurationError, match="built-in class"):
        register_keras_layer("Dense")(ShiftRule)
    with pytest.raises(ConfigurationError, match="no rule"):
        register_keras_layer("Mine")(lambda x: x)


def test_regularizers_are_reported_as_ignored(keras: Any) -> None:
    layer = keras.layers.Dense(2, kernel_regularizer="l2", name="d")
    report = from_keras(keras.Sequential([keras.Input((3,)), layer])).report
    (entry,) = report.ignored()
    assert entry.name == "d/kernel_regularizer"
    assert "add it to your loss" in entry.detail
