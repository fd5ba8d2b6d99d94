"""Files of Keras 2: what it recorded differently, and everything against tf-keras where it is."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import h5py
import jax
import numpy as np
import pytest

from fastgpu.errors import UnsupportedLayerError
from fastgpu.importers import from_keras
from fastgpu.importers.keras.layers.activations import ACTIVATIONS

WRITER = Path(__file__).with_name("write_keras_2.py")
# A Python that has tf-keras: it must not share an environment with Keras 3.
PYTHON = os.environ.get("FASTGPU_TF_KERAS_PYTHON", "")


def layer(class_name: str, name: str, node: Any, **config: Any) -> dict[str, Any]:
    inner = {"name": name, "trainable": True, "dtype": "float32", **config}
    return {"class_name": class_name, "name": name, "config": inner, "inbound_nodes": [node]}


def model(tmp_path: Path, *layers: dict[str, Any], shape: list[int], **weights: Any) -> Path:
    """An .h5 as Keras 2 writes it: one input "x", the last layer is the output."""
    entry = layer("InputLayer", "x", [], batch_input_shape=[None, *shape])
    entry["inbound_nodes"] = []
    config = {
        "name": "m",
        "layers": [entry, *layers],
        "input_layers": [["x", 0, 0]],
        "output_layers": [[layers[-1]["name"], 0, 0]],
    }
    path = tmp_path / "m.h5"
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Functional", "config": config})
        file.attrs["keras_version"] = "2.11.0"
        root = file.create_group("model_weights")
        root.attrs["layer_names"] = list(weights)
        for name, arrays in weights.items():
            group = root.create_group(name)
            group.attrs["weight_names"] = [f"{name}/{key}:0" for key in arrays]
            for key, value in arrays.items():
                group[f"{name}/{key}:0"] = value
    return path


def call(path: Path, *inputs: Any) -> Any:
    imported = from_keras(path)
    return imported.module.apply(imported.variables, *inputs)


def test_recorded_tensorflow_functions(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(2, 4, 6)).astype("float32")
    op = lambda name, function, node: layer("TFOpLambda", name, node, function=function)  # noqa: E731
    every, part = {"start": None, "stop": None, "step": None}, {"start": 1, "stop": 3, "step": None}
    sliced = layer(
        "SlicingOpLambda",
        "cut",
        ["x", 0, 0, {"slice_spec": [every, part, 2]}],
        function="__operators__.getitem",
    )
    path = model(
        tmp_path,
        sliced,
        op("mean", "math.reduce_mean", ["x", 0, 0, {"axis": [1, 2], "keepdims": True}]),
        op("flat", "reshape", ["mean", 0, 0, {"shape": [-1, 1], "name": None}]),
        op("sum", "__operators__.add", ["cut", 0, 0, {"y": ["flat", 0, 0], "name": None}]),
        op("minus", "math.subtract", ["_CONSTANT_VALUE", -1, 1.0, {"y": ["sum", 0, 0]}]),
        op("both", "concat", [["minus", 0, 0, {"axis": 1}], ["cut", 0, 0, {"axis": 1}]]),
        op("size", "compat.v1.shape", ["both", 0, 0, {}]),
        layer(
            "SlicingOpLambda", "count", ["size", 0, 0, {"slice_spec": 1}],
            function="__operators__.getitem",
        ),
        op("wide", "reshape", ["both", 0, 0, {"shape": [-1, 2, 2]}]),
        op("out", "linalg.matmul", ["wide", 0, 0, {"b": [[1.0, 0.0], [2.0, 1.0]]}]),
        shape=[4, 6],
    )  # fmt: skip
    cut = x[:, 1:3, 2]
    both = np.concatenate([1 - (cut + x.mean(axis=(1, 2))[:, None]), cut], axis=1)
    want = both.reshape(-1, 2, 2) @ np.array([[1, 0], [2, 1]])
    np.testing.assert_allclose(call(path, x), want, rtol=1e-5, atol=1e-6)


def test_unknown_functions_are_named_once(tmp_path: Path) -> None:
    node = ["x", 0, 0, {"rate": 2}]
    entry = layer("TFOpLambda", "odd", node, function="signal.overlap_and_add")
    with pytest.raises(UnsupportedLayerError) as caught:
        from_keras(model(tmp_path, entry, shape=[4]))
    assert "'odd' (TFOpLambda: tf.signal.overlap_and_add, which is not in" in str(caught.value)
    assert "1 of its layers" in str(caught.value)


def test_thresholded_relu(tmp_path: Path) -> None:
    path = model(tmp_path, layer("ThresholdedReLU", "t", [["x", 0, 0, {}]], theta=0.5), shape=[3])
    x = np.array([[0.4, 0.5, 0.6]], "float32")
    np.testing.assert_array_equal(call(path, x), np.array([[0, 0, 0.6]], "float32"))


@pytest.mark.parametrize("kind", ["LSTM", pytest.param("GRU", marks=pytest.mark.slow)])
def test_cudnn_layers_read_the_memory_of_their_kernels_transposed(
    tmp_path: Path, kind: str
) -> None:
    """The kernels of each gate are stored as cuDNN wants them; the plain layer is the oracle."""
    gates, units, features = {"LSTM": 4, "GRU": 3}[kind], 3, 2
    rng = np.random.default_rng(0)
    plain = {
        "kernel": [rng.normal(size=(features, units)) for _ in range(gates)],
        "recurrent_kernel": [rng.normal(size=(units, units)) for _ in range(gates)],
    }
    biases = rng.normal(size=(2, gates * units)).astype("float32")
    memory = {
        name: np.hstack([np.ascontiguousarray(part.T).reshape(part.shape) for part in parts])
        for name, parts in plain.items()
    }
    usual = {name: np.hstack(parts) for name, parts in plain.items()}
    node, options = [["x", 0, 0, {}]], {"units": units, "return_sequences": True}
    x = rng.normal(size=(2, 5, features)).astype("float32")
    fused = model(
        tmp_path,
        layer(f"CuDNN{kind}", "rnn", node, **options),
        shape=[5, features],
        rnn={**memory, "bias": biases.ravel()},
    )
    got = call(fused, x)
    bias = biases.sum(0) if kind == "LSTM" else biases
    reset = {"reset_after": True} if kind == "GRU" else {}
    oracle = model(
        tmp_path,
        layer(kind, "rnn", node, **options, **reset),
        shape=[5, features],
        rnn={**usual, "bias": bias},
    )
    np.testing.assert_allclose(got, call(oracle, x), rtol=1e-5, atol=1e-6)


def test_hard_sigmoid_of_a_recurrent_layer_is_that_of_keras_2(tmp_path: Path) -> None:
    """With kernels of zero the output of a SimpleRNN is its activation of the bias."""
    path = model(
        tmp_path,
        layer("SimpleRNN", "rnn", [["x", 0, 0, {}]], units=1, activation="hard_sigmoid"),
        shape=[2, 1],
        rnn={"kernel": np.zeros((1, 1)), "recurrent_kernel": np.zeros((1, 1)), "bias": np.ones(1)},
    )
    want = ACTIVATIONS["hard_sigmoid (Keras 2)"](np.float32(1))
    np.testing.assert_allclose(call(path, np.zeros((1, 2, 1))), [[want]], rtol=1e-6)


def test_locally_connected_layers_have_a_kernel_per_position(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(12, 4 * 2, 3)), rng.normal(size=(3, 4, 3))
    node, options = [["x", 0, 0, {}]], {"filters": 3, "kernel_size": [2, 2], "strides": [1, 2]}
    path = model(
        tmp_path,
        layer("LocallyConnected2D", "local", node, implementation=1, **options),
        shape=[4, 8, 2],
        local={"kernel": kernel, "bias": bias},
    )
    x = rng.normal(size=(1, 4, 8, 2)).astype("float32")
    want = np.zeros((1, 3, 4, 3))
    for row in range(3):
        for column in range(4):
            window = x[0, row : row + 2, 2 * column : 2 * column + 2].ravel()
            want[0, row, column] = window @ kernel[4 * row + column] + bias[row, column]
    np.testing.assert_allclose(call(path, x), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedLayerError, match="implementation=3"):
        entry = layer("LocallyConnected2D", "local", node, implementation=3, **options)
        from_keras(model(tmp_path, entry, shape=[4, 8, 2]))


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="FASTGPU_TF_KERAS_PYTHON names no Python with tf-keras")
def test_files_of_tf_keras_match_within_1e_5(tmp_path: Path) -> None:
    """Over a hundred kinds of model, as .h5 and as .keras; only Lambda is refused."""
    subprocess.run([PYTHON, str(WRITER), str(tmp_path)], check=True, timeout=900)
    failures, count = [], 0
    for known in sorted(tmp_path.glob("*.npz")):
        arrays = np.load(known)
        inputs = [arrays[f"x{i}"] for i in range(int(arrays["inputs"]))]
        want = [arrays[key] for key in sorted(arrays) if key.startswith("y")]
        for path in sorted(tmp_path.glob(f"{known.stem}.*")):
            if path == known:
                continue
            count += 1
            try:
                got = jax.tree.leaves(call(path, *inputs))
            except UnsupportedLayerError:
                failures.append(path.name)
                continue
            # mixed_float16 keeps 11 bits.
            tolerance = 1e-3 if known.stem == "mixed" else 1e-5
            for g, w in zip(got, want, strict=True):
                error = np.abs(np.asarray(g, "float64") - w).max() / max(1, np.abs(w).max())
                if g.shape != w.shape or error > tolerance:
                    failures.append(path.name)
    assert failures == ["lambda.h5", "lambda.keras"]
    assert count > 200
