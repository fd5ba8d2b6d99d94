"""Microbatches against the whole batch, and their number chosen together with the plan."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fastgpu as fgpu
from fastgpu.compile import memory_report
from fastgpu.errors import BatchError, BudgetError, ConfigurationError, LossError
from fastgpu.training import TrainState, supervised_loss, train_step

# Sums of float32 in another order.
CLOSE = {"rtol": 2e-5, "atol": 1e-6}
TX = optax.sgd(0.1, momentum=0.9)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.tanh(nn.Dense(16)(x)))


class Noisy(nn.Module):
    """What sees other examples (batch norm), and what draws random numbers (dropout)."""

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(16)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


def data(size=12, weights=None):
    random = np.random.default_rng(0)
    batch = {
        "inputs": random.normal(size=(size, 5)).astype(np.float32),
        "labels": random.integers(0, 3, size),
    }
    return batch if weights is None else {**batch, "weights": np.asarray(weights)}


@functools.cache
def variables(module):
    return jax.jit(module.init)(jax.random.key(1), jnp.ones((1, 5)))


def start(module=None, tx=TX):
    return TrainState.create(variables(module or Net()), tx, rng=0)


@functools.cache
def step_of(count):
    """A step that is compiled once for all tests with this kind of batch."""
    return train_step(supervised_loss(Net()), TX, accumulate_steps=count, recompile="allow")


def after(step, batch, steps=2, state=None):
    state = start() if state is None else state
    for _ in range(steps):
        state, metrics = step(state, batch)
    return state, metrics


def assert_close(got, expected, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or CLOSE)), got, expected
    )


WEIGHTS = {
    "no weights": None,
    "equal": np.ones(12, np.float32),
    "unequal": np.arange(12, dtype=np.float32),
    "integers": np.arange(12, dtype=np.int32) % 3,
    "a microbatch without weight": np.tile(np.array([0.0, 1.0, 3.0], np.float32), 4),
    "nothing has weight": np.zeros(12, np.float32),
}


@pytest.mark.parametrize("steps", [3, 12])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_the_step_is_that_of_the_whole_batch(steps, weights):
    batch = data(weights=weights)
    expected, got = after(step_of(1), batch), after(step_of(steps), batch)
    assert_close(got[0].params, expected[0].params)
    assert_close(got[0].opt_state, expected[0].opt_state)
    assert_close(got[1], expected[1])
    assert int(got[0].step) == 2


def test_weights_of_more_axes_count_too():
    random = np.random.default_rng(0)
    batch = {
        "inputs": random.normal(size=(8, 6, 5)).astype(np.float32),
        "labels": random.integers(0, 3, (8, 6)),
        "weights": random.integers(0, 3, (8, 6)),
    }
    expected, got = after(step_of(1), batch), after(step_of(4), batch)
    assert_close((got[0].params, got[1]), (expected[0].params, expected[1]))


def test_one_microbatch_is_the_plain_step():
    loss, batch = supervised_loss(Net()), data()
    programs = [
        step.lower(start(), batch).as_text()
        for step in (train_step(loss, TX), train_step(loss, TX, accumulate_steps=1))
    ]
    assert programs[0] == programs[1]


def test_batch_norm_and_dropout_see_one_microbatch_at_a_time():
    module, batch, steps = Noisy(), data(), 3
    state = start(module)
    key = jax.random.fold_in(state.rng, 0)

    def by_hand(params, stats, inputs, labels, key):
        logits, updates = module.apply(
            {"params": params, "batch_stats": stats},
            inputs,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updates["batch_stats"]

    gradient = jax.jit(jax.value_and_grad(by_hand, has_aux=True))
    stats, losses, grads = state.model_state["batch_stats"], [], []
    for index in range(steps):
        part = batch["inputs"][index::steps], batch["labels"][index::steps]
        (loss, stats), grad = gradient(state.params, stats, *part, jax.random.fold_in(key, index))
        losses.append(loss)
        grads.append(grad)
    mean = jax.tree.map(lambda *g: sum(g) / steps, *grads)
    params = jax.tree.map(lambda p, g: np.asarray(p - 0.1 * g), state.params, mean)

    step = train_step(supervised_loss(module), optax.sgd(0.1), accumulate_steps=steps)
    got, metrics = step(start(module, optax.sgd(0.1)), batch)
    assert_close(got.params, params)
    assert_close(got.model_state["batch_stats"], stats)
    assert_close(metrics["loss"], np.mean(losses))


def line(params, model_state, batch, rng):
    """A loss with one metric of every kind."""
    error = batch["x"] * params["w"] - 1
    metrics = {
        "mean": jnp.abs(error).mean(),
        "count": jnp.sum(error > 0),
        "each": error,
        "of_classes": jnp.stack([error.mean(), (error**2).mean()]),
    }
    return (error**2).mean(), (model_state, metrics)


def test_metrics_are_put_together_by_kind():
    batch = {"x": np.linspace(-1, 4, 8, dtype=np.float32)}
    state = TrainState.create({"params": {"w": jnp.ones(())}}, TX, rng=0)
    _, expected = train_step(line, TX, donate=False)(state, batch)
    _, got = train_step(line, TX, accumulate_steps=4)(state, batch)
    assert got["count"].dtype == expected["count"].dtype == jnp.int32
    assert got["each"].shape == (8,)
    assert_close(got, expected)


def test_a_metric_that_has_no_sum_is_refused():
    def loss_fn(params, model_state, batch, rng):
        return jnp.mean(batch * params["w"]), (model_state, {"finite": jnp.all(batch > 0)})

    state = TrainState.create({"params": {"w": jnp.ones(())}}, TX, rng=0)
    with pytest.raises(LossError, match=r"'finite' cannot be put together.*\n.*averaged"):
        train_step(loss_fn, TX, accumulate_steps=2)(state, np.ones(4, np.float32))


def test_gradients_of_bfloat16_are_summed_in_float32():
    def loss_fn(params, model_state, batch, rng):
        return jnp.mean(batch * params["w"]), (model_state, {})

    tx = optax.sgd(1.0)
    state = TrainState.create({"params": {"w": jnp.zeros((), jnp.bfloat16)}}, tx, rng=0)
    batch = np.ones(1024, np.float32).astype(jnp.bfloat16)
    state, _ = train_step(loss_fn, tx, accumulate_steps=1024)(state, batch)
    # Summed in bfloat16, 1024 gradients of 1/1024 would come to rest at 1/4.
    assert state.params["w"] == -1 and state.params["w"].dtype == jnp.bfloat16


def test_the_state_is_donated_and_the_step_composes_with_jit():
    step, before, batch = step_of(3), start(), data()
    inside, _ = jax.jit(step)(start(), batch)
    outside, _ = step(before, batch)
    assert jax.tree.leaves(before.params)[0].is_deleted()
    assert_close(inside.params, outside.params)


@pytest.mark.parametrize("steps", [0, -1, 1.5, "many", None, True, [2]])
def test_a_number_of_microbatches_that_is_none_is_refused(steps):
    with pytest.raises(ConfigurationError, match=r"at least 1, or 'auto'"):
        train_step(supervised_loss(Net()), TX, accumulate_steps=steps)


def test_a_batch_that_cannot_be_cut_is_refused_and_the_next_one_taken():
    step = train_step(supervised_loss(Net()), TX, accumulate_steps=5)
    with pytest.raises(BatchError, match=r"12 examples .* 5 equal(.|\n)*accumulate_steps=4"):
        step(start(), data(12))
    step(start(), data(10))


def test_a_leaf_without_examples_is_named():
    step = train_step(supervised_loss(Net()), TX, accumulate_steps=2)
    with pytest.raises(BatchError, match=r"batch\['weights'\] does not hold"):
        step(start(), data(12, weights=1.0))


def test_the_global_batch_is_what_comes_and_what_is_planned():
    step = train_step(supervised_loss(Net()), TX, accumulate_steps=2, global_batch=12)
    with pytest.raises(BatchError, match=r"has 10 examples, .* made for 12"):
        step(start(), data(10))
    step(start(), data(12))
    plain = train_step(supervised_loss(Net()), TX, accumulate_steps=2)
    planned = fgpu.plan(step, start(), data(1), target="cpu")
    assert planned.memory == fgpu.plan(plain, start(), data(12), target="cpu").memory
    for wrong in (0, 7, 1.5, True):
        with pytest.raises(ConfigurationError, match="multiple of accumulate_steps=2"):
            train_step(supervised_loss(Net()), TX, accumulate_steps=2, global_batch=wrong)


@pytest.fixture(scope="module")
def deep():
    """A loss whose activations outweigh its parameters, a state and a batch."""
    module = fgpu.models.create("mlp", hidden=(32,) * 4, num_classes=3, dropout=0.0)
    random = np.random.default_rng(0)
    batch = {
        "inputs": random.normal(size=(4096, 32)).astype(np.float32),
        "labels": random.integers(0, 3, 4096),
    }
    made = jax.jit(module.init)(jax.random.key(0), batch["inputs"][:1])
    return supervised_loss(module), lambda: TrainState.create(made, TX, rng=0), batch


def test_auto_takes_the_batch_at_once_if_that_fits(deep):
    loss, state, batch = deep
    step = train_step(loss, TX, accumulate_steps="auto")
    found = fgpu.plan(step, state(), batch, target="h100")
    assert found.accumulate_steps == 1 and found.fits and found.compiles == 1
    assert found.budget_bytes > 70 * 2**30  # no budget: the device's memory


def test_auto_cuts_the_batch_to_fit_and_trains_the_same(deep):
    loss, state, batch = deep
    step = train_step(loss, TX, accumulate_steps="auto", memory_budget="40%", target="cpu")
    found = fgpu.plan(step, state(), batch)
    assert found.accumulate_steps > 1 and found.fits and found.compiles <= 5
    assert f"over {found.accumulate_steps} microbatches" in str(found)
    assert found.to_json()["accumulate_steps"] == found.accumulate_steps
    # What runs is within the budget too, by the compiler's figure for that program.
    compiled = step.lower(state(), batch).compile()
    assert memory_report(compiled).peak_bytes <= found.budget_bytes
    assert found.budget_bytes == int(0.4 * found.unconstrained_peak_bytes)
    expected = after(train_step(loss, TX), batch, state=state())
    got = after(step, batch, state=state())
    assert_close(got[0].params, expected[0].params, rtol=1e-4, atol=1e-5)
    assert_close(got[1], expected[1], rtol=1e-4)


@pytest.mark.slow
def test_falling_budgets_never_raise_the_peak_and_end_in_the_least_of_all_counts(deep):
    loss, state, batch = deep
    step = train_step(loss, TX, accumulate_steps="auto")

    def plan(budget):
        return fgpu.plan(step, state(), batch, target="h100", memory_budget=budget)

    found = [plan(budget) for budget in ("100%", "70%", "50%", "35%")]
    assert all(one.fits for one in found)
    peaks = [one.peak_bytes for one in found]
    assert peaks == sorted(peaks, reverse=True)
    seconds = [one.predicted_step_seconds for one in found]
    assert seconds == sorted(seconds)
    with pytest.raises(BudgetError, match="at least") as error:
        plan("1KiB")
    assert error.value.least_bytes <= peaks[-1]
    assert plan(error.value.least_bytes).peak_bytes == error.value.least_bytes


def test_a_fixed_count_and_a_plan_go_together(deep):
    loss, state, batch = deep
    step = train_step(loss, TX, accumulate_steps=2, memory_budget="80%", target="cpu")
    plain = train_step(loss, TX, accumulate_steps=2)
    found = fgpu.plan(step, state(), batch)
    assert found.fits and found.accumulate_steps == 2
    assert found.peak_bytes <= 0.8 * found.unconstrained_peak_bytes
    got, expected = (after(one, batch, state=state()) for one in (step, plain))
    assert_close(got[0].params, expected[0].params, rtol=1e-4, atol=1e-5)


def test_an_infeasible_budget_names_ways_out_with_figures(deep):
    loss, state, batch = deep
    step = train_step(loss, optax.adam(1e-3))
    adam = jax.eval_shape(
        lambda s: TrainState.create(s.variables, optax.adam(1e-3), rng=0), state()
    )
    ways = (
        r"batch of 2048 instead of 4096: about [\d.]+ [KM]iB less(.|\n)*max_batch(.|\n)*"
        r"accumulate_steps=2: (.|\n)*about [\d.]+ [KM]iB less(.|\n)*shard_fsdp"
    )
    with pytest.raises(BudgetError, match=ways):
        fgpu.plan(step, adam, batch, target="h100", memory_budget="1KiB")
