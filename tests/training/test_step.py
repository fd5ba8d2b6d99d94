"""`train_step` against a loop of jax and optax written out by hand, and its errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastgpu.errors import BatchError, FastGPUError, LossError, TraceError
from fastgpu.training import TrainState, supervised_loss, train_step


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train: bool = False):
        # A bias before a batch norm would have a gradient of zero: Adam would divide roundings.
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.relu(x).mean((1, 2))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(x)


def batches(count, size=4):
    random = np.random.default_rng(0)
    return [
        {
            "inputs": random.normal(size=(size, 6, 6, 2)).astype(np.float32),
            "labels": random.integers(0, 3, size),
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Net().init)(jax.random.key(1), jnp.ones((1, 6, 6, 2)))


def by_hand(variables, tx, rng, data):
    """The same training without fastgpu."""
    net = Net()

    @jax.jit
    def step(params, stats, opt_state, number, batch):
        def loss_fn(params):
            logits, updates = net.apply(
                {"params": params, "batch_stats": stats},
                batch["inputs"],
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(rng, number)},
            )
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
            return losses.mean(), updates["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, loss

    params, stats, opt_state = variables["params"], variables["batch_stats"], None
    opt_state = tx.init(params)
    losses = []
    for number, batch in enumerate(data):
        params, stats, opt_state, loss = step(params, stats, opt_state, number, batch)
        losses.append(float(loss))
    return params, stats, losses


@pytest.mark.parametrize(
    ("passes", "rtol"),
    # Rewritten operations sum in another order: float32 has 1.2e-7, Adam's first steps divide by
    # gradients near zero.
    [((), 0), ("default", 1e-4)],
)
def test_equals_a_loop_written_by_hand(variables, passes, rtol):
    tx, rng = optax.adam(1e-2), jax.random.key(7)
    data = batches(5)
    params, stats, losses = by_hand(variables, tx, rng, data)

    step = train_step(supervised_loss(Net()), tx, passes=passes)
    state = TrainState.create(variables, tx, rng=rng)
    ours = []
    for batch in data:
        state, metrics = step(state, batch)
        ours.append(float(metrics["loss"]))

    equal = np.testing.assert_array_equal if rtol == 0 else close(rtol)
    jax.tree.map(equal, state.variables, {"params": params, "batch_stats": stats})
    equal(np.array(ours), np.array(losses))


def close(rtol):
    return lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def linear(params, model_state, batch, rng):
    error = batch["x"] @ params["w"] - batch["y"]
    return (error**2).mean(), (model_state, {"error": jnp.abs(error).mean()})


def linear_state(tx, **extra):
    return TrainState.create({"params": {"w": jnp.zeros(2)}, **extra}, tx, rng=0)


LINEAR_BATCH = {"x": np.ones((4, 2), np.float32), "y": np.ones(4, np.float32)}


def test_compiles_once_whatever_the_weak_types(compilations):
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=lambda count: 0.1 / (count + 1))
    step = train_step(linear, tx)
    state = linear_state(tx).replace(step=0, params={"w": jnp.full(2, 1.0)})
    state, _ = step(state, LINEAR_BATCH)
    assert compilations
    compilations.clear()
    for _ in range(3):
        state, _ = step(state, LINEAR_BATCH)
    assert not compilations and step._cache_size() == 1
    assert state.step.dtype == jnp.int32 and not state.step.weak_type


def test_runs_under_jit_and_inside_scan():
    tx = optax.adam(0.1)
    step = train_step(linear, tx, passes=())
    stacked = jax.tree.map(lambda leaf: np.stack([leaf * k for k in (1, 2, 3)]), LINEAR_BATCH)

    state = linear_state(tx)
    for k in range(3):
        state, _ = step(state, jax.tree.map(lambda leaf, k=k: leaf[k], stacked))
    scanned, metrics = jax.lax.scan(step, linear_state(tx), stacked)
    jitted, _ = jax.jit(step)(linear_state(tx), LINEAR_BATCH)

    # One program instead of three: fused otherwise.
    np.testing.assert_allclose(scanned.params["w"], state.params["w"], rtol=1e-6)
    assert metrics["loss"].shape == (3,) and int(scanned.step) == 3
    assert int(jitted.step) == 1


def test_lower_takes_shapes():
    tx = optax.sgd(0.1)
    step = train_step(linear, tx)
    shapes = jax.eval_shape(lambda: (linear_state(tx), LINEAR_BATCH))
    assert step.lower(*shapes).compile().memory_analysis().alias_size_in_bytes > 0
    assert step._first_batch is None


def test_dropout_differs_by_step_and_repeats_by_seed(variables):
    tx = optax.sgd(0.0)
    step = train_step(supervised_loss(Net()), tx)

    def losses(seed):
        state = TrainState.create(variables, tx, rng=seed)
        (batch,) = batches(1)
        out = []
        for _ in range(3):
            state, metrics = step(state, batch)
            out.append(float(metrics["loss"]))
        return out

    first = losses(0)
    assert len(set(first)) == 3
    assert losses(0) == first
    assert losses(1) != first


def test_params_may_be_any_pytree_and_the_model_a_plain_function():
    def loss_fn(params, model_state, batch, rng):
        (a, [b]), calls = params, model_state["calls"]
        return ((a * batch + b) ** 2).sum(), ({"calls": calls + 1}, {})

    tx = optax.sgd(0.1)
    variables = {"params": (jnp.ones(()), [jnp.ones(3)]), "calls": jnp.int32(0)}
    state = TrainState.create(variables, tx, rng=0)
    step = train_step(loss_fn, tx)
    for _ in range(2):
        state, _ = step(state, jnp.ones(3))
    assert int(state.model_state["calls"]) == 2


def test_the_loss_reaches_optimizers_that_ask_for_it():
    tx = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(patience=1, factor=0.5))

    def flat(params, model_state, batch, rng):
        return 0.0 * params["w"].sum() + 1.0, (model_state, {})

    step, state = train_step(flat, tx), linear_state(tx)
    for _ in range(4):
        state, _ = step(state, LINEAR_BATCH)
    assert optax.tree_utils.tree_get(state.opt_state, "scale") < 1


def test_an_optimizer_that_keeps_the_parameters_themselves():
    """A buffer can be donated only once."""
    tx = optax.contrib.schedule_free_sgd(0.1)
    shared = optax.GradientTransformation(lambda params: (params, tx.init(params)), None)
    shared = shared._replace(update=lambda g, s, p: (g, (s[0], tx.update(g, s[1], p)[1])))
    step, state = train_step(linear, shared), linear_state(shared)
    for _ in range(2):
        state, _ = step(state, LINEAR_BATCH)
    assert float(state.opt_state[0]["w"][0]) == 0


def test_the_callers_arrays_survive_donation(variables):
    tx = optax.adam(1e-3)
    key = jax.random.key(0)
    before = jax.tree.map(np.array, variables)
    state = TrainState.create(variables, tx, rng=key)
    train_step(supervised_loss(Net()), tx)(state, batches(1)[0])
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    jax.random.normal(key)


def test_a_donated_state_is_named():
    tx = optax.sgd(0.1)
    step, state = train_step(linear, tx), linear_state(tx)
    step(state, LINEAR_BATCH)
    with pytest.raises(FastGPUError, match=r"the state was already used up[^$]*`state, metrics ="):
        step(state, LINEAR_BATCH)
    with pytest.raises(FastGPUError, match="already used up"):
        step(state.replace(step=jnp.int32(0)), LINEAR_BATCH)

    keeping, state = train_step(linear, tx, donate=False), linear_state(tx)
    keeping(state, LINEAR_BATCH)
    keeping(state, LINEAR_BATCH)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda e, s: ((e**2), (s, {})), r"not a scalar[^$]*float32\[\]\n  got: float32\[4\]"),
        (lambda e, s: (jnp.int32(1), (s, {})), r"cannot be differentiated[^$]*int32\[\]"),
        (lambda e, s: (1j * e.mean(), (s, {})), r"cannot be differentiated[^$]*complex64\[\]"),
        (lambda e, s: e.mean(), r"\(loss, \(model_state, metrics\)\)[^$]*got: float32\[\]"),
        (lambda e, s: (e.mean(), s), r"got: \(float32\[\], a dict with keys \['stats'\]\)"),
        (lambda e, s: (e.mean(), (s, e.mean())), "got: [^$]*float32"),
        (lambda e, s: (e.mean(), ({}, {})), r"model_state\['stats'\][^$]*float32\[3\][^$]*no such"),
        (lambda e, s: (e.mean(), ({"stats": e}, {})), r"float32\[3\]\n  got: float32\[4\]"),
        (
            lambda e, s: (e.mean(), ({"stats": s["stats"].astype(jnp.bfloat16)}, {})),
            r"float32\[3\]\n  got: bfloat16\[3\]",
        ),
        (lambda e, s: (None, (s, {})), "not a scalar[^$]*got: NoneType"),
    ],
)
def test_a_wrong_loss_is_refused_before_compiling(result, message, compilations):
    def loss_fn(params, model_state, batch, rng):
        return result(batch["x"] @ params["w"] - batch["y"], model_state)

    tx = optax.sgd(0.1)
    step, state = train_step(loss_fn, tx), linear_state(tx, stats=jnp.ones(3))
    compilations.clear()
    with pytest.raises(LossError, match=message):
        step(state, LINEAR_BATCH)
    assert not compilations
    assert not state.step.is_deleted()


def test_the_optimizer_of_another_state_is_refused():
    step, state = train_step(linear, optax.sgd(0.1)), linear_state(optax.sgd(0.1))
    mixed = state.replace(params={"w": state.params["w"].astype(jnp.bfloat16)})

    def wide(params, model_state, batch, rng):
        loss, aux = linear(params, model_state, batch, rng)
        return loss.astype(jnp.float32), aux

    grow = optax.GradientTransformation(
        lambda params: jnp.zeros(1), lambda g, s, p=None: (g, jnp.zeros(2))
    )
    with pytest.raises(TraceError, match=r"state.opt_state[^$]*float32\[1\][^$]*float32\[2\]"):
        train_step(wide, grow)(linear_state(grow), LINEAR_BATCH)
    assert step(mixed, LINEAR_BATCH)[0].params["w"].dtype == jnp.bfloat16


def test_a_batch_that_changed_is_named_with_the_ways_out():
    tx = optax.sgd(0.1)
    step, state = train_step(linear, tx), linear_state(tx)
    state, _ = step(state, LINEAR_BATCH)
    short = {"x": LINEAR_BATCH["x"][:3], "y": LINEAR_BATCH["y"][:3]}
    with pytest.raises(BatchError) as error:
        step(state, short)
    for part in ("batch['x']", "float32[4,2]", "float32[3,2]", "recompile", "drop_remainder"):
        assert part in str(error.value)
    assert "weight 0" in str(error.value) and "recompile='allow'" in str(error.value)

    with pytest.raises(BatchError, match=r"batch\['x'\][^$]*got: int32\[4,2\]"):
        step(state, {**LINEAR_BATCH, "x": LINEAR_BATCH["x"].astype(int)})
    with pytest.raises(BatchError, match=r"batch\['z'\][^$]*no such leaf"):
        step(state, {**LINEAR_BATCH, "z": np.ones(1)})
    with pytest.raises(BatchError, match=r"batch\['y'\] is not an array[^$]*'cat'"):
        step(state, {**LINEAR_BATCH, "y": "cat"})
    step(state, {**LINEAR_BATCH, "x": LINEAR_BATCH["x"].astype(np.float64)})
    assert step._cache_size() == 1


def test_recompile_allow_takes_every_batch():
    tx = optax.sgd(0.1)
    step, state = train_step(linear, tx, recompile="allow"), linear_state(tx)
    for size in (4, 3, 4):
        state, _ = step(state, jax.tree.map(lambda leaf, size=size: leaf[:size], LINEAR_BATCH))
    assert step._cache_size() == 2
    with pytest.raises(ValueError, match="`recompile`"):
        train_step(linear, tx, recompile="maybe")


def test_variables_without_params_or_with_integers_are_refused():
    tx = optax.sgd(0.1)
    with pytest.raises(FastGPUError, match=r"no collection 'params'[^$]*\['w'\]"):
        TrainState.create({"w": jnp.ones(2)}, tx, rng=0)
    with pytest.raises(FastGPUError, match=r"params\['n'\] cannot be trained[^$]*int32"):
        TrainState.create({"params": {"n": jnp.arange(2)}}, tx, rng=0)
