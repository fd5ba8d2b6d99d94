"""Models of other frameworks train as they do there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fastgpu.importers import from_keras, from_nnx
from fastgpu.training import TrainState, evaluate, predict, supervised_loss, train_step


def examples(count=48):
    x = np.random.default_rng(0).normal(size=(count, 8, 8, 1)).astype(np.float32)
    return x, (x.mean((1, 2, 3)) > 0).astype(int) + (x[:, 0, 0, 0] > 0)


def test_a_keras_softmax_model_trains_with_keras_own_losses():
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    imported = from_keras(model)
    x, y = examples()
    model.compile(keras.optimizers.SGD(0.05), "sparse_categorical_crossentropy", metrics=["acc"])
    tx = optax.sgd(0.05)
    step = train_step(supervised_loss(imported.module), tx)
    state = TrainState.create(imported.variables, tx, rng=0)
    for start in range(0, 48, 8):
        part = slice(start, start + 8)
        model.reset_metrics()
        theirs = model.train_on_batch(x[part], y[part], return_dict=True)
        state, ours = step(state, {"inputs": x[part], "labels": y[part]})
        # float32 sums in another order, through a few steps of batch normalization.
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-4)
        assert float(ours["accuracy"]) == pytest.approx(float(theirs["acc"]))
    np.testing.assert_allclose(
        predict(step, state, x, batch_size=20), model.predict(x, verbose=0), rtol=1e-3, atol=1e-4
    )
    scores = evaluate(step, state, {"inputs": x, "labels": y}, batch_size=20)
    theirs = model.evaluate(x, y, verbose=0, return_dict=True)
    assert scores["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert scores["accuracy"] == pytest.approx(theirs["acc"])


def test_an_nnx_model_trains_as_in_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(64, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.last = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.norm(self.first(x.reshape(len(x), -1)))))

    x, y = examples(16)
    model = Net(nnx.Rngs(0))
    imported = from_nnx(model)
    tx = optax.adam(1e-2)
    step = train_step(supervised_loss(imported.module), tx)
    state = TrainState.create(imported.variables, tx, rng=0)

    @nnx.jit
    def theirs(model, optimizer):
        def loss_fn(model):
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(model(x), y)
            return losses.mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    model.train()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(3):
        state, ours = step(state, {"inputs": jnp.asarray(x), "labels": jnp.asarray(y)})
        assert float(ours["loss"]) == pytest.approx(float(theirs(model, optimizer)), rel=1e-4)
    np.testing.assert_allclose(
        state.variables["batch_stats"]["norm"]["mean"], model.norm.mean.get_value(), rtol=1e-4
    )
    assert jax.tree.structure(state.variables) == jax.tree.structure(imported.variables)
