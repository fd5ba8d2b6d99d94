"""Repeated blocks become one loop: what rolls, what is left alone, and that numbers stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from fastgpu.ir.compat import jaxpr_as_fun
from fastgpu.models.gpt import GPT, GPTConfig
from fastgpu.models.resnet import ResNet, ResNetConfig
from fastgpu.transforms import also, inspect, optimize
from fastgpu.transforms.dataflow.blocks import runs
from fastgpu.transforms.dataflow.roll import roll_blocks
from fastgpu.transforms.dataflow.same_equations import derivative
from fastgpu.transforms.inline import inline_calls
from fastgpu.transforms.remat import reshaped_loops

X = jnp.linspace(-1, 1, 8).reshape(2, 4)
WS = [jax.random.normal(jax.random.key(i), (4, 4)) / 2 for i in range(6)]


def layers(x, ws):
    for w in ws:
        x = jnp.tanh(x @ w) + x
    return x


def rolled(fn, *args):
    return roll_blocks(inline_calls(jax.make_jaxpr(fn)(*args)))


def loops(closed):
    return [eqn.params["length"] for eqn in closed.jaxpr.eqns if eqn.primitive.name == "scan"]


def run(closed, *args):
    return jax.jit(jaxpr_as_fun(closed))(*jax.tree.leaves(args))


def same_as(fn, *args):
    """The rolled program of `fn`, which computes the same: floats up to what fusion rounds."""
    closed = rolled(fn, *args)
    for got, expected in zip(run(closed, *args), jax.tree.leaves(jax.jit(fn)(*args)), strict=True):
        exact = not jnp.issubdtype(expected.dtype, jnp.floating)
        close = 0 if exact else 1e-5
        np.testing.assert_allclose(got, expected, rtol=close, atol=close)
    return closed


def test_blocks_are_one_loop_over_stacked_weights():
    closed = same_as(layers, X, WS)
    assert loops(closed) == [6]
    (scan,) = [eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name == "scan"]
    assert (scan.params["num_consts"], scan.params["num_carry"]) == (0, 1)
    assert [eqn.primitive.name for eqn in scan.params["jaxpr"].jaxpr.eqns] == [
        *("dot_general", "tanh", "add")
    ]


def test_what_differs_is_a_row_and_what_does_not_a_constant():
    def fn(x, ws, shared):
        for i, w in enumerate(ws):
            x = jnp.tanh(x @ w * jnp.float32(i) + shared) * 0.5 + x
        return x

    (scan,) = [e for e in same_as(fn, X, WS, X).jaxpr.eqns if e.primitive.name == "scan"]
    constants, carries = scan.params["num_consts"], scan.params["num_carry"]
    assert (constants, carries, len(scan.invars) - constants - carries) == (1, 1, 2)


def test_what_is_read_of_each_block_comes_out_in_rows():
    def fn(x, ws):
        seen = []
        for w in ws:
            y = jnp.sin(x @ w)
            seen.append(jnp.sum(y * y))
            x = jnp.tanh(y) + x
        return x, seen, x * 2

    assert loops(same_as(fn, X, WS)) == [6]


def test_the_first_block_may_read_two_values_where_later_ones_read_one():
    def fn(a, b, ws):
        y = a
        for w in ws:
            a, b = jnp.cos(a @ w) * b, None
            b = a
        return a + y

    assert loops(same_as(fn, X, X + 1, WS)) == [5]


def test_two_runs_and_what_is_between_them():
    def fn(x, ws):
        x = jnp.exp(layers(x, ws))
        x = x.T @ x
        for w in ws:
            x = jnp.cos(x * w) / (1 + x)
        return x

    assert loops(same_as(fn, X, WS)) == [6, 6]


def test_dropout_masks_are_the_same_bit_for_bit():
    def fn(x, ws, key):
        masks = []
        for i, w in enumerate(ws):
            mask = jax.random.bernoulli(jax.random.fold_in(key, 7 * i * i + 5), 0.5, x.shape)
            masks.append(mask)
            x = jnp.where(mask, jnp.tanh(x @ w), 0) + x
        return x, masks

    assert loops(same_as(fn, X, WS, jax.random.key(3))) == [6]


def _shapes(x, ws):
    for w in ws:
        x = jnp.tanh(jnp.concatenate([x, x]) @ w)
    return x


def _settings(x, ws):
    for i, w in enumerate(ws):
        x = jnp.sum(jnp.tanh(x @ w)[:, None] ** (i + 2), axis=1)
    return x


def _dtypes(x, ws):
    for i, w in enumerate(ws):
        x = (x @ w).astype(jnp.bfloat16 if i % 2 else jnp.float16).astype(jnp.float32)
    return x


def _effects(x, ws):
    for w in ws:
        x = jnp.tanh(x @ w)
        io_callback(lambda: None, None, ordered=True)
    return x


def _dense(x, ws):
    seen = [x]
    for w in ws:
        seen.append(jnp.tanh(sum(seen) @ w))
    return seen[-1]


def _two_back(x, ws):
    before, x = x, x + 1
    older = x
    for w in ws:
        older, before, x = before, x, jnp.tanh(x @ w) * older
    return x


def _separate(x, ws):
    return [jnp.tanh(x @ w) * 2 + 1 for w in ws[:3]]


@pytest.mark.parametrize(
    "fn", [_shapes, _settings, _dtypes, _effects, _dense, _two_back, _separate]
)
def test_what_is_no_loop_is_left_alone(fn):
    closed = inline_calls(jax.make_jaxpr(fn)(X, WS))
    assert roll_blocks(closed) is closed


def test_functions_with_other_derivatives_are_not_equal():
    def with_slope(slope):
        @jax.custom_jvp
        def f(x):
            return jnp.maximum(x, 0)

        f.defjvp(lambda primals, tangents: (f(*primals), slope * tangents[0]))
        return f

    def net(slopes):
        def fn(x, ws):
            for w, slope in zip(ws, slopes, strict=True):
                x = with_slope(slope)(x @ w) + x
            return x

        return fn

    assert loops(rolled(net([1.0] * 6), X, WS)) == [6]
    assert loops(rolled(net([1.0, 2.0, 1.0, 2.0, 1.0, 2.0]), X, WS)) == []
    closed = same_as(net([1.0, 1.0, 1.0, 1.0, 1.0, 2.0]), X, WS)
    assert loops(closed) == [5]


def test_derivatives_in_reverse_are_compared_too():
    @jax.custom_vjp
    def f(x):
        return jnp.sin(x)

    f.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    first, second = jax.make_jaxpr(lambda x: f(f(x)))(X).jaxpr.eqns
    assert derivative(first) == derivative(second)

    def fn(x, ws):
        for w in ws:
            x = f(x @ w) + x
        return x

    assert loops(same_as(fn, X, WS)) == [6]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_under_jit_and_vmap(dtype, distance):
    x, ws = X.astype(dtype), [w.astype(dtype) for w in WS]
    fast = optimize(layers, passes=also("roll"))

    def gradients(fn):
        grad = jax.grad(lambda ws, x: jnp.sum(fn(x, ws).astype(jnp.float32) ** 2))
        return jax.jit(jax.vmap(grad, (None, 0)))(ws, jnp.stack([x, x + 1]))

    # Sums over positions may be taken in another order: a rounding of the dtype.
    close = 1e-6 if dtype == jnp.float32 else 2e-2
    assert distance(gradients(fast), gradients(layers)) < close


def test_second_and_forward_derivatives(distance):
    fast = optimize(layers, passes=also("roll"))

    def derivatives(fn):
        def curve(t):
            return jnp.sum(jnp.sin(fn(X * t, WS)))

        return jax.grad(jax.grad(curve))(1.1), jax.jvp(curve, (1.1,), (1.0,))

    assert distance(derivatives(fast), derivatives(layers)) < 1e-5


def test_a_rolled_program_is_not_rolled_again():
    once = rolled(layers, X, WS)
    assert roll_blocks(once) is once


def test_runs_need_enough_blocks():
    closed = jax.make_jaxpr(layers)(X, WS)
    assert [run.count for run in runs(closed.jaxpr, least=6)] == [6]
    assert runs(closed.jaxpr, least=7) == []


def test_planners_unroll_what_was_rolled(distance):
    closed = rolled(layers, X, WS)
    unrolled = next(reshaped_loops(closed, temporary_bytes=1))
    assert "6 iterations unrolled" in unrolled.loops[0] and loops(unrolled.program) == []
    assert distance(run(unrolled.program, X, WS), run(closed, X, WS)) < 1e-6


def test_the_pass_runs_for_those_who_name_it():
    assert "roll" not in [row.name for row in inspect(layers, X, WS).passes]
    found = inspect(layers, X, WS, passes=also("roll"))
    assert loops(found.after) == [6]


def _model(which):
    if which == "gpt":
        model, x = GPT(GPTConfig.tiny(depth=5, dropout=0.1)), jnp.arange(32).reshape(2, 16) % 32
    else:
        config = ResNetConfig.tiny(stage_sizes=(6,))
        model, x = ResNet(config), jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)

    def loss(variables, key):
        logits, state = model.apply(
            variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key}
        )
        return jnp.mean(logits**2), state

    return loss, variables


@pytest.mark.parametrize(
    ("which", "blocks"), [("gpt", 5), pytest.param("resnet", 5, marks=pytest.mark.slow)]
)
def test_models_compute_the_same_and_the_same_gradients(which, blocks, distance):
    loss, variables = _model(which)
    key = jax.random.key(2)
    closed = rolled(loss, variables, key)
    assert loops(closed) == [blocks]
    for got, expected in zip(
        run(closed, variables, key), jax.tree.leaves(jax.jit(loss)(variables, key)), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    fast = optimize(loss, passes=also("roll"))
    (_, got), (_, expected) = (
        jax.jit(jax.value_and_grad(fn, has_aux=True))(variables, key) for fn in (fast, loss)
    )
    assert distance(got, expected) < 1e-4
