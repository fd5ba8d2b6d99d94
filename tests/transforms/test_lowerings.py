"""Convolutions and pooling by other code: what matches, what is left, and equal derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fastgpu import ir
from fastgpu.transforms.dataflow import depthwise, max_pool, pointwise, small_spatial

NHWC = ("NHWC", "HWIO", "NHWC")


def convolution(stride=1, padding="SAME", dilation=1, groups=1, layout=NHWC):
    def conv(x, w):
        spatial = x.ndim - 2
        return lax.conv_general_dilated(
            x,
            w,
            (stride,) * spatial,
            padding,
            rhs_dilation=(dilation,) * spatial,
            dimension_numbers=layout,
            feature_group_count=groups,
        )

    return conv


def array(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def matched(closed):
    """The primitives that other code stands for, and the convolutions that were left."""
    found = [eqn for eqn in ir.walk(closed) if eqn.primitive.name == "lowered"]
    left = [eqn for eqn in ir.walk(closed) if eqn.primitive.name == "conv_general_dilated"]
    return len(found), len(left)


def rewritten(fn, chooser):
    def wrapped(*args):
        traced = ir.trace(fn, *args)
        return traced.with_jaxpr(ir.lower_by(traced.closed_jaxpr, chooser)).as_fun()(*args)

    return wrapped


def derivatives(fn, args, every_kind):
    """Value, gradient, tangent; and under vmap, under vmap and gradient, and of second order."""
    every = tuple(range(len(args)))

    def loss(*args):
        return jnp.sum(jnp.sin(fn(*args)))

    gradient = jax.grad(loss, every)
    stacked = [jnp.stack([a, a * 0.5]) for a in args]
    first = (fn(*args), gradient(*args), jax.jvp(fn, args, args))
    if not every_kind:
        return first
    return (
        first,
        jax.vmap(gradient)(*stacked),
        jax.grad(lambda *a: jnp.sum(jnp.cos(jax.vmap(fn)(*a))), every)(*stacked),
        jax.grad(lambda *a: sum(jnp.sum(jnp.cos(g)) for g in gradient(*a)), every)(*args),
    )


def assert_same_derivatives(fn, args, chooser, every_kind=True, rtol=1e-5):
    expected = jax.jit(lambda args: derivatives(fn, args, every_kind))(args)
    got = jax.jit(lambda args: derivatives(rewritten(fn, chooser), args, every_kind))(args)
    for one, two in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        scale = float(jnp.max(jnp.abs(one)))
        # Sums of up to a few thousand products in another order: some tens of float32 ulps.
        np.testing.assert_allclose(two, one, rtol=0, atol=rtol * scale)


CASES = {
    "pointwise": (pointwise, convolution(), (2, 5, 4, 6), (1, 1, 6, 3)),
    "pointwise stride 2": (pointwise, convolution(2), (2, 5, 4, 6), (1, 1, 6, 3)),
    "pointwise valid stride 3": (pointwise, convolution(3, "VALID"), (2, 7, 7, 4), (1, 1, 4, 3)),
    "pointwise padded": (pointwise, convolution(1, ((1, 2), (0, 1))), (2, 4, 4, 3), (1, 1, 3, 5)),
    "pointwise channels first": (
        pointwise,
        convolution(layout=("NCHW", "OIHW", "NCHW")),
        (2, 6, 5, 4),
        (3, 6, 1, 1),
    ),
    "pointwise 1-d": (pointwise, convolution(layout=("NWC", "WIO", "NWC")), (2, 5, 6), (1, 6, 3)),
    "depthwise 3x3": (depthwise, convolution(groups=4), (2, 6, 5, 4), (3, 3, 1, 4)),
    "depthwise stride 2": (depthwise, convolution(2, groups=4), (2, 7, 6, 4), (3, 3, 1, 4)),
    "depthwise 5x5 valid": (
        depthwise,
        convolution(2, "VALID", groups=3),
        (2, 9, 8, 3),
        (5, 5, 1, 3),
    ),
    "depthwise dilated": (depthwise, convolution(dilation=2, groups=4), (2, 7, 7, 4), (3, 3, 1, 4)),
    "depthwise multiplier": (depthwise, convolution(2, groups=3), (2, 6, 6, 3), (3, 3, 1, 6)),
    "depthwise channels first": (
        depthwise,
        convolution(groups=4, layout=("NCHW", "OIHW", "NCHW")),
        (2, 4, 6, 5),
        (4, 1, 3, 3),
    ),
    "depthwise 1-d": (
        depthwise,
        convolution(2, groups=4, layout=("NWC", "WIO", "NWC")),
        (2, 9, 4),
        (3, 1, 4),
    ),
    "small spatial": (small_spatial, convolution(), (2, 4, 4, 512), (3, 3, 512, 512)),
    "small spatial stride 2": (small_spatial, convolution(2), (2, 4, 4, 512), (3, 3, 512, 512)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_convolution_keeps_every_derivative(case):
    module, conv, x_shape, w_shape = CASES[case]
    args = (array(x_shape), array(w_shape, 1) / np.sqrt(np.prod(w_shape[:-1])))
    closed = jax.make_jaxpr(rewritten(conv, module.CHOOSER))(*args)
    assert matched(closed) == (1, 0)
    every_kind = case in ("pointwise stride 2", "depthwise 3x3", "small spatial")
    assert_same_derivatives(conv, args, module.CHOOSER, every_kind)


@pytest.mark.parametrize("case", [name for name in CASES if "multiplier" not in name])
def test_gradients_that_are_already_taken_are_matched_too(case):
    # A pass over jax.grad(user's loss) finds the gradient's convolutions as they stand there.
    module, conv, x_shape, w_shape = CASES[case]
    args = (array(x_shape), array(w_shape, 1))
    gradient = jax.grad(lambda x, w: jnp.sum(jnp.sin(conv(x, w))), (0, 1))
    before = jax.make_jaxpr(gradient)(*args)
    after = ir.lower_by(before, module.CHOOSER)
    assert matched(before) == (0, 3)
    assert matched(after) == (3, 0)
    ir.verify(before, after)


@pytest.mark.parametrize(
    ("chooser", "conv", "x_shape", "w_shape"),
    [
        (pointwise, convolution(), (2, 8, 8, 4), (3, 3, 4, 8)),
        (pointwise, convolution(groups=2), (2, 8, 8, 4), (1, 1, 2, 8)),
        (depthwise, convolution(), (2, 8, 8, 4), (3, 3, 4, 8)),
        (depthwise, convolution(groups=2), (2, 8, 8, 4), (3, 3, 2, 4)),
        (depthwise, convolution(groups=4), (2, 16, 16, 4), (9, 9, 1, 4)),
        (depthwise, convolution(), (2, 8, 8, 1), (3, 3, 1, 1)),
        (small_spatial, convolution(), (2, 8, 8, 512), (3, 3, 512, 512)),
        (small_spatial, convolution(), (2, 4, 4, 64), (3, 3, 64, 64)),
    ],
)
def test_what_does_not_pay_is_left_alone(chooser, conv, x_shape, w_shape):
    closed = jax.make_jaxpr(conv)(array(x_shape), array(w_shape))
    assert str(ir.lower_by(closed, chooser.CHOOSER)) == str(closed)


@pytest.mark.parametrize("chooser", [pointwise, depthwise, small_spatial])
def test_integer_and_symbolic_convolutions_are_left_alone(chooser):
    integers = jnp.ones((1, 4, 4, 2), jnp.int32), jnp.ones((1, 1, 2, 3), jnp.int32)
    closed = jax.make_jaxpr(convolution())(*integers)
    assert matched(ir.lower_by(closed, chooser.CHOOSER)) == (0, 1)
    (batch,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((batch, 4, 4, 2), jnp.float32)
    closed = jax.make_jaxpr(convolution())(x, jnp.ones((1, 1, 2, 3)))
    assert matched(ir.lower_by(closed, chooser.CHOOSER)) == (0, 1)


@pytest.mark.parametrize("case", ["pointwise", "depthwise 3x3", "small spatial"])
def test_sixteen_bit_sums_are_kept_in_float32(case):
    module, conv, x_shape, w_shape = CASES[case]
    x, w = array(x_shape, dtype=jnp.bfloat16), array(w_shape, 1, jnp.bfloat16)
    exact = conv(x.astype(jnp.float32), w.astype(jnp.float32))
    got = jax.jit(rewritten(conv, module.CHOOSER))(x, w)
    assert got.dtype == jnp.bfloat16
    # One rounding of the exact sum to bfloat16: half an ulp is 2^-9 of the value.
    np.testing.assert_allclose(
        got.astype(jnp.float32), exact, rtol=2**-8, atol=1e-5 * float(jnp.max(jnp.abs(exact)))
    )


# ---- max-pool


def pool(window, stride, padding=0, initial=-jnp.inf):
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))

    def max_pool_(x):
        dims, strides = (1, window, window, 1), (1, stride, stride, 1)
        return lax.reduce_window(x, initial, lax.max, dims, strides, sides)

    return max_pool_


POOLS = [(2, 2, 0), (3, 2, 1), (3, 1, 1), (3, 3, 0), (2, 3, 0)]


@pytest.mark.parametrize(("window", "stride", "padding"), POOLS)
def test_the_pool_keeps_every_derivative(window, stride, padding):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 5, (2, 9, 8, 3)), jnp.float32)
    every_kind = (window, stride) == (3, 2)
    assert_same_derivatives(pool(window, stride, padding), (x,), max_pool.DENSE_CHOOSER, every_kind)


@pytest.mark.parametrize(("window", "stride", "padding"), POOLS)
def test_ties_and_special_values_go_where_xla_sends_them(window, stride, padding):
    rng = np.random.default_rng(1)
    values = np.array([0.0, 1.0, 1.0, -np.inf, np.nan, 2.0], np.float32)
    x = jnp.asarray(rng.choice(values, size=(4, 9, 8, 3)))
    # Powers of two add up without rounding, so that the order of additions cannot show.
    ct = jnp.asarray(
        2.0 ** rng.integers(-3, 3, pool(window, stride, padding)(x).shape), jnp.float32
    )

    def gradient(x, ct):
        return jax.vjp(pool(window, stride, padding), x)[1](ct)[0]

    got = jax.jit(rewritten(gradient, max_pool.DENSE_CHOOSER))(x, ct)
    np.testing.assert_array_equal(got, jax.jit(gradient)(x, ct))


def test_no_select_and_scatter_is_left():
    x = array((2, 8, 8, 3))
    gradient = jax.grad(lambda x: jnp.sum(rewritten(pool(2, 2), max_pool.CHOOSER)(x) ** 2))
    assert "select_and_scatter" not in jax.jit(gradient).lower(x).as_text()


def test_a_cpu_scatters_where_windows_lie_at_every_position():
    closed = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(pool(3, 1, 1)(x) ** 2)))(array((2, 8, 8, 3)))
    names = [
        e.params["of"].name
        for e in ir.lower_by(closed, max_pool.CHOOSER).jaxpr.eqns
        if e.primitive.name == "lowered"
    ]
    assert names == ["reduce_window_max"]


def test_a_minimum_and_a_sum_are_left_alone():
    for reduce, initial in ((lax.min, jnp.inf), (lax.add, 0.0)):

        def fn(x, reduce=reduce, initial=initial):
            return lax.reduce_window(x, initial, reduce, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

        closed = jax.make_jaxpr(jax.grad(lambda x, fn=fn: jnp.sum(fn(x) ** 2)))(array((1, 4, 4, 2)))
        assert matched(ir.lower_by(closed, max_pool.CHOOSER))[0] == 0
