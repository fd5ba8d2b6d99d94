"""What each structural pass does to a tiny jaxpr, and what it must leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fastgpu import ir
from fastgpu.transforms.common_subexpressions import merge_common_subexpressions
from fastgpu.transforms.constant_folding import MOST_BYTES, fold_constants
from fastgpu.transforms.dead_code import remove_dead_code
from fastgpu.transforms.inline import inline_calls


def names(closed):
    return [eqn.primitive.name for eqn in ir.walk(closed)]


def jaxpr(fn, *args):
    return jax.make_jaxpr(fn)(*args)


X = jnp.ones(4)


# ---- inline


def test_nested_calls_are_inlined_and_their_names_kept():
    inner = jax.jit(lambda x: jnp.sin(x))
    closed = inline_calls(jaxpr(lambda x: jax.jit(lambda y: inner(y) * 2)(x), X))
    assert names(closed) == ["sin", "mul"]
    assert "<lambda>" in str(closed.jaxpr.eqns[0].source_info.name_stack)


def test_calls_inside_of_loops_are_inlined():
    closed = jaxpr(lambda x: lax.scan(lambda c, y: (jax.jit(jnp.add)(c, y), None), 0.0, x)[0], X)
    assert "jit" not in names(inline_calls(closed))


def test_a_call_with_a_placement_or_donation_stays():
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for placed in (jax.jit(jnp.sin, out_shardings=here), jax.jit(jnp.sin, donate_argnums=0)):
        assert names(inline_calls(jaxpr(lambda x, f=placed: f(x) + 1, X)))[0] == "jit"


def test_custom_derivatives_are_not_inlined():
    assert "custom_jvp_call" in names(inline_calls(jaxpr(jax.nn.relu, X)))


# ---- common subexpressions


def test_equal_equations_are_merged_transitively():
    closed = merge_common_subexpressions(
        jaxpr(lambda x: jnp.exp(jnp.sin(x)) + jnp.exp(jnp.sin(x)), X)
    )
    assert names(closed) == ["sin", "exp", "add"]


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.sum(x) + jnp.max(x),
        lambda x: lax.slice(x, (0,), (2,)) + lax.slice(x, (1,), (3,)),
        lambda x: lax.optimization_barrier(x) + lax.optimization_barrier(x),
        lambda x: x * 0.0 + x * -0.0,
        lambda x: x.astype(jnp.int32) * 1 + (x * 1.0).astype(jnp.int32),
    ],
    ids=["other primitive", "other settings", "barrier", "signed zero", "other dtype"],
)
def test_what_differs_is_not_merged(fn):
    closed = jaxpr(fn, X)
    assert names(merge_common_subexpressions(closed)) == names(closed)


def test_callbacks_run_as_often_as_written():
    def fn(x):
        calls = [
            jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x) for _ in range(2)
        ]
        return calls[0] + calls[1]

    assert names(merge_common_subexpressions(jaxpr(fn, X))).count("pure_callback") == 2


def test_the_same_key_is_drawn_once_and_another_key_again():
    def fn(one, two):
        return [jax.random.bits(key, (3,)) for key in (one, one, two)]

    keys = jax.random.key(0), jax.random.key(1)
    closed = merge_common_subexpressions(inline_calls(jaxpr(fn, *keys)))
    assert names(closed).count("random_bits") == 2
    got = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *keys)
    for expected, merged in zip(fn(*keys), got, strict=True):
        np.testing.assert_array_equal(expected, merged)


def test_the_body_of_a_loop_is_merged_on_its_own():
    def body(c, x):
        return jnp.sin(c) + jnp.sin(c), x

    closed = merge_common_subexpressions(jaxpr(lambda x: lax.scan(body, 0.0, x), X))
    assert names(closed).count("sin") == 1


# ---- constant folding


def test_what_depends_on_no_input_becomes_a_literal():
    closed = fold_constants(jaxpr(lambda x: x * jnp.sqrt(jnp.float32(2)) / jnp.float32(3), X))
    assert names(closed) == ["mul", "div"]


def test_captured_arrays_are_folded_as_one_program():
    table = jnp.arange(6.0)
    closed = fold_constants(jaxpr(lambda x: x + jnp.sum(jnp.sin(table) ** 2), X))
    assert names(closed) == ["add"]
    (got,) = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, X)
    np.testing.assert_allclose(got, X + jnp.sum(jnp.sin(table) ** 2), rtol=1e-6)


def test_large_results_and_expansions_are_left_to_the_compiler():
    big = jnp.ones(MOST_BYTES // 4 + 1)
    for fn in (
        lambda x: jnp.sum(x) + jnp.sin(big),
        lambda x: x + lax.broadcast(1.0, (4,)),
        lambda x: x + lax.iota(jnp.float32, 4),
    ):
        closed = jaxpr(fn, X)
        assert names(fold_constants(closed)) == names(closed)


def test_effects_random_keys_and_outer_tracers_are_not_folded():
    def fn(x):
        jax.debug.print("{}", jnp.float32(1.0))
        return x + jax.random.normal(jax.random.key(0), (4,))

    before = inline_calls(jaxpr(fn, X))
    after = fold_constants(before)
    assert "debug_callback" in names(after) or "debug_print" in names(after)
    assert "random_bits" in names(after)

    @jax.jit
    def outer(c):
        traced = ir.trace(lambda x: x + jnp.sin(c), X)
        folded = fold_constants(traced.closed_jaxpr)
        assert names(folded) == names(traced.closed_jaxpr)
        return traced.with_jaxpr(folded).as_fun()(X)

    np.testing.assert_allclose(outer(2.0), X + np.sin(2.0), rtol=1e-6)


# ---- dead code


def test_unread_equations_go_and_inputs_stay():
    closed = remove_dead_code(jaxpr(lambda x, y: (jnp.sin(y), x + 1)[1], X, X))
    assert names(closed) == ["add"] and len(closed.jaxpr.invars) == 2


def test_unread_results_of_loops_go():
    def body(c, x):
        return c + x, jnp.sin(x)

    closed = remove_dead_code(jaxpr(lambda x: lax.scan(body, 0.0, x)[0], X))
    assert "sin" not in names(closed)


def test_effects_stay():
    def fn(x):
        jax.debug.callback(print, jnp.sin(x))
        return x

    assert "sin" in names(remove_dead_code(jaxpr(fn, X)))


def test_constants_that_nobody_reads_go():
    big = jnp.ones(1000)
    assert not remove_dead_code(jaxpr(lambda x: (x + 1, jnp.sum(big))[0], X)).consts


@pytest.mark.parametrize(
    "change", [inline_calls, merge_common_subexpressions, fold_constants, remove_dead_code]
)
def test_every_pass_is_idempotent_and_keeps_the_numbers(change):
    def fn(x, key):
        noise = jax.random.normal(key, x.shape)
        y = jax.nn.gelu(x) * jnp.sqrt(jnp.float32(2)) + jax.nn.gelu(x) + noise
        _ = jnp.sort(y)
        return lax.scan(lambda c, r: (c + jnp.tanh(r) * jnp.tanh(r), c), 0.0, y)

    before = jaxpr(fn, X, jax.random.key(0))
    once = change(before)
    ir.verify(before, once)
    assert str(change(once)) == str(once)
