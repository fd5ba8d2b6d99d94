"""One element of each row by comparison: the same number, and no scatter in the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fastgpu as fgpu
from fastgpu import ir
from fastgpu.compile import compile_for, memory_report

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=(4, 6, 50)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(0, 50, (4, 6)))


def pick(x, index, mode=None):
    return jnp.take_along_axis(x, index[..., None], axis=-1, mode=mode)[..., 0]


def on_gpu(fn):
    """The pass alone, which is off on the CPU that runs these tests."""
    return fgpu.optimize(fn, passes=["row_pick"], target="h100")


def primitives(fn, *args):
    """Of equations on whole arrays: `optax` also takes the one element of rows of one."""
    eqns = ir.walk(jax.make_jaxpr(fn)(*args))
    return {eqn.primitive.name for eqn in eqns if eqn.invars and eqn.invars[0].aval.size > 24}


def test_the_labels_logit_of_a_cross_entropy_is_picked_without_gather_or_scatter():
    def loss(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    assert "scatter-add" in primitives(jax.grad(loss), LOGITS)
    assert "scatter-add" not in primitives(jax.grad(on_gpu(loss)), LOGITS)
    assert on_gpu(loss)(LOGITS) == loss(LOGITS)
    np.testing.assert_array_equal(jax.grad(on_gpu(loss))(LOGITS), jax.grad(loss)(LOGITS))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("mode", ["fill", "clip", "promise_in_bounds"])
def test_out_of_bounds_and_negative_indices_mean_what_they_meant(mode, dtype):
    x = LOGITS[0].astype(dtype)
    index = jnp.asarray([0, 49, -1, 50, 900, -51])
    expected = pick(x, index, mode)
    found = on_gpu(lambda x: pick(x, index, mode))(x)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(jnp.float32), expected.astype(jnp.float32))


def test_what_is_not_finite_elsewhere_in_a_row_does_not_matter():
    x = LOGITS[0].at[:, 3].set(jnp.inf).at[:, 4].set(jnp.nan)
    index = jnp.asarray([0, 3, 5, 6, 7, 8])
    np.testing.assert_array_equal(on_gpu(lambda x: pick(x, index))(x), pick(x, index))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_axis_under_jit_vmap_and_scan(axis):
    def fn(x):
        index = jnp.expand_dims(jnp.argmin(x, axis=axis), axis)
        return jnp.take_along_axis(x, index, axis=axis)

    fast = on_gpu(fn)
    np.testing.assert_array_equal(jax.jit(fast)(LOGITS), fn(LOGITS))
    pair = jnp.stack([LOGITS, -LOGITS])
    np.testing.assert_array_equal(jax.vmap(fast)(pair), jax.vmap(fn)(pair))
    scanned = jax.lax.scan(lambda c, x: (c, fast(x)), 0, pair)[1]
    np.testing.assert_array_equal(scanned, jax.vmap(fn)(pair))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x[1, 2],
        lambda x: x[jnp.asarray([0, 2])],
        lambda x: jnp.take(x, jnp.asarray([3, 4]), axis=2),
        lambda x: jnp.take_along_axis(x, LABELS[..., None].repeat(2, -1), axis=-1),
        lambda x: pick(x.astype(int), LABELS),
    ],
    ids=["one-row", "rows", "columns", "two-of-a-row", "integers"],
)
def test_other_gathers_are_left_alone(fn):
    before = str(jax.make_jaxpr(fn)(LOGITS)).count("gather[")
    assert str(jax.make_jaxpr(on_gpu(fn))(LOGITS)).count("gather[") == before


def test_a_cpu_gathers():
    fn = lambda x: pick(x, LABELS)  # noqa: E731
    assert "gather" in primitives(fgpu.optimize(fn, target="cpu"), LOGITS)


def test_the_compiled_gradient_scatters_nothing_and_needs_no_more_memory():
    h = jax.ShapeDtypeStruct((4096, 64), jnp.float32)
    w = jax.ShapeDtypeStruct((64, 20_000), jnp.float32)
    y = jax.ShapeDtypeStruct((4096,), jnp.int32)

    def gradient(optimized):
        def loss(h, w, y):
            return optax.softmax_cross_entropy_with_integer_labels(h @ w, y).mean()

        fn = fgpu.optimize(loss, target="h100") if optimized else loss
        return compile_for(jax.grad(fn, (0, 1)), (h, w, y), "h100")

    before, after = gradient(False), gradient(True)
    assert "scatter(" in before.as_text()
    assert "scatter(" not in after.as_text()
    assert memory_report(after).temp_bytes < 1.01 * memory_report(before).temp_bytes
