"""Tuning learning rate and weight decay of a fine-tuning: `tune` around `train_step` and `fit`."""

import jax
import numpy as np
import optax
import pytest

import fastgpu as fgpu
from fastgpu import models


@pytest.fixture
def digits():
    """Two classes of noisy 8×8 images, for training and validation."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 96).astype(np.int32)
    inputs = rng.normal(size=(96, 8, 8, 1)).astype(np.float32)
    inputs[:, 2:6, 2:6] += 2 * labels[:, None, None, None]
    both = {"inputs": inputs, "labels": labels}
    return {k: v[:64] for k, v in both.items()}, {k: v[64:] for k, v in both.items()}


def test_learning_rate_and_decay_of_a_fine_tuning(digits, tmp_path):
    train, valid = digits
    module, x = models.tiny("convnet", num_classes=2, dropout=0.0)
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros(x.shape, x.dtype))

    loss = fgpu.supervised_loss(module, loss="softmax_cross_entropy_with_integer_labels")
    adamw = optax.inject_hyperparams(optax.adamw)  # rates in the state: one compilation for all
    step = fgpu.train_step(loss, adamw(learning_rate=0.0, weight_decay=0.0))

    def objective(config, trial):
        state = fgpu.TrainState.create(variables, adamw(**config), rng=0)
        state, history = fgpu.fit(
            step, state, train, epochs=3, batch_size=16, eval_data=valid, progress=False,
            on_row=lambda row: trial.report(row["step"], row["eval_loss"]),
        )  # fmt: skip
        return history[-1]["eval_loss"]

    space = {"learning_rate": ("log", 1e-6, 1e-1), "weight_decay": ("log", 1e-5, 1e-1)}
    result = fgpu.tune(objective, space, trials=6, storage=tmp_path / "tune.db", progress=False)

    assert set(result.best_config) == {"learning_rate", "weight_decay"}
    untrained = fgpu.evaluate(loss, variables, valid, batch_size=16)["loss"]
    assert result.best_value < 0.5 * untrained
    values = {row.value for row in result.trials}
    assert len(values) == 6, "every trial trained with its own configuration"
    assert step._jitted._cache_size() == 1
