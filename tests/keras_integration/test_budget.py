"""Keras training within a memory budget: the same numbers, in no more bytes."""

import os
import re
import subprocess
import sys

import pytest

PROGRAM = """
import logging
import fastgpu as fgpu
fgpu.configure(quiet=True, cache=False, log_level="info", memory_budget=BUDGET)
import jax, keras, numpy as np

said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("fastgpu").addHandler(handler)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2048, 32)).astype("float32")
Y = RNG.integers(0, 4, 2048)

class Own(keras.Sequential):
    def train_step(self, state, data):
        jax.value_and_grad(lambda v: v)(1.0)
        logs, state = super().train_step(state, data) if self.calls_super else ({}, state)
        return logs, state

def model(kind=keras.Sequential, calls_super=True):
    keras.utils.set_random_seed(1)
    layers = [keras.Input((32,))]
    for _ in range(12):
        layers += [keras.layers.Dense(32, "tanh"), keras.layers.Dropout(0.1)]
    found = kind([*layers, keras.layers.Dense(4, "softmax")], name="deep")
    found.calls_super = calls_super
    found.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return found

def losses(m):
    m.fit(X, Y, batch_size=1024, epochs=2, verbose=0)
    return m.evaluate(X, Y, batch_size=1024, verbose=0)[0]
"""


def printed(budget: str, program: str) -> str:
    pytest.importorskip("keras")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("KERAS_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("BUDGET", budget) + program],
        env={**inherited, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_training_keeps_its_numbers_within_its_budget() -> None:
    program = """
budgeted = losses(model())
fgpu.configure(quiet=True, cache=False)
print("without", losses(model()), "within", budgeted)
print(*said, sep="\\n")
"""
    text = printed("'60%'", program)
    plain, budgeted = map(float, re.findall(r"without (\S+) within (\S+)", text)[0])
    # Four steps of Adam; masks of dropout are computed again, bit for bit.
    assert budgeted == pytest.approx(plain, rel=1e-5)
    sizes = re.findall(r"takes ([\d.]+) (\w+) of ([\d.]+) (\w+), without a budget", text)
    ((peak, unit, budget, same),) = sizes
    assert unit == same and float(peak) <= float(budget)


def test_a_budget_that_nothing_fits_is_refused_before_training() -> None:
    program = """
m = model()
before = [w.copy() for w in m.get_weights()]
try:
    m.fit(X, Y, batch_size=1024, verbose=0)
except fgpu.errors.BudgetError as error:
    print(error)
assert all((a == b).all() for a, b in zip(before, m.get_weights()))
"""
    text = printed("1000", program)
    assert "a budget of at least" in text and "1000 B" in text


@pytest.mark.slow
def test_a_step_that_differentiates_by_itself_is_said_to_be_without_a_plan() -> None:
    program = """
model(Own).fit(X, Y, batch_size=1024, verbose=0)
print(len(said))
model(Own, calls_super=False).fit(X, Y, batch_size=1024, verbose=0)
print(said[-1])
"""
    first, *_, last = printed("'60%'", program).splitlines()
    assert first == "1" and "memory_budget has no effect" in last


def test_a_budget_that_cannot_be_read_is_refused_at_once() -> None:
    import fastgpu as fgpu

    with pytest.raises(fgpu.errors.ConfigurationError, match="'a lot'"):
        fgpu.accelerate(object(), memory_budget="a lot")
