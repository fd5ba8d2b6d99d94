import jax
import jax.numpy as jnp
import pytest
from jax import lax

from fastgpu import ir
from fastgpu.hardware import device


def jaxpr_of(fn, *args):
    return jax.make_jaxpr(fn)(*args).jaxpr


def test_uses_count_every_reader():
    jaxpr = jaxpr_of(lambda x, y: (x * x, x + 1), 1.0, 2.0)
    x, y = jaxpr.invars
    assert (ir.uses(jaxpr)[x], ir.uses(jaxpr)[y]) == (3, 0)


def temporaries(fn, *args):
    return ir.temporary_bytes(ir.storage(jaxpr_of(fn, *args)), "cpu")


def test_a_stored_value_counts_until_its_last_reader_and_a_fused_one_never():
    x = jnp.ones((16, 16))

    def fn(x):
        kept = x @ x
        small = jnp.sum(jnp.cos(x @ kept))
        return jnp.sum(jnp.sin(kept) * small)

    # Both products while the second is summed; neither cos nor sin takes memory.
    assert max(temporaries(fn, x)) == 2 * 1024 + 4


def test_a_nested_program_adds_what_it_needs_inside():
    def body(carry, x):
        return carry + jnp.sum(jnp.outer(x, x) @ jnp.outer(x, x)), None

    peak = max(temporaries(lambda xs: lax.scan(body, 0.0, xs)[0], jnp.ones((8, 64))))
    assert peak >= 2 * 64 * 64 * 4


@pytest.mark.parametrize(
    ("fn", "shapes", "flops"),
    [
        (jnp.matmul, [(8, 32), (32, 16)], 2 * 8 * 32 * 16),
        (jnp.matmul, [(5, 8, 32), (5, 32, 16)], 5 * 2 * 8 * 32 * 16),
        (jnp.add, [(10,), (10,)], 10),
        (lambda x: jnp.transpose(x), [(3, 4)], 0),
        (lambda x: jnp.sum(x), [(3, 4)], 12),
        (lambda x: lax.map(jnp.sin, x), [(7, 4)], 28),
    ],
)
def test_flops_follow_the_definitions(fn, shapes, flops):
    cost = ir.program_cost(jaxpr_of(fn, *(jnp.ones(shape) for shape in shapes)))
    assert cost.flops == flops


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_a_convolution_and_its_gradients_cost_the_same(stride, groups):
    # Each multiplies every input of every window once: the definition of all three.
    x, w = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4 // groups, 8))

    def conv(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    forward = ir.equation_cost(jaxpr_of(conv, x, w).eqns[0]).flops
    out = conv(x, w)
    assert forward == 2 * out.size * 9 * 4 // groups
    gradients = [
        ir.equation_cost(eqn).flops
        for eqn in jaxpr_of(lambda x, w: jax.vjp(conv, x, w)[1](out), x, w).eqns
        if eqn.primitive.name == "conv_general_dilated"
    ][1 - 3 :]
    assert gradients == pytest.approx([forward, forward], rel=0.35)


def test_roofline_takes_the_slower_of_arithmetic_and_memory():
    h100 = device("h100")
    (dot,) = jaxpr_of(jnp.matmul, jnp.ones((4096, 4096)), jnp.ones((4096, 4096))).eqns
    (add,) = jaxpr_of(lambda x: x + 1, jnp.ones((4096, 4096))).eqns
    assert ir.roofline_seconds(dot, h100) == pytest.approx(2 * 4096**3 / 494.5e12)
    assert ir.roofline_seconds(add, h100) == pytest.approx(2 * 4096**2 * 4 / 3.35e12, rel=1e-3)
