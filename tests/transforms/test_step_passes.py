"""Updates in place, outer products, first convolutions, random bits: what matches, and numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpu import ir
from fastgpu.ir.compat import eval_jaxpr
from fastgpu.transforms import inline_calls, optimize, without
from fastgpu.transforms.dataflow import outer_products, random_bits, stem
from fastgpu.transforms.dataflow.in_place import update_in_place

WIDE, ROWS, OUT = 1 << 16, 8, 128  # a weight matrix of 32 MiB


def array(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def adam_step(params, moments, x, y):
    """Two layers; the second one's weights are needed for the first one's gradient."""

    def loss(params):
        hidden = jnp.tanh(x @ params["first"])
        return jnp.mean((hidden @ params["second"] - y) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    means = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], grads)
    squares = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, moments[1], grads)
    params = jax.tree.map(
        lambda p, m, v: p - 1e-3 * m / (jnp.sqrt(v) + 1e-7), params, means, squares
    )
    return params, (means, squares), value


def arguments():
    params = {"first": array((4, WIDE)), "second": array((WIDE, OUT), 1)}
    moments = tuple(jax.tree.map(jnp.ones_like, params) for _ in range(2))
    return params, moments, array((ROWS, 4), 2), array((ROWS, OUT), 3)


def temporaries(fn, args):
    compiled = jax.jit(fn, donate_argnums=(0, 1)).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_step_needs_neither_a_copy_of_its_weights_nor_their_gradient():
    args = arguments()
    matrix = args[0]["second"].nbytes
    assert temporaries(adam_step, args) > matrix
    assert temporaries(optimize(adam_step), args) < 0.5 * matrix
    assert temporaries(optimize(adam_step, passes=without("in_place")), args) > 0.9 * matrix


def test_a_step_computes_what_it_did(distance):
    args = arguments()
    expected = jax.jit(adam_step)(*args)
    got = optimize(adam_step)(*args)
    # The order of eight terms.
    assert distance(got, expected) < 1e-6


def updated(fn, *args):
    closed = jax.make_jaxpr(fn)(*args)
    return closed, update_in_place(closed)


LARGE = jax.ShapeDtypeStruct((1024, 512), jnp.float32)
X = jax.ShapeDtypeStruct((8, 1024), jnp.float32)
Y = jax.ShapeDtypeStruct((8, 512), jnp.float32)


def test_an_update_waits_for_every_reader_through_casts_and_transposes():
    def step(w, x, y):
        # The update comes first in the program, the reader after it.
        new = w - 0.1 * (x.T @ y)
        return new, y.astype(jnp.bfloat16) @ w.T.astype(jnp.bfloat16)

    before, after = updated(step, LARGE, X, Y)
    names = [eqn.primitive.name for eqn in after.eqns]
    assert names.index("sub") > max(i for i, name in enumerate(names) if name == "dot_general")
    ir.verify(before, after)
    args = array((1024, 512)), array((8, 1024), 1), array((8, 512), 2)
    exact = jax.tree.map(np.asarray, eval_jaxpr(before.jaxpr, (), *args))
    for one, two in zip(exact, eval_jaxpr(after.jaxpr, (), *args), strict=True):
        np.testing.assert_array_equal(one, two)
    again = update_in_place(after)
    assert len(again.eqns) == len(after.eqns)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(lambda w, x, y: (w - 0.1 * (x.T @ y), x), id="nobody else reads"),
        pytest.param(lambda w, x, y: (w - 0.1 * (x.T @ (x @ w)), x), id="reads come before"),
        pytest.param(lambda w, x, y: (w @ y.T, x), id="no update"),
        pytest.param(
            lambda w, x, y: ((new := w - 0.1 * (x.T @ y)), jnp.sum((new - w) ** 2)),
            id="a reader needs the update",
        ),
        pytest.param(lambda w, x, y: (x * 0.5, y @ w.T), id="small"),
    ],
)
def test_what_needs_no_order_is_left_alone(step):
    before, after = updated(step, LARGE, X, Y)
    assert [str(eqn) for eqn in after.eqns] == [str(eqn) for eqn in before.eqns]


def test_an_update_with_nothing_to_multiply_is_left_alone():
    integers = jax.ShapeDtypeStruct((1024, 512), jnp.int32)
    before, after = updated(lambda w, x: (w + 1, x @ w), integers, X)
    assert len(after.eqns) == len(before.eqns)


def test_signed_zeros_and_not_a_numbers_are_updated_bit_for_bit():
    def step(w, x, y):
        return w + x.T @ y, y @ w.T

    w = array((1024, 512)).at[0].set(-0.0).at[1].set(jnp.nan).at[2].set(jnp.inf)
    x, y = array((8, 1024), 1).at[:, :3].set(0.0), array((8, 512), 2)
    closed = jax.make_jaxpr(step)(w, x, y)
    changed = update_in_place(closed)
    assert len(changed.eqns) > len(closed.eqns)
    one, two = (np.asarray(eval_jaxpr(c.jaxpr, (), w, x, y)[0]) for c in (closed, changed))
    np.testing.assert_array_equal(one.view(np.uint32), two.view(np.uint32))


def lowered_by(closed, chooser):
    changed = ir.lower_by(closed, chooser)
    count = sum(eqn.primitive.name == "lowered" for eqn in ir.walk(changed))
    return changed, count


DOTS = {
    "weight gradient": ((16, 4096), (16, 1024), ((0,), (0,))),
    "several dimensions": ((2, 4, 4096), (2, 4, 32, 32), ((0, 1), (0, 1))),
    "contracting the last": ((4096, 8), (1024, 8), ((1,), (1,))),
}


@pytest.mark.parametrize("case", DOTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_of_few_terms_is_a_sum_of_outer_products(case, dtype):
    lhs, rhs, contract = DOTS[case]
    x, y = array(lhs).astype(dtype), array(rhs, 1).astype(dtype)
    closed = jax.make_jaxpr(lambda x, y: jax.lax.dot_general(x, y, (contract, ((), ()))))(x, y)
    changed, count = lowered_by(closed, outer_products.CHOOSER)
    assert count == 1
    one, two = (np.asarray(eval_jaxpr(c.jaxpr, (), x, y)[0], np.float32) for c in (closed, changed))
    # The same terms in float32 in another order; then one rounding.
    np.testing.assert_allclose(two, one, atol=1e-5 if dtype == jnp.float32 else 0.1, rtol=0.01)


def test_products_that_are_no_such_gradient_are_left_alone():
    def count(*shapes, contract=((1,), (0,)), batch=((), ())):
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        dot = jax.make_jaxpr(lambda x, y: jax.lax.dot_general(x, y, (contract, batch)))(*args)
        return lowered_by(dot, outer_products.CHOOSER)[1]

    assert count((4096, 33), (33, 4096)) == 0, "too many terms"
    assert count((1024, 8), (8, 1024)) == 0, "too small a result"
    assert count((4, 4096, 8), (4, 8, 4096), contract=((2,), (1,)), batch=((0,), (0,))) == 0
    assert count((256, 8), (8, 65536)) == 1
    assert count((16, 8), (8, 1 << 20)) == 0, "a thin result"
    assert count((16, 4096), (4096, 1024)) == 1, "its derivative is one"


STEMS = {
    "3x3 valid": (1, "VALID", 1, (3, 12, 12, 3), (3, 3, 3, 8)),
    "7x7 stride 2": (2, "SAME", 1, (2, 23, 22, 3), (7, 7, 3, 8)),
    "dilated": (1, "SAME", 2, (2, 14, 14, 1), (3, 3, 1, 8)),
    "strided, uneven": (3, ((0, 1), (2, 0)), 1, (2, 17, 16, 4), (3, 2, 4, 8)),
}


@pytest.mark.parametrize("case", STEMS)
def test_the_weight_gradient_over_few_features_keeps_its_numbers(case):
    stride, padding, dilation, x_shape, w_shape = STEMS[case]

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            padding,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    x, w = array(x_shape), array(w_shape, 1)
    gradient = jax.make_jaxpr(jax.grad(lambda w, x: jnp.sum(jnp.sin(conv(x, w)))))(w, x)
    changed, count = lowered_by(gradient, stem.CHOOSER)
    assert count == 2  # the convolution itself is claimed
    one, two = (eval_jaxpr(c.jaxpr, c.consts, w, x)[0] for c in (gradient, changed))
    scale = float(jnp.max(jnp.abs(one)))
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5 * scale)
    # Differentiated after the passes: the same.
    fast = jax.grad(lambda w, x: jnp.sum(jnp.sin(optimize(conv, target="cpu")(x, w))))(w, x)
    np.testing.assert_allclose(fast, one, rtol=0, atol=1e-5 * scale)


DRAWS = {
    "uniform": lambda key: jax.random.uniform(key, (70, 65)),
    "normal": lambda key: jax.random.normal(key, (5000,)),
    "mask": lambda key: jax.random.bernoulli(key, 0.3, (4, 33, 64)),
    "uint8": lambda key: jax.random.bits(key, (64, 64, 2), jnp.uint8),
    "uint16": lambda key: jax.random.bits(key, (9000,), jnp.uint16),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_random_numbers_are_the_same_bit_for_bit(draw):
    key = jax.random.key(11)
    closed = inline_calls(jax.make_jaxpr(DRAWS[draw])(key))
    changed, count = lowered_by(closed, random_bits.CHOOSER)
    assert count == 1
    got = jax.jit(lambda key: eval_jaxpr(changed.jaxpr, changed.consts, key)[0])(key)
    np.testing.assert_array_equal(got, jax.jit(DRAWS[draw])(key))
    keys = jax.random.split(key, 3)
    fast = jax.vmap(optimize(DRAWS[draw], target="cpu"))(keys)
    np.testing.assert_array_equal(fast, jax.vmap(DRAWS[draw])(keys))


def test_few_bits_other_generators_and_other_settings_are_left_alone():
    def count(key, shape):
        closed = inline_calls(jax.make_jaxpr(lambda key: jax.random.bits(key, shape))(key))
        return lowered_by(closed, random_bits.CHOOSER)[1]

    assert count(jax.random.key(0), (8,)) == 0
    assert count(jax.random.key(0, impl="rbg"), (8192,)) == 0
    with jax.threefry_partitionable(False):
        assert count(jax.random.key(0), (8192,)) == 0
    assert count(jax.random.key(0), (8192,)) == 1
