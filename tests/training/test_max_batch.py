"""`max_batch` against the compiler's own figures."""

import operator

import jax
import jax.numpy as jnp
import optax
import pytest

import fastgpu as fgpu
from fastgpu.compile import absent_mesh, compile_for, memory_report
from fastgpu.errors import BatchError, BudgetError, ConfigurationError
from fastgpu.training.microbatch import resized

TX = optax.adam(1e-3)
BUDGET = 96 * 2**20


@pytest.fixture(scope="module")
def network():
    """A loss, a state and one example, as shapes."""
    module = fgpu.models.create("mlp", hidden=(128,) * 3, num_classes=10, dropout=0.0)
    x = jax.ShapeDtypeStruct((256, 128), jnp.float32)
    batch = {"inputs": x, "labels": jax.ShapeDtypeStruct(x.shape[:1], jnp.int32)}
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    state = jax.eval_shape(lambda v: fgpu.TrainState.create(v, TX, rng=0), variables)
    return fgpu.supervised_loss(module), state, batch


@pytest.fixture(scope="module")
def plain(network):
    """The largest batch of the plain step."""
    return fgpu.max_batch(fgpu.train_step(network[0], TX), *network[1:], BUDGET, "h100")


def by_the_compiler(loss, state, batch, size, **settings):
    """The peak of the step as a plain JAX program at `size`."""
    step = fgpu.train_step(loss, TX, **settings)
    program = step._build(step._value_and_grad())
    compiled = compile_for(program, (state, resized(batch, size)), "h100", donate_argnums=(0,))
    return memory_report(compiled).peak_bytes


def test_what_it_finds_fits_and_five_percent_more_does_not(network, plain):
    found, size = plain, int(plain)
    assert operator.index(found) == found.batch_size == size
    assert found.peak_bytes == by_the_compiler(*network, size) <= found.budget_bytes == BUDGET
    assert by_the_compiler(*network, int(1.05 * size)) > BUDGET
    assert found.compiles <= 4
    assert found.predicted_peak_bytes == pytest.approx(found.peak_bytes, rel=0.03)
    assert f"batch {size}: peak" in str(found)


@pytest.mark.slow
def test_a_step_that_may_recompute_takes_a_larger_batch(network, plain):
    loss, state, batch = network
    step = fgpu.train_step(loss, TX, memory_budget=BUDGET, target="h100")
    found = fgpu.max_batch(step, state, batch)
    assert int(found) > 1.2 * int(plain) and found.budget_bytes == BUDGET
    planned = fgpu.plan(step, state, resized(batch, int(found)))
    assert planned.fits and planned.peak_bytes == found.peak_bytes


@pytest.mark.slow
def test_microbatches_make_larger_batches_that_are_multiples(network, plain):
    loss, state, batch = network
    step = fgpu.train_step(loss, TX, accumulate_steps=4, global_batch=64)
    found = fgpu.max_batch(step, state, batch, BUDGET, "h100")
    assert int(found) % 4 == 0 and int(found) > 2 * int(plain)
    assert by_the_compiler(*network, int(found), accumulate_steps=4) <= BUDGET


@pytest.mark.slow
def test_a_sharded_batch_stays_sharded(network, plain):
    loss, state, batch = network
    mesh = absent_mesh("h100:4")
    step = fgpu.train_step(fgpu.gather_params(loss, mesh), TX)
    split = fgpu.shard_fsdp(state, batch, mesh)
    found = fgpu.max_batch(step, *split, BUDGET, "h100:4")
    assert int(found) % 4 == 0 and int(found) > 2 * int(plain)


def test_where_nothing_fits_the_error_says_what_one_example_needs(network):
    loss, state, batch = network
    with pytest.raises(BudgetError, match=r"not even a batch of 1 fits 512.00 KiB") as error:
        fgpu.max_batch(fgpu.train_step(loss, TX), state, batch, "512KiB", "h100")
    assert error.value.least_bytes == by_the_compiler(*network, 1)


def test_budgets_and_steps_that_make_no_sense(network):
    loss, state, batch = network
    step = fgpu.train_step(loss, TX)
    with pytest.raises(ConfigurationError, match="50% says nothing"):
        fgpu.max_batch(step, state, batch, "50%", "h100")
    auto = fgpu.train_step(loss, TX, accumulate_steps="auto")
    with pytest.raises(ConfigurationError, match="fixed number of microbatches"):
        fgpu.max_batch(auto, state, batch, "1GiB", "h100")
    with pytest.raises(BatchError, match=r"\['labels'\]"):
        uneven = {**batch, "labels": jax.ShapeDtypeStruct((3,), jnp.int32)}
        fgpu.max_batch(step, state, uneven, "1GiB", "h100")
