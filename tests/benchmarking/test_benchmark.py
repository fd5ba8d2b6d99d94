"""`benchmark` on functions, steps and Keras files: what it ran, never how long it took."""

import json
import os
import zipfile
from pathlib import Path

import flax.linen as nn
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fastgpu as fgpu
from fastgpu.benchmarking.keras_files import without_dropout
from fastgpu.benchmarking.worker import peak_resident_bytes
from fastgpu.errors import BatchError, FastGPUError

BATCH = {
    "inputs": np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32),
    "labels": np.array([0, 1, 2, 0, 1, 2]),
}


@pytest.fixture(scope="module")
def keras_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(3, activation="softmax"),
        ],
        name="small",
    )
    path = tmp_path_factory.mktemp("keras") / "small.keras"
    model.save(path)
    model.save(path.with_suffix(".h5"))
    return path


def test_a_function_is_measured_against_itself_unoptimized() -> None:
    calls = []

    def traced(x: jax.Array) -> dict[str, jax.Array]:
        calls.append(x)
        return {"y": jnp.sin(x) @ x}

    report = fgpu.benchmark(traced, jnp.ones((4, 4)), rounds=3, steps=2)
    assert report.name == "traced"
    assert [row.side for row in report.rows] == ["fastgpu", "unoptimized"]
    assert all(np.shape(row.seconds) == (3, 2) for row in report.rows)
    assert all(row.compile_seconds > 0 for row in report.rows)
    assert all(row.peak_bytes is not None and row.peak_bytes >= 128 for row in report.rows)
    assert report.losses == {}
    assert len(calls) == 2  # traced once by each side, not once per step


def test_resident_memory_is_that_of_the_timed_steps() -> None:
    if (before := peak_resident_bytes()) is None:
        pytest.skip("needs Linux")
    big = np.ones(64 * 2**20, np.float32)  # 256 MiB, and gone before the steps
    del big
    highest = peak_resident_bytes()
    report = fgpu.benchmark(lambda x: x + 1, jnp.ones(8), rounds=1, steps=1)
    measured = report.row("fastgpu").resident_bytes
    assert measured is not None and highest is not None and highest >= before
    assert 0 < measured < highest - 128 * 2**20


def test_a_step_is_measured_without_using_up_the_state() -> None:
    module = nn.Dense(3)
    variables = module.init(jax.random.key(0), BATCH["inputs"])
    tx = optax.sgd(0.1)
    state = fgpu.TrainState.create(variables, tx, rng=0)
    step = fgpu.train_step(fgpu.supervised_loss(module), tx)
    report = fgpu.benchmark(step, state, BATCH, rounds=2, steps=1, loss_steps=4)
    assert report.row("fastgpu").items == 6
    expected = []
    for _ in range(4):
        state, metrics = step(state, BATCH)  # the caller's state is alive
        expected.append(float(metrics["loss"]))
    # the same float32 program, with and without passes
    np.testing.assert_allclose(report.losses["fastgpu"], expected, rtol=1e-6)
    np.testing.assert_allclose(report.losses["unoptimized"], expected, rtol=1e-5)
    assert expected[3] < expected[0]


def test_a_keras_file_is_measured_against_keras_on_both_backends(keras_file: Path) -> None:
    report = fgpu.benchmark(
        keras_file,
        BATCH,
        against=("keras-jax", "keras-tensorflow"),
        optimizer="momentum",
        learning_rate=0.05,
        rounds=2,
        steps=2,
        loss_steps=20,
    )
    assert report.name == "small.keras"
    assert [row.side for row in report.rows] == ["fastgpu", "keras-jax", "keras-tensorflow"]
    assert all(np.shape(row.seconds) == (2, 2) for row in report.rows)
    assert report.row("fastgpu").peak_bytes and report.row("keras-jax").peak_bytes is None
    # the same float32 arithmetic in three programs, 20 times over; dropout is off
    assert max(report.loss_deviations.values()) < 1e-4
    assert report.losses["fastgpu"][-1] < 0.9 * report.losses["fastgpu"][0]
    assert json.loads(json.dumps(report.to_json()))["environment"]["versions"]["jax"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["live", "h5"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_live_model_and_an_h5_file_are_measured_too(
    kind: str, optimizer: str, keras_file: Path
) -> None:
    import keras

    source = keras_file.with_suffix(".h5")
    if kind == "live":
        source = keras.saving.load_model(keras_file)
    report = fgpu.benchmark(
        source, BATCH, against=["keras-jax"], optimizer=optimizer, rounds=1, steps=1
    )
    # Adam adds epsilon at another place in optax than in Keras
    assert report.loss_deviations["keras-jax"] < 1e-3


def test_dropout_is_switched_off_in_a_copy(keras_file: Path, tmp_path: Path) -> None:
    copy = without_dropout(keras_file, tmp_path)
    with zipfile.ZipFile(copy) as changed, zipfile.ZipFile(keras_file) as original:
        assert '"rate": 0.5' in original.read("config.json").decode()
        assert '"rate": 0.0' in changed.read("config.json").decode()
        assert changed.read("model.weights.h5") == original.read("model.weights.h5")
    assert without_dropout(copy, tmp_path / "again") == copy  # nothing left to switch off

    copy = without_dropout(keras_file.with_suffix(".h5"), tmp_path)
    with h5py.File(copy) as changed:
        assert '"rate": 0.0' in str(changed.attrs["model_config"])


def test_a_process_that_ends_early_is_reported_with_its_last_words(tmp_path: Path) -> None:
    broken = tmp_path / "broken.keras"
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(FastGPUError, match="the process that measures 'fastgpu' ended") as error:
        fgpu.benchmark(broken, BATCH, against=(), rounds=1, steps=1)
    assert "broken.keras" in str(error.value.got)
    assert "against" in str(error.value.fix)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: fgpu.benchmark(abs, 1.0, against=["keras-jax"]), "cannot measure against"),
        (lambda f: fgpu.benchmark(f, BATCH, against=["torch"]), "cannot measure against 'torch'"),
        (lambda f: fgpu.benchmark(f), "takes one batch"),
        (lambda f: fgpu.benchmark(f, {"x": 1}), "lacks a key"),
        (lambda f: fgpu.benchmark(f, BATCH, loss="huber_loss"), "has no equal in Keras"),
        (lambda f: fgpu.benchmark(f, BATCH, optimizer="lion"), "has no equal in Keras"),
        (
            lambda f: fgpu.benchmark(f, {"inputs": np.ones((2, 4)), "labels": np.ones(3)}),
            "different lengths",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_runs(call, message: str, keras_file: Path) -> None:
    with pytest.raises(FastGPUError, match=message):
        call(keras_file)


def test_a_batch_of_several_inputs_comes_back_as_it_was(tmp_path: Path) -> None:
    from fastgpu.benchmarking.processes import save_batch
    from fastgpu.benchmarking.worker import load_batch

    x = (np.zeros((2, 3)), np.ones((2, 1)))
    assert save_batch({"inputs": x, "labels": [1, 2]}, tmp_path / "b.npz") == 2
    loaded = load_batch(str(tmp_path / "b.npz"))
    assert [a.shape for a in loaded["inputs"]] == [(2, 3), (2, 1)]
    assert list(loaded["labels"]) == [1, 2]
    with pytest.raises(BatchError):
        save_batch({"inputs": x}, tmp_path / "c.npz")
    assert os.listdir(tmp_path) == ["b.npz"]
