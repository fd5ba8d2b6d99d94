"""`compressed` around optax's own optimizers: which leaves, what error, what never changes."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from sklearn.datasets import load_digits

import fastgpu as fgpu
from fastgpu.errors import FastGPUError, OptimizerError
from fastgpu.optimizers import Blockwise, CompressedState, compressed
from fastgpu.training.checkpoint import CheckpointWriter, restore

WIDTH = 64  # a matrix of 64 by 64 is just large enough for the default `min_size`

OPTIMIZERS = {
    "adam": lambda: optax.adam(3e-2),
    "adamw": lambda: optax.adamw(3e-2, weight_decay=1e-4),
    "nadam": lambda: optax.nadam(3e-2),
    "amsgrad": lambda: optax.amsgrad(3e-2),
    "adamax": lambda: optax.adamax(3e-2),
    "lion": lambda: optax.lion(3e-3),
    "rmsprop": lambda: optax.rmsprop(1e-2),
    "momentum": lambda: optax.sgd(0.3, momentum=0.9),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-2)),
    "schedule": lambda: optax.adam(optax.cosine_decay_schedule(3e-2, 500)),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=3e-2),
    "masked": lambda: optax.chain(
        optax.masked(optax.adam(3e-2), {"w": True, "b": False}),
        optax.masked(optax.sgd(0.1), {"w": False, "b": True}),
    ),
    "partition": lambda: optax.partition(
        {"large": optax.adam(3e-2), "small": optax.sgd(0.1)}, {"w": "large", "b": "small"}
    ),
    "multi-steps": lambda: optax.MultiSteps(optax.adam(3e-2), 2).gradient_transformation(),
    "schedule-free": lambda: optax.contrib.schedule_free_adamw(3e-2),
}


def regression() -> tuple[dict, dict]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, WIDTH)).astype(np.float32)
    truth = rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) / 8
    y = x @ truth + 0.3 * rng.normal(size=(256, WIDTH)).astype(np.float32)
    params = {"w": jnp.zeros((WIDTH, WIDTH)), "b": jnp.zeros(WIDTH)}
    return params, {"x": jnp.asarray(x), "y": jnp.asarray(y)}


def loss_fn(params, model_state, batch, rng):
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return (error**2).mean(), (model_state, {})


def trained(tx: optax.GradientTransformation, steps: int) -> tuple[float, fgpu.TrainState]:
    params, batch = regression()
    step = fgpu.train_step(loss_fn, tx)
    state = fgpu.TrainState.create({"params": params}, tx, rng=0)
    run = jax.jit(
        lambda state: jax.lax.scan(lambda s, _: step(s, batch), state, length=steps),
        donate_argnums=0,
    )
    state, metrics = run(state)
    return float(metrics["loss"][-1]), state


def types(tree) -> list[tuple]:
    leaves, structure = jax.tree.flatten(tree)
    return [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves] + [structure]


def blockwise(tree) -> list[Blockwise]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Blockwise))
    return [leaf for leaf in leaves if isinstance(leaf, Blockwise)]


def size_in_bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_reaches_the_loss_it_reaches_in_float32(name):
    loss, state = trained(compressed(OPTIMIZERS[name]()), steps=200)
    assert blockwise(state.opt_state)
    exact, _ = trained(OPTIMIZERS[name](), steps=200)
    _, batch = regression()
    assert exact < 0.1 * float((batch["y"] ** 2).mean())
    # 8 bits are a noise of a few percent on the updates, and so on the loss above its minimum.
    assert abs(loss - exact) < 0.02 * exact


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_structure_and_types_of_the_state_never_change(name):
    params, _ = regression()
    tx = compressed(OPTIMIZERS[name]())
    state = jax.eval_shape(tx.init, params)
    _, after = jax.eval_shape(tx.update, params, state, params)
    assert types(after) == types(state)
    concrete = tx.init(params)
    assert [t[:2] for t in types(concrete)[:-1]] == [t[:2] for t in types(state)[:-1]]
    assert types(concrete)[-1] == types(state)[-1]


def test_the_large_moments_are_bytes_and_everything_else_is_as_it_was():
    params, _ = regression()
    state = compressed(optax.inject_hyperparams(optax.adam)(learning_rate=0.1)).init(params)
    adam = state.inner_state.inner_state[0]
    for moment in adam.mu, adam.nu:
        assert (moment["w"].codes.shape, moment["w"].codes.dtype) == ((WIDTH, WIDTH), np.uint8)
        assert moment["b"].dtype == np.float32
    assert state.inner_state.hyperparams["learning_rate"].dtype == np.float32
    assert float(optax.tree_utils.tree_get(state, "learning_rate")) == np.float32(0.1)


def test_copies_of_the_parameters_stay_as_they_are():
    params, _ = regression()
    state = compressed(optax.contrib.schedule_free_adamw(0.1)).init(params).inner_state
    assert state.z["w"].dtype == np.float32
    assert len(blockwise(state)) == 1  # the second moment: there is no first
    dog = compressed(optax.contrib.dog(1.0)).init(params)
    assert blockwise(dog) == []


def test_min_size_zero_compresses_every_moment():
    params, _ = regression()
    assert len(blockwise(compressed(optax.adam(0.1), min_size=0).init(params))) == 4
    assert len(blockwise(compressed(optax.adam(0.1), min_size=WIDTH**2 + 1).init(params))) == 0


def test_the_state_of_a_model_takes_about_a_quarter_of_the_bytes():
    model, x = fgpu.models.tiny("convnet", channels=(32, 64), dense=128)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    exact = size_in_bytes(jax.eval_shape(optax.adam(0.1).init, params))
    assert size_in_bytes(jax.eval_shape(compressed(optax.adam(0.1)).init, params)) <= 0.3 * exact


@pytest.mark.parametrize("block_size", [64, 256, 2048])
def test_a_moment_takes_a_byte_a_value_and_four_a_block(block_size):
    params = jax.ShapeDtypeStruct((100, 100), jnp.float32)
    state = jax.eval_shape(compressed(optax.lion(0.1), block_size=block_size).init, params)
    [moment] = blockwise(state)
    assert size_in_bytes(moment) == 100 * 100 + 4 * -(-100 * 100 // block_size)


def wild_gradients(steps: int) -> list[jax.Array]:
    """Over twelve decades in one block, and mostly zero: what makes an 8-bit Adam explode."""
    rng = np.random.default_rng(0)
    scale = 10 ** rng.uniform(-12, 0, WIDTH**2)
    sparse = rng.normal(size=(steps, WIDTH**2)) * (rng.random((steps, WIDTH**2)) < 0.2)
    return list(jnp.asarray(sparse * scale, jnp.float32))


@pytest.mark.parametrize(("rounding", "bound"), [("nearest", 1.09), ("dithered", 1.19)])
def test_stored_moments_overstate_no_update_by_more_than_the_bound(rounding, bound):
    tx = optax.adam(1.0, eps=1e-30)
    stored = compressed(tx, rounding=rounding)
    zeros = jnp.zeros(WIDTH**2)
    for gradient in wild_gradients(steps=3):
        # The second gradient is zero: the update is of stored moments alone.
        _, state = stored.update(gradient, stored.init(zeros))
        _, exact_state = tx.update(gradient, tx.init(zeros))
        update, _ = stored.update(zeros, state)
        exact, _ = tx.update(zeros, exact_state)
        assert (abs(update) <= bound * abs(exact)).all()


@pytest.mark.parametrize("rounding", ["nearest", "dithered"])
def test_updates_stay_as_small_as_adams(rounding):
    tx = compressed(optax.adam(1.0, eps=1e-30), rounding=rounding)
    state, update = tx.init(jnp.zeros(WIDTH**2)), jax.jit(tx.update)
    for gradient in wild_gradients(steps=30):
        updates, state = update(gradient, state)
        # Adam's own bound is (1 - b1) / sqrt(1 - b2) = 3.2; some rounds of rounding on top.
        assert abs(updates).max() < 5


def test_a_second_moment_follows_gradients_that_change():
    """A step changes it by 0.5%: rounded to the nearest code, it would come to rest."""
    rng = np.random.default_rng(0)
    before = 10 ** rng.uniform(-2, 0, 1024)
    after = before * rng.choice([0.3, 3.0], 1024)
    sizes = jnp.asarray(np.stack([before, after]), jnp.float32).repeat(600, axis=0)

    def root_of_second_moment(tx: optax.GradientTransformation) -> np.ndarray:
        def step(state, inputs):
            number, size = inputs
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), number), (1024,))
            return tx.update(noise * size, state)[1], None

        state = tx.init(jnp.zeros(1024))
        state, _ = jax.jit(lambda s: jax.lax.scan(step, s, (jnp.arange(1200), sizes)))(state)
        decoded = fgpu.optimizers.dequantize(state.inner_state.nu) if blockwise(state) else state.nu
        return np.sqrt(np.asarray(decoded))

    tx = optax.scale_by_rms(decay=0.995)
    exact = root_of_second_moment(tx)
    dithered = root_of_second_moment(compressed(tx, min_size=0)) / exact
    nearest = root_of_second_moment(compressed(tx, min_size=0, rounding="nearest")) / exact
    assert abs(dithered.mean() - 1) < 0.05
    assert dithered.min() > 0.5 and dithered.max() < 2
    assert nearest.min() > 0.75  # too large a moment is too small a step: slow, not unstable
    assert nearest.mean() > 2  # why "dithered" is the default


def test_equal_inputs_give_equal_bits():
    tx = compressed(optax.adam(3e-2))
    _, first = trained(tx, steps=5)
    _, second = trained(tx, steps=5)
    jax.tree.map(np.testing.assert_array_equal, first.opt_state, second.opt_state)


@pytest.mark.parametrize("name", ["adam", "lion", "momentum"])
def test_bfloat16_parameters_get_the_updates_and_dtypes_that_tx_gives(name):
    params, _ = regression()
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    tx = compressed(OPTIMIZERS[name]())
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params)
    exact, _ = OPTIMIZERS[name]().update(params, OPTIMIZERS[name]().init(params), params)
    assert [u.dtype for u in jax.tree.leaves(updates)] == [u.dtype for u in jax.tree.leaves(exact)]
    assert types(after) == types(state)


def test_gradients_of_another_dtype_leave_the_dtypes_of_the_state_alone():
    params = {"w": jnp.zeros((WIDTH, WIDTH), jnp.bfloat16)}
    tx = compressed(optax.adam(0.1))
    state = tx.init(params)
    _, after = tx.update({"w": jnp.ones((WIDTH, WIDTH))}, state, params)
    assert types(after) == types(state)


def test_a_state_passes_through_cond():
    params, _ = regression()
    tx = compressed(optax.adam(0.1))
    state = tx.init(params)
    gradient = jax.tree.map(jnp.ones_like, params)

    @jax.jit
    def maybe(skip, state):
        return jax.lax.cond(skip, lambda s: s, lambda s: tx.update(gradient, s)[1], state)

    assert int(maybe(True, state).step) == 0
    assert int(maybe(False, state).step) == 1


def test_donated_states_are_reused():
    params, batch = regression()
    tx = compressed(optax.adam(3e-2))
    step = fgpu.train_step(loss_fn, tx)
    state = fgpu.TrainState.create({"params": params}, tx, rng=0)
    after, _ = step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.opt_state))
    after, _ = step(after, batch)
    assert step._cache_size() == 1
    report = step.lower(after, batch).compile().memory_analysis()
    assert report.alias_size_in_bytes >= size_in_bytes(after.opt_state)


def test_extra_arguments_reach_the_transform():
    tx = compressed(optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()), min_size=0)
    params = {"w": jnp.ones(8)}
    updates, _ = tx.update(params, tx.init(params), params, value=jnp.float32(1))
    assert updates["w"].shape == (8,)


def test_a_checkpoint_gives_back_every_bit(tmp_path: Path):
    tx = compressed(optax.adam(3e-2))
    _, state = trained(tx, steps=5)
    with CheckpointWriter(tmp_path, keep=1, after=0) as writer:
        writer.save(5, state, {})
    params, batch = regression()
    fresh = fgpu.TrainState.create({"params": params}, tx, rng=0)
    found = restore(tmp_path, fresh)
    assert found is not None
    jax.tree.map(np.testing.assert_array_equal, found[0].opt_state, state.opt_state)
    step = fgpu.train_step(loss_fn, tx)
    resumed, _ = step(found[0], batch)
    uninterrupted, _ = step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, uninterrupted.params)


def test_orbax_alone_saves_the_state(tmp_path: Path):
    _, state = trained(compressed(optax.adam(3e-2)), steps=2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state.opt_state)
        checkpointer.wait_until_finished()
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            state.opt_state,
        )
        found = checkpointer.restore(tmp_path / "state", template)
    jax.tree.map(np.testing.assert_array_equal, found, state.opt_state)


def test_sharded_parameters_keep_their_sharding_and_the_numbers_are_the_same():
    program = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec as P
from fastgpu.optimizers import compressed
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
tx = compressed(optax.adam(0.1))
values = jax.random.normal(jax.random.key(0), (64, 64))
@jax.jit
def run(values):
    params = {"w": values}
    state = tx.update(params, tx.init(params), params)[1]
    return tx.update(params, state, params)
updates, state = run(values)
split, split_state = run(jax.device_put(values, NamedSharding(mesh, P("data"))))
np.testing.assert_allclose(updates["w"], split["w"], rtol=1e-5)
assert split["w"].sharding.spec == P("data"), split["w"].sharding
codes = split_state.inner_state[0].mu["w"].codes
np.testing.assert_array_equal(codes, state.inner_state[0].mu["w"].codes)
assert codes.sharding.spec == P("data"), codes.sharding
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=flags
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("settings", "expected", "got"),
    [
        ({"block_size": 0}, "1 to 1048576", "0"),
        ({"block_size": 256.0}, "an integer", "256.0"),
        ({"block_size": True}, "an integer", "True"),
        ({"min_size": -1}, "0 or more", "-1"),
        ({"rounding": "up"}, "'dithered'", "'up'"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, expected, got):
    with pytest.raises(OptimizerError) as caught:
        compressed(optax.adam(0.1), **settings)
    error = caught.value
    assert next(iter(settings)) in error.summary
    assert expected in error.expected and got in error.got and error.fix


@pytest.mark.parametrize("tx", [optax.adam, None, 0.1, "adam"])
def test_what_is_no_optimizer_is_refused(tx):
    with pytest.raises(FastGPUError, match="GradientTransformation") as caught:
        compressed(tx)
    assert caught.value.got and "compressed(optax.adam(1e-3))" in caught.value.fix


def test_the_state_of_another_optimizer_is_refused():
    params, _ = regression()
    plain = optax.adam(0.1)
    with pytest.raises(OptimizerError) as caught:
        compressed(plain).update(params, plain.init(params), params)
    assert "CompressedState" in caught.value.expected and caught.value.got == "tuple"
    assert isinstance(compressed(plain).init(params), CompressedState)


@pytest.mark.slow
def test_digits_are_learned_as_well_as_with_float32_state():
    pixels, labels = load_digits(return_X_y=True)
    images = (np.asarray(pixels) / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = (
        {"inputs": images[rows], "labels": np.asarray(labels)[rows]}
        for rows in (order[450:], order[:450])
    )
    model = fgpu.models.create("convnet")

    def scores(tx: optax.GradientTransformation, seed: int) -> tuple[float, float]:
        step = fgpu.train_step(fgpu.supervised_loss(model), tx)
        variables = model.init(jax.random.key(seed), images[:1])
        state = fgpu.TrainState.create(variables, tx, rng=seed)
        state, _ = fgpu.fit(step, state, train, epochs=10, batch_size=64, seed=seed)
        result = fgpu.evaluate(step, state, test, batch_size=150)
        return float(result["loss"]), float(result["accuracy"])

    exact = np.array([scores(optax.adam(1e-3), seed) for seed in range(3)])
    stored = np.array([scores(compressed(optax.adam(1e-3)), seed) for seed in range(3)])
    # Between two seeds, the float32 losses differ by about 0.01 and the accuracies by half a point.
    assert abs(stored.mean(axis=0) - exact.mean(axis=0))[0] < 0.01
    assert abs(stored.mean(axis=0) - exact.mean(axis=0))[1] < 0.01
    assert exact[:, 1].min() > 0.95 and stored[:, 1].min() > 0.95
