"""Write models of every kind with tf-keras, the last Keras 2, and keep its own outputs.

    python write_keras_2.py FOLDER [NAME ...]

Runs where tf-keras is installed. Writes FOLDER/NAME.h5, NAME.keras and NAME.npz (x0, ..., y0, ...).
"""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np
import tensorflow as tf  # pyright: ignore
import tf_keras as keras  # pyright: ignore

L = keras.layers
SERIES, IMAGE, VOLUME, VECTOR = (6, 4), (7, 8, 3), (4, 5, 6, 2), (5,)
Builder = Callable[[], Any]


def chain(*layers: Any, shape: tuple[int, ...], dtype: str | None = None) -> Any:
    return keras.Sequential([keras.Input(shape, dtype=dtype), *layers])


def graph(build: Callable[..., Any], *shapes: tuple[int, ...]) -> Any:
    inputs = [keras.Input(shape) for shape in shapes]
    return keras.Model(inputs if len(inputs) > 1 else inputs[0], build(*inputs))


def shared() -> Any:
    dense = L.Dense(3)
    return graph(lambda a, b: L.Subtract()([dense(a), dense(b)]), VECTOR, VECTOR)


def adapted() -> Any:
    normalization = L.Normalization()
    normalization.adapt(np.random.default_rng(0).normal(2, 3, (64, 5)).astype("float32"))
    return chain(normalization, L.Dense(2), shape=VECTOR)


def plain() -> dict[str, Builder]:
    """Models whose layers are called one after the other, and graphs of them."""
    return {
        "dense": lambda: chain(L.Dense(3, activation="relu"), L.Dense(2), shape=VECTOR),
        "functional": lambda: graph(lambda x: L.Add()([L.Dense(5)(x), x]), VECTOR),
        "two_in": lambda: graph(lambda a, b: L.Concatenate()([L.Dense(3)(a), b]), VECTOR, (2,)),
        "shared": shared,
        "nested": lambda: graph(
            lambda x: chain(L.Dense(4), L.BatchNormalization(), shape=VECTOR)(x), VECTOR
        ),
        "nested_graph": lambda: graph(
            lambda x: L.Dense(2)(graph(lambda y: L.Dense(4)(y), VECTOR)(x)), VECTOR
        ),
        "mixed": lambda: chain(L.Dense(3, dtype="mixed_float16"), shape=VECTOR),
        "reshape": lambda: chain(
            L.Reshape((8, 3)), L.Permute((2, 1)), L.Flatten(), L.RepeatVector(2), shape=SERIES
        ),
        "block": lambda: graph(
            lambda x: L.Add()([x, L.BatchNormalization()(L.DepthwiseConv2D(3, padding="same")(x))]),
            IMAGE,
        ),
        "lambda": lambda: chain(L.Lambda(lambda x: x * 2), shape=VECTOR),
        "activity": lambda: chain(L.ActivityRegularization(0.1), shape=VECTOR),
        "dot": lambda: graph(lambda a, b: L.Dot(1)([a, b]), VECTOR, VECTOR),
        **{
            f"merge_{name}": lambda name=name: graph(
                lambda a, b: getattr(L, name)()([a, b]), VECTOR, VECTOR
            )
            for name in ("Add", "Multiply", "Average", "Maximum", "Minimum", "Concatenate")
        },
        **{
            f"activation_{name}": lambda name=name: chain(L.Activation(name), shape=VECTOR)
            for name in ("gelu", "swish", "selu", "mish", "hard_sigmoid", "exponential", "softsign")
        },
        **{
            name: lambda name=name, options=options: chain(
                getattr(L, name)(**options), shape=VECTOR
            )
            for name, options in {
                "LeakyReLU": {"alpha": 0.2},
                "PReLU": {},
                "ELU": {},
                "ThresholdedReLU": {"theta": 0.3},
                "Softmax": {},
                "ReLU": {"max_value": 1.0},
            }.items()
        },
        **{
            name: lambda name=name: chain(getattr(L, name)(0.3), L.Dense(2), shape=SERIES)
            for name in (
                *("Dropout", "SpatialDropout1D", "GaussianNoise"),
                *("GaussianDropout", "AlphaDropout"),
            )
        },
    }


def spatial() -> dict[str, Builder]:
    """Convolutions, pooling, padding, and what is done to images."""
    models: dict[str, Builder] = {
        "transposed_padding": lambda: chain(
            L.Conv2DTranspose(3, 4, strides=3, padding="same", output_padding=1), shape=IMAGE
        ),
        "up_bilinear": lambda: chain(L.UpSampling2D(2, interpolation="bilinear"), shape=IMAGE),
        "depthwise1": lambda: chain(L.DepthwiseConv1D(3), shape=SERIES),
        "depthwise2": lambda: chain(L.DepthwiseConv2D(3, depth_multiplier=2), shape=IMAGE),
        "separable1": lambda: chain(L.SeparableConv1D(3, 3), shape=SERIES),
        "separable2": lambda: chain(L.SeparableConv2D(3, 3), shape=IMAGE),
        "local1": lambda: chain(L.LocallyConnected1D(3, 2), shape=SERIES),
        "local2": lambda: chain(L.LocallyConnected2D(3, (2, 3), strides=(2, 1)), shape=IMAGE),
        "resizing": lambda: chain(L.Resizing(5, 6), shape=IMAGE),
        "rescaling": lambda: chain(L.Rescaling(1 / 255), shape=IMAGE),
        "center_crop": lambda: chain(L.CenterCrop(4, 5), shape=IMAGE),
        "augmentation": lambda: chain(
            L.RandomFlip(), L.RandomRotation(0.1), L.RandomZoom(0.1), L.Conv2D(2, 3), shape=IMAGE
        ),
    }
    for rank, shape in ((1, SERIES), (2, IMAGE), (3, VOLUME)):
        for name, arguments, options in (
            ("Conv{}D", (3, 2), {"padding": "same"}),
            ("Conv{}DTranspose", (3, 3), {"strides": 2, "padding": "same"}),
            ("MaxPooling{}D", (2,), {"padding": "same"}),
            ("AveragePooling{}D", (2,), {"padding": "same"}),
            ("GlobalAveragePooling{}D", (), {}),
            ("UpSampling{}D", (2,), {}),
            ("ZeroPadding{}D", (1,), {}),
            ("Cropping{}D", (1,), {}),
        ):
            layer = name.format(rank)
            models[layer] = lambda layer=layer, arguments=arguments, options=options, shape=shape: (
                chain(getattr(L, layer)(*arguments, **options), shape=shape)
            )
    return models


def normalizing() -> dict[str, Builder]:
    """Normalization and encoding."""
    return {
        "batch": lambda: chain(L.BatchNormalization(), shape=IMAGE),
        "layer": lambda: chain(L.LayerNormalization(), shape=SERIES),
        "group": lambda: chain(L.GroupNormalization(2), shape=SERIES),
        "unit": lambda: chain(L.UnitNormalization(), shape=SERIES),
        "spectral": lambda: chain(L.SpectralNormalization(L.Dense(3)), shape=VECTOR),
        "given": lambda: chain(
            L.Normalization(mean=[1.0, 2, 3, 4, 5], variance=[1.0, 2, 3, 4, 5]), shape=VECTOR
        ),
        "adapted": adapted,
        "discretization": lambda: chain(L.Discretization([-0.5, 0.0, 0.5]), shape=VECTOR),
        "category": lambda: chain(
            L.CategoryEncoding(6, output_mode="multi_hot"), shape=(4,), dtype="int32"
        ),
    }


def recurrent() -> dict[str, Builder]:
    """Recurrent layers, masks and attention."""
    models: dict[str, Builder] = {
        "gru_before": lambda: chain(
            L.GRU(4, reset_after=False, recurrent_activation="hard_sigmoid"), shape=SERIES
        ),
        "lstm_states": lambda: graph(
            lambda x, h, c: L.LSTM(4)(x, initial_state=[h, c]), SERIES, (4,), (4,)
        ),
        "stack": lambda: chain(L.RNN([L.LSTMCell(3), L.GRUCell(4)]), shape=SERIES),
        "bidirectional": lambda: chain(
            L.Bidirectional(L.LSTM(3, return_sequences=True)),
            L.Bidirectional(L.GRU(2), merge_mode="sum"),
            shape=SERIES,
        ),
        "convlstm1": lambda: chain(L.ConvLSTM1D(2, 3), shape=(3, 6, 2)),
        "convlstm2": lambda: chain(L.ConvLSTM2D(2, 3, return_sequences=True), shape=(3, 6, 6, 2)),
        "time_distributed": lambda: chain(L.TimeDistributed(L.Dense(3)), shape=SERIES),
        "time_distributed_conv": lambda: chain(
            L.TimeDistributed(L.Conv2D(3, 3)), shape=(2, *IMAGE)
        ),
        "embedding": lambda: chain(
            L.Embedding(9, 3, mask_zero=True), L.LSTM(4), shape=(6,), dtype="int32"
        ),
        "masking": lambda: chain(L.Masking(0.0), L.GRU(4), shape=SERIES),
        "heads": lambda: graph(lambda x: L.MultiHeadAttention(2, 3)(x, x), SERIES),
        "heads_causal": lambda: graph(
            lambda x, y: L.MultiHeadAttention(2, 3)(x, y, use_causal_mask=True), SERIES, SERIES
        ),
        "attention": lambda: graph(
            lambda x, y: L.Attention(use_scale=True)([x, y]), SERIES, SERIES
        ),
        "additive": lambda: graph(lambda x, y: L.AdditiveAttention()([x, y]), SERIES, SERIES),
        "einsum": lambda: chain(
            L.EinsumDense("abc,cd->abd", output_shape=(None, 3), bias_axes="d"), shape=SERIES
        ),
    }
    for name in ("LSTM", "GRU", "SimpleRNN"):
        models[name] = lambda name=name: chain(getattr(L, name)(4), shape=SERIES)
        models[f"{name}_all"] = lambda name=name: graph(
            lambda x: getattr(L, name)(4, return_sequences=True, return_state=True)(x), SERIES
        )
    return models


def recorded() -> dict[str, Builder]:
    """TensorFlow functions in the graph."""
    return {
        "tf_numbers": lambda: graph(lambda x: tf.nn.relu(x * 2.0 + 1.0) - x / 3.0, VECTOR),
        "tf_reduce": lambda: graph(
            lambda x: tf.reduce_mean(x, 1, True) + tf.reduce_max(x, axis=-1, keepdims=True), SERIES
        ),
        "tf_concat": lambda: graph(
            lambda x, y: tf.concat([x, tf.expand_dims(y, 1)], axis=1), SERIES, (4,)
        ),
        "tf_matmul": lambda: graph(
            lambda x: (
                tf.transpose(tf.reshape(tf.square(x), (-1, 4, 6)), [0, 2, 1]) @ tf.ones((4, 2))
            ),
            SERIES,
        ),
        "tf_split": lambda: graph(lambda x: tf.stack(tf.split(x, 2, axis=2), axis=1), SERIES),
        "tf_constant": lambda: graph(
            lambda x: tf.math.subtract(np.float32([1, 2, 3, 4]), x), SERIES
        ),
        "tf_shape": lambda: graph(lambda x: tf.reshape(x, [-1, tf.shape(x)[1] * 4]), SERIES),
        "slices": lambda: graph(lambda x: x[:, 1:4, :2] + x[:, 0:1, 2:], SERIES),
        "slice_last": lambda: graph(lambda x: x[:, -1], SERIES),
        "slice_ellipsis": lambda: graph(lambda x: x[..., 0][:, None], SERIES),
    }


def write(name: str, build: Builder, folder: Path) -> None:
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    model, rng = build(), np.random.default_rng(0)
    for weight in model.weights:
        if weight.dtype.is_floating:
            weight.assign(np.abs(rng.normal(0, 0.5, weight.shape)) + 0.1)
    for layer in model.layers:
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()
    inputs = []
    for spec in model.inputs:
        shape = (2, *spec.shape[1:])
        integers = spec.dtype.is_integer
        drawn = rng.integers(0, 6, shape) if integers else rng.normal(0, 1, shape)
        inputs.append(drawn.astype("int32" if integers else "float32"))
    if name == "masking":
        inputs[0][0, 3:] = 0
    outputs = model(inputs if len(inputs) > 1 else inputs[0], training=False)
    arrays = {f"x{i}": x for i, x in enumerate(inputs)}
    arrays |= {f"y{i}": np.asarray(y) for i, y in enumerate(tf.nest.flatten(outputs))}
    np.savez(folder / f"{name}.npz", inputs=len(inputs), **arrays)
    for ending in ("h5", "keras"):
        if (name, ending) != ("slice_ellipsis", "keras"):  # tf-keras cannot write this one.
            model.save(folder / f"{name}.{ending}")


def main(folder: Path, wanted: list[str]) -> None:
    warnings.simplefilter("ignore")
    for group in (plain, spatial, normalizing, recurrent, recorded):
        for name, build in group().items():
            if not wanted or name in wanted:
                write(name, build, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
