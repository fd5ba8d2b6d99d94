"""Steps in mixed precision: what stays float32, and float16's loss scale."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fastgpu as fgpu
from fastgpu.errors import FastGPUError
from fastgpu.training import LossScale

TX = optax.adam(1e-2)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        return nn.Dense(3, name="head")(nn.Dropout(0.1, deterministic=not train)(nn.relu(x)))


INPUTS = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
BATCH = {"inputs": INPUTS, "labels": INPUTS[:, :3].argmax(-1)}
VARIABLES = jax.jit(Net().init)(jax.random.key(0), INPUTS)
LOSS = fgpu.supervised_loss(Net())


@functools.cache
def stepped(precision, **settings):
    """The state and the losses after three steps."""
    step = fgpu.train_step(LOSS, TX, precision=precision, **settings)
    state = fgpu.TrainState.create(VARIABLES, TX, rng=0, precision=precision)
    losses = []
    for _ in range(3):
        state, metrics = step(state, BATCH)
        losses.append(metrics["loss"])
    return state, np.asarray(losses)


# ---- any step


CASES = [
    ("bf16-mixed", {}),
    ("fp16-mixed", {"accumulate_steps": 2, "passes": ()}),
    pytest.param("bf16-mixed", {"memory_budget": "100%"}, marks=pytest.mark.slow),
    pytest.param("fp16-mixed", {"memory_budget": "100%"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("precision", "settings"), CASES, ids=str)
def test_losses_are_float32s_and_the_state_keeps_its_types(precision, settings):
    exact, expected = stepped("float32", **settings)
    state, losses = stepped(precision, **settings)
    # A few roundings to bfloat16; float16 has three bits more.
    np.testing.assert_allclose(losses, expected, rtol=2e-2 if precision == "bf16-mixed" else 3e-3)
    assert (losses != expected).any() and losses.dtype == np.float32
    for name in ("params", "model_state", "opt_state"):
        types = [
            jax.tree.map(lambda leaf: leaf.dtype, getattr(one, name)) for one in (state, exact)
        ]
        assert types[0] == types[1]


def test_small_updates_reach_the_parameters():
    """A parameter in bfloat16 would not move: 1e-4 is less than half a unit in its last place."""

    def loss_fn(params, model_state, batch, rng):
        return jnp.mean((batch["x"] @ params["w"])[:, 0]), (model_state, {})

    tx = optax.sgd(1e-4)
    state = fgpu.TrainState.create({"params": {"w": jnp.ones((2, 1))}}, tx, rng=0)
    step = fgpu.train_step(loss_fn, tx, precision="bf16-mixed")
    for _ in range(10):
        state, _ = step(state, {"x": jnp.ones((4, 2))})
    np.testing.assert_allclose(state.params["w"], 1 - 1e-3, rtol=1e-6)


def test_evaluate_and_predict_use_the_steps_precision():
    step = fgpu.train_step(LOSS, TX, precision={"*": "bf16-mixed", "head": "float32"})
    state = fgpu.TrainState.create(VARIABLES, TX, rng=0)
    low = fgpu.predict(step, state, INPUTS)
    exact = fgpu.predict(LOSS, state, INPUTS)
    np.testing.assert_array_equal(fgpu.predict(step, state, INPUTS, precision="float32"), exact)
    assert low.dtype == np.float32 and (low != exact).any()
    np.testing.assert_allclose(low, exact, atol=2e-2)
    assert fgpu.evaluate(step, state, BATCH, batch_size=8) != pytest.approx(
        fgpu.evaluate(LOSS, state, BATCH, batch_size=8), rel=1e-6
    )


def test_it_runs_under_jit_and_scan():
    step = fgpu.train_step(LOSS, TX, precision="fp16-mixed")
    state = fgpu.TrainState.create(VARIABLES, TX, rng=0, precision="fp16-mixed")
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), BATCH)
    _, metrics = jax.jit(lambda s, b: jax.lax.scan(step, s, b))(state, batches)
    np.testing.assert_allclose(metrics["loss"], stepped("fp16-mixed")[1], rtol=1e-3)


# ---- the loss scale


def scale_of(state):
    """The scale, and the good steps since it changed."""
    return float(state.loss_scale.scale), int(state.loss_scale.good_steps)


def product(size):
    """A step in float16 whose gradient is `size`, before it is scaled."""

    def loss_fn(params, model_state, batch, rng):
        model_state = jax.tree.map(lambda leaf: leaf + 1, model_state)
        return size * jnp.sum(batch["x"] @ params["w"]), (model_state, {})

    tx = optax.chain(optax.trace(0.9), optax.sgd(1.0))
    variables = {"params": {"w": jnp.zeros((1, 1))}, "count": {"n": jnp.float32(0)}}
    state = fgpu.TrainState.create(variables, tx, rng=0, precision="fp16-mixed")
    return fgpu.train_step(loss_fn, tx, precision="fp16-mixed", donate=False), state


ONE = {"x": jnp.ones((1, 1))}


def test_gradients_that_float16_would_flush_to_zero_arrive():
    step, state = product(2.0**-30)
    state, metrics = step(state, ONE)
    assert state.params["w"] == -(2.0**-30)
    assert metrics["loss_scale"] == 2.0**16 and scale_of(state) == (2.0**16, 1)


def test_a_step_that_overflows_changes_the_scale_only():
    step, before = product(4.0)  # times 2^16 it is more than float16's largest number
    after, metrics = step(before, ONE)
    assert scale_of(after) == (2.0**15, 0) and int(after.step) == 1
    for name in ("params", "model_state", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    assert float(metrics["loss"]) == 0.0
    # Halved until it fits, then training goes on.
    for _ in range(3):
        after, metrics = step(after, ONE)
    assert scale_of(after) == (2.0**13, 1) and after.params["w"] != 0


def test_the_scale_doubles_after_2000_good_steps_in_a_row():
    step, state = product(1e-3)
    state = state.replace(loss_scale=LossScale(jnp.float32(64), jnp.int32(1998)))
    scales = []
    for _ in range(3):
        state, _ = step(state, ONE)
        scales.append(scale_of(state))
    assert scales == [(64, 1999), (128, 0), (128, 1)]
    overflown, _ = step(state, {"x": jnp.full((1, 1), 1e6)})
    assert scale_of(overflown) == (64, 0)


def test_microbatches_are_scaled_too():
    def loss_fn(params, model_state, batch, rng):
        return 2.0**-30 * jnp.mean(batch["x"] @ params["w"]), (model_state, {})

    tx = optax.sgd(1.0)
    state = fgpu.TrainState.create(
        {"params": {"w": jnp.zeros((1, 1))}}, tx, rng=0, precision="fp16-mixed"
    )
    step = fgpu.train_step(loss_fn, tx, precision="fp16-mixed", accumulate_steps=2)
    assert step(state, {"x": jnp.ones((4, 1))})[0].params["w"] == -(2.0**-30)


def test_a_state_without_a_scale_is_refused():
    step = fgpu.train_step(LOSS, TX, precision="fp16-mixed")
    state = fgpu.TrainState.create(VARIABLES, TX, rng=0)
    with pytest.raises(FastGPUError, match=r"(?s)no scale.*precision='fp16-mixed'\)"):
        step(state, BATCH)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    step = fgpu.train_step(LOSS, TX, precision="fp16-mixed")

    def fitted(steps, run_dir=None):
        state = fgpu.TrainState.create(VARIABLES, TX, rng=0, precision="fp16-mixed")
        # A scale that overflows at first, so that it changes on the way.
        state = state.replace(loss_scale=LossScale(jnp.float32(2.0**22), jnp.int32(0)))
        settings = {"batch_size": 4, "run_dir": run_dir, "progress": False}
        return fgpu.fit(step, state, BATCH, steps=steps, **settings).state

    whole = fitted(6)
    fitted(3, tmp_path)
    resumed = fitted(6, tmp_path)
    assert scale_of(whole)[0] < 2.0**22
    for one, two in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, two = jax.random.key_data(one), jax.random.key_data(two)
        np.testing.assert_array_equal(one, two)


# ---- training


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed"])
def test_digits_are_learned_as_in_float32(precision):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order].astype(np.int32)
    model = fgpu.models.create("convnet", num_classes=10)
    variables = model.init(jax.random.key(0), images[:1])
    loss = fgpu.supervised_loss(model, "softmax_cross_entropy_with_integer_labels")

    def accuracy(precision):
        tx = optax.adamw(2e-3)
        step = fgpu.train_step(loss, tx, precision=precision)
        state = fgpu.TrainState.create(variables, tx, rng=0, precision=precision)
        data = {"inputs": images[:1437], "labels": labels[:1437]}
        state = fgpu.fit(step, state, data, epochs=4, batch_size=64, progress=False).state
        test = {"inputs": images[1437:], "labels": labels[1437:]}
        return fgpu.evaluate(step, state, test, batch_size=64)["accuracy"]

    exact = accuracy("float32")
    # 360 test images: one percent are four of them.
    assert exact > 0.9 and abs(accuracy(precision) - exact) < 0.011
