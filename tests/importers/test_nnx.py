"""A live NNX module behind linen's apply: the outputs, state and gradients of the object itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fastgpu.errors import FastGPUError, UnsupportedLayerError, WeightsError
from fastgpu.importers import from_nnx
from fastgpu.training import TrainState, supervised_loss, train_step


class Network(nnx.Module):
    """Lists of layers, batch statistics, dropout, and a counter of the user's own."""

    def __init__(self, rate: float, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)])
        self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.calls = nnx.Cache(jnp.zeros((), "int32"))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls.set_value(self.calls.get_value() + 1)
        return self.layers[1](self.dropout(nnx.relu(self.norm(self.layers[0](x)))))


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).normal(1, 2, (8, 4)).astype("float32")


def test_names_and_collections() -> None:
    shapes = jax.tree.map(jnp.shape, from_nnx(Network(0.5, nnx.Rngs(0))).variables)
    assert shapes == {
        "params": {
            "layers": {
                "0": {"kernel": (4, 6), "bias": (6,)},
                "1": {"kernel": (6, 3), "bias": (3,)},
            },
            "norm": {"scale": (6,), "bias": (6,)},
        },
        "batch_stats": {"norm": {"mean": (6,), "var": (6,)}},
        "nnx_state": {"calls": ()},
    }


def test_inference_equals_the_object(x: np.ndarray) -> None:
    model = Network(0.5, nnx.Rngs(0))
    imported = from_nnx(model)
    got = jax.jit(imported.module.apply)(imported.variables, x)
    model.eval()
    np.testing.assert_allclose(got, model(x), rtol=1e-6)


def test_training_and_gradient_equal_the_object(x: np.ndarray) -> None:
    model = Network(0.0, nnx.Rngs(0))
    imported = from_nnx(model)
    rest = {name: imported.variables[name] for name in ("batch_stats", "nnx_state")}

    def loss(params: Any) -> Any:
        out, state = imported.module.apply(
            {"params": params, **rest},
            x,
            train=True,
            mutable=list(rest),
            rngs={"dropout": jax.random.key(0)},
        )
        return jnp.mean(out**2), state

    (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(imported.variables["params"])
    model.train()
    want, want_gradient = nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(state["batch_stats"]["norm"]["mean"], model.norm.mean, rtol=1e-6)
    assert state["nnx_state"]["calls"] == 1
    kernel = want_gradient["layers"][0]["kernel"].get_value()
    np.testing.assert_allclose(gradient["layers"]["0"]["kernel"], kernel, rtol=1e-5, atol=1e-7)


def test_the_object_is_left_alone(x: np.ndarray) -> None:
    model = Network(0.5, nnx.Rngs(0))
    imported = from_nnx(model)
    key = {"dropout": jax.random.key(0)}
    _, state = imported.module.apply(
        imported.variables, x, train=True, mutable=["batch_stats", "nnx_state"], rngs=key
    )
    assert np.all(np.asarray(model.norm.mean) == 0)
    assert not np.allclose(state["batch_stats"]["norm"]["mean"], 0)


def test_dropout_follows_the_key_of_the_call(x: np.ndarray) -> None:
    imported = from_nnx(Network(0.5, nnx.Rngs(0)))

    def apply(seed: int) -> Any:
        rngs = {"dropout": jax.random.key(seed)}
        return imported.module.apply(
            imported.variables, x, train=True, mutable=["batch_stats"], rngs=rngs
        )[0]

    np.testing.assert_array_equal(apply(0), apply(0))
    assert not np.array_equal(apply(0), apply(1))


def test_train_step_learns(x: np.ndarray) -> None:
    imported = from_nnx(Network(0.1, nnx.Rngs(0)))
    tx = optax.adam(0.03)
    step = train_step(supervised_loss(imported.module, loss="squared_error"), tx)
    state = TrainState.create(imported.variables, tx, rng=jax.random.key(0))
    batch = {"inputs": x, "labels": x[:, :3]}
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.variables["nnx_state"]["calls"]) == 60


def test_report_and_refusals(x: np.ndarray) -> None:
    imported = from_nnx(Network(0.5, nnx.Rngs(0)))
    assert imported.report.parameter_count == 4 * 6 + 6 + 6 * 3 + 3 + 4 * 6 + 1
    assert {entry.name.split("/")[0] for entry in imported.report.ignored()} == {"dropout"}
    with pytest.raises(UnsupportedLayerError, match="live NNX module"):
        from_nnx(lambda x: x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(WeightsError, match="no 'layers/0/bias'"):
        imported.module.apply({**imported.variables, "params": {}}, x)
    with pytest.raises(FastGPUError, match="no init"):
        imported.module.init(jax.random.key(0), x)
