"""Keras programs below `fastgpu.configure()`: the numbers that Keras on JAX gives without it."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("keras_program.py")
CASES = ("fit", "on_batch", "own_train_step", "large_weights", "datasets")
SLOW = ("several_steps", "not_compiled", "several_inputs", "mixed_precision", "failing_pass")


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("KERAS_", "XLA_"))}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )


def both_programs(cases: tuple[str, ...]) -> tuple[dict, dict]:
    """The numbers of the program with fastgpu and without, run side by side."""
    pytest.importorskip("keras")
    pytest.importorskip("tensorflow")
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(run_python, str(PROGRAM), "accelerated", *cases),
            pool.submit(run_python, str(PROGRAM), "plain", *cases, KERAS_BACKEND="jax"),
        ]
    for run in runs:
        assert run.result().returncode == 0, run.result().stderr[-3000:]
    accelerated, plain = (json.loads(run.result().stdout.splitlines()[-1]) for run in runs)
    assert (accelerated.pop("wrapped"), plain.pop("wrapped")) == (True, False)
    return accelerated, plain


def test_programs_keep_their_numbers() -> None:
    accelerated, plain = both_programs(CASES)
    # Float32 roundings, after up to a dozen steps of Adam; initial weights bit for bit.
    assert accelerated.pop("large_weights") == plain.pop("large_weights")
    assert_close(accelerated, plain, 2e-4)


@pytest.mark.slow
def test_more_programs_keep_their_numbers() -> None:
    accelerated, plain = both_programs(SLOW)
    assert_close(accelerated.pop("mixed_precision"), plain.pop("mixed_precision"), 2e-2)
    assert_close(accelerated, plain, 2e-4)


def assert_close(got, expected, tolerance: float, path: str = "") -> None:
    assert type(got) is type(expected), path
    if isinstance(got, dict):
        assert got.keys() == expected.keys(), path
        for key in got:
            assert_close(got[key], expected[key], tolerance, f"{path}/{key}")
    elif isinstance(got, list):
        assert len(got) == len(expected), path
        for index, (one, two) in enumerate(zip(got, expected, strict=True)):
            assert_close(one, two, tolerance, f"{path}/{index}")
    elif isinstance(got, float):
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance, err_msg=path)
    else:
        assert got == expected, path


ONE_MODEL = """
import keras, numpy as np
import fastgpu as fgpu
from keras.src.backend.jax import trainer
made = []
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
for m in (model, other):
    m.compile("sgd", "mse")
x = np.ones((8, 4), "float32")
before = model.evaluate(x, x[:, :2], verbose=0)
assert fgpu.accelerate(model) is model
import fastgpu.keras_integration.trainer as ours
original = ours._jit
ours._jit = lambda m, *fn, **kw: made.append(m.name) or original(m, *fn, **kw)
assert abs(model.evaluate(x, x[:, :2], verbose=0) - before) < 1e-6
model.fit(x, x[:, :2], verbose=0)
other.fit(x, x[:, :2], verbose=0)
assert made == [model.name] * 2, made
"""


def test_one_model_can_be_accelerated_alone() -> None:
    pytest.importorskip("keras")
    done = run_python("-c", ONE_MODEL, KERAS_BACKEND="jax")
    assert done.returncode == 0, done.stderr[-3000:]


ANOTHER_BACKEND = """
import keras
import fastgpu as fgpu
fgpu.configure(quiet=True, cache=False)
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
try:
    fgpu.accelerate(model)
except fgpu.errors.ConfigurationError as error:
    assert "KERAS_BACKEND=jax" in str(error)
else:
    raise AssertionError
print(keras.backend.backend())
"""


@pytest.mark.parametrize(
    "environment", [{}, pytest.param({"KERAS_BACKEND": "tensorflow"}, marks=pytest.mark.slow)]
)
def test_keras_on_another_backend_is_left_alone_and_said_so(environment) -> None:
    pytest.importorskip("tensorflow")
    done = run_python("-c", ANOTHER_BACKEND, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "tensorflow"
    # Chosen in the environment it is what the user wants.
    assert ("Keras was imported before" in done.stderr) == (not environment)
