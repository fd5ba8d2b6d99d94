"""Loops unrolled and in chunks: the same gradients, and only loops that matter are touched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fastgpu.ir import walk
from fastgpu.ir.compat import jaxpr_as_fun
from fastgpu.transforms.remat import reshaped_loops

RNG = np.random.default_rng(0)


def normal(*shape, scale=0.3, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape) * scale, dtype)


def layers(w, x):
    def layer(x, w):
        return x + jnp.tanh(x @ w), None

    return jnp.sum(lax.scan(layer, x, w)[0] ** 2)


def lstm(weights, xs, reverse=False):
    of_x, of_h = weights

    def cell(state, x):
        h, c = state
        i, f, g, o = jnp.split(x @ of_x + h @ of_h, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    start = jnp.zeros((xs.shape[1], of_h.shape[0]), xs.dtype)
    (h, _), hs = lax.scan(cell, (start, start), xs, reverse=reverse)
    # Every step counts differently, so that rows in another order would show.
    return jnp.sum(hs * jnp.arange(len(xs))[:, None, None]) + jnp.sum(h**2)


def backwards(weights, xs):
    return lstm(weights, xs, reverse=True)


def dropped(w, rest):
    x, keys = rest

    def layer(x, row):
        w, key = row
        x = jnp.tanh(x @ w)
        return jnp.where(jax.random.bernoulli(key, 0.7, x.shape), x / 0.7, 0), jnp.sum(x)

    x, sums = lax.scan(layer, x, (w, keys))
    return jnp.sum(x) + jnp.sum(sums)


def nested(weights, xs):
    def layer(xs, w):
        def cell(h, x):
            h = jnp.tanh(x + h @ w)
            return h, h

        return lax.scan(cell, jnp.zeros_like(xs[0]), xs)[1], None

    return jnp.sum(lax.scan(layer, xs, weights)[0] ** 2)


def branches(w, xs):
    """A branch and a loop of unknown length in the body, which is not differentiated."""

    def cell(h, x):
        turns = lax.while_loop(lambda n: n * n < 10, lambda n: n + 1, jnp.int32(x[0, 0] > 0))
        h = lax.cond(turns % 2 == 0, lambda h: jnp.sin(h @ w), lambda h: jnp.tanh(h @ w), h)
        return h + x, h * turns

    h, hs = lax.scan(cell, jnp.zeros_like(xs[0]), xs, unroll=2)
    return jnp.sum(h) + jnp.sum(hs**2)


W = normal(12, 8, 8)
XS = normal(67, 4, 8)
LSTM = (normal(8, 32), normal(8, 32))
KEYS = jax.random.split(jax.random.key(3), 12)
PROGRAMS = {
    "layers": (layers, W, normal(16, 8)),
    "layers in bfloat16": (layers, W.astype(jnp.bfloat16), normal(16, 8, dtype=jnp.bfloat16)),
    "lstm of a prime number of steps": (lstm, LSTM, XS),
    "reverse": (backwards, LSTM, XS[:11]),
    "dropout": (dropped, W, (normal(16, 8), KEYS)),
    "nested": (nested, W[:3], XS[:7]),
    "branches": (branches, W[0], XS[:7]),
}


def versions(fn, *args, temporary_bytes=1):
    """Each version of `fn` as a function of the same arguments, and what was done to its loops."""
    leaves, tree = jax.tree.flatten(args)

    def of_leaves(*leaves):
        return [fn(*jax.tree.unflatten(tree, leaves))]

    closed = jax.make_jaxpr(of_leaves)(*leaves)
    for found in reshaped_loops(closed, temporary_bytes):
        run = jaxpr_as_fun(found.program)
        yield lambda *args, run=run: run(*jax.tree.leaves(args))[0], found


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_are_those_of_jax(name, distance):
    fn, params, rest = PROGRAMS[name]
    expected = jax.jit(jax.value_and_grad(fn))(params, rest)
    # Sums over iterations are taken in another order: some roundings of the type.
    near = 2e-2 if "bfloat16" in name else 1e-6
    ways = list(versions(fn, params, rest))
    # Unrolled; all in chunks; a part in chunks of one, and the rest as it was.
    for version, found in [ways[0], ways[1], ways[-1]]:
        got = jax.jit(jax.value_and_grad(version))(params, rest)
        assert distance(got, expected) < near, found.loops


def test_masks_are_computed_again_exactly():
    """With positive weights a gradient is zero exactly where a unit was dropped."""

    def fn(x, keys):
        def layer(x, key):
            return jnp.where(jax.random.bernoulli(key, 0.9, x.shape), jnp.exp(x), 0 * x), None

        return jnp.sum(lax.scan(layer, x, keys)[0])

    x = normal(16, 8, scale=0.01)
    keys = jax.random.split(jax.random.key(3), 3)
    dropped = np.asarray(jax.jit(jax.grad(fn))(x, keys)) == 0
    assert 0.05 < dropped.mean() < 0.5
    unrolled, chunked, *_ = [version for version, _ in versions(fn, x, keys)]
    for version in (unrolled, chunked):
        np.testing.assert_array_equal(jax.jit(jax.grad(version))(x, keys) == 0, dropped)


def test_under_vmap_and_a_second_derivative(distance):
    def once(fn):
        grads = jax.vmap(jax.grad(fn), in_axes=(None, 0))
        return jax.jit(lambda w, x: grads(w, jnp.stack([x, 2 * x])))(W, normal_rows)

    def twice(fn):
        def squared(x):
            return jnp.sum(jax.grad(fn)(W, x) ** 2)

        return jax.jit(jax.grad(squared))(normal_rows)

    normal_rows = PROGRAMS["layers"][2]
    expected = once(layers), twice(layers)
    *_, (chunked, _) = versions(layers, W, normal_rows)
    unrolled, _ = next(versions(layers, W, normal_rows))
    assert distance(once(unrolled), expected[0]) < 1e-6
    assert distance((once(chunked), twice(chunked)), expected) < 1e-6


def loops_of(fn, *args, temporary_bytes=1):
    found = versions(fn, *args, temporary_bytes=temporary_bytes)
    return [tuple(loop.split(": ")[-1] for loop in way.loops) for _, way in found]


def test_what_is_offered():
    assert loops_of(layers, W, PROGRAMS["layers"][2])[:2] == [
        ("12 iterations unrolled",),
        ("12 iterations, 12 of them in chunks of 2",),
    ]
    # An inner loop that stacks little for one turn of the outer one stays.
    rows = 12 * 16 * 8 * 4
    assert loops_of(layers, W, PROGRAMS["layers"][2], temporary_bytes=100 * rows) == []


def test_long_loops_are_not_unrolled():
    long = jnp.zeros((1000, 4, 8))
    first, *others = loops_of(lstm, LSTM, long)
    assert "in chunks of" in first[0] and all("in chunks of" in way[0] for way in others)
    size = int(first[0].split()[-1])
    assert 1 < size < 100 and 1000 % size == 0


def test_the_chunks_keep_carries_only():
    fn, params, rest = PROGRAMS["lstm of a prime number of steps"]

    def kept(fn):
        pulled = jax.eval_shape(lambda w, x: jax.vjp(fn, w, x)[1], params, rest)
        return sum(leaf.size for leaf in jax.tree.leaves(pulled))

    all_of_it, *_, bodies, _, _ = [kept(way) for way, _ in versions(fn, params, rest)]
    assert all_of_it < bodies < kept(fn) / 2


def test_what_is_left_alone():
    def printing(w, x):
        def layer(x, w):
            jax.debug.print("{}", x[0, 0])
            return jnp.tanh(x @ w), None

        return jnp.sum(lax.scan(layer, x, w)[0])

    def users_own(w, x):
        return jax.checkpoint(layers)(w, x)

    def forward_only(w, x):
        return jnp.sum(w) + lax.while_loop(lambda s: s < 1, lambda s: s + layers(W, x), 0.0)

    x = PROGRAMS["layers"][2]
    for fn in (printing, users_own, forward_only):
        assert loops_of(fn, W, x) == []


def test_a_loop_in_a_branch_goes_in_chunks():
    def fn(w, x):
        return lax.cond(x[0, 0] > 0, layers, lambda w, x: jnp.sum(w[0]), w, x)

    x = PROGRAMS["layers"][2]
    assert loops_of(fn, W, x)[0] == ("12 iterations, 12 of them in chunks of 2",)
    version, found = next(versions(fn, W, x))
    assert any(eqn.primitive.name == "remat2" for eqn in walk(found.program))
    np.testing.assert_allclose(jax.grad(version)(W, x), jax.grad(fn)(W, x), rtol=1e-5, atol=1e-6)
