import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fastgpu import ir
from fastgpu.errors import VerificationError

SIN_TO_COS = {"sin": lambda eqn: jnp.cos}


def primitives(closed):
    return [eqn.primitive.name for eqn in ir.walk(closed)]


@pytest.mark.parametrize(
    "fn",
    [
        jax.jit(jnp.sin),
        lambda x: lax.scan(lambda c, y: (c + jnp.sin(y), y), 0.0, x)[0],
        lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: jnp.sin(c) + 1, x),
        lambda x: lax.cond(x[0] > 0, jnp.sin, lambda y: y, x),
        lambda x: jax.checkpoint(jnp.sin)(x),
        lambda x: _custom_jvp_sin(x),
        lambda x: _custom_vjp_sin(x),
        lambda x: jax.jit(lambda y: lax.map(jax.checkpoint(jnp.sin), y))(x),
        lambda x: _summed_over_devices(x),
    ],
    ids=[
        *("jit", "scan", "while", "cond", "checkpoint", "custom_jvp", "custom_vjp", "nested"),
        "shard_map",
    ],
)
def test_rules_reach_every_nested_program(fn):
    closed = jax.make_jaxpr(fn)(jnp.ones(3))
    rewritten = ir.rewrite(closed, SIN_TO_COS)
    assert "sin" in primitives(closed) and "sin" not in primitives(rewritten)
    assert primitives(closed).count("sin") == primitives(rewritten).count("cos")


def _summed_over_devices(x):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("i")
    return jax.shard_map(
        lambda x: lax.psum(jnp.sin(x), "i"),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )(x)


@jax.custom_jvp
def _custom_jvp_sin(x):
    return jnp.sin(x)


_custom_jvp_sin.defjvps(lambda t, _, x: 3.0 * t)


@jax.custom_vjp
def _custom_vjp_sin(x):
    return jnp.sin(x)


_custom_vjp_sin.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (5.0 * ct,))


@pytest.mark.parametrize(("fn", "slope"), [(_custom_jvp_sin, 3.0), (_custom_vjp_sin, 5.0)])
def test_a_users_own_derivative_survives(fn, slope):
    closed = ir.rewrite(jax.make_jaxpr(lambda x: 2 * fn(x))(1.0), {"mul": lambda eqn: jnp.multiply})
    gradient = jax.grad(lambda x: jax.core.eval_jaxpr(closed.jaxpr, closed.consts, x)[0])(1.0)
    assert gradient == 2 * slope


def test_a_rule_that_declines_leaves_the_jaxpr_as_it_was():
    closed = jax.make_jaxpr(lambda x: jnp.sin(x) + 1)(jnp.ones(3))
    assert str(ir.rewrite(closed, {"sin": lambda eqn: None})) == str(closed)


def test_without_a_match_nothing_is_traced_again():
    closed = jax.make_jaxpr(jnp.cos)(1.0)
    assert ir.rewrite(closed, SIN_TO_COS) is closed


def test_a_rule_of_another_shape_is_refused_by_name():
    def halve(eqn):
        return lambda x: x[:1]

    with pytest.raises(VerificationError, match="'halve' replaced 'sin'"):
        ir.rewrite(jax.make_jaxpr(jnp.sin)(jnp.ones(4)), {"sin": halve})


def test_source_lines_and_name_scopes_stay_with_the_equations():
    def fn(x):
        with jax.named_scope("encoder"):
            return jnp.exp(jnp.sin(x))

    rewritten = ir.rewrite(jax.make_jaxpr(fn)(1.0), SIN_TO_COS)
    for eqn in rewritten.jaxpr.eqns:
        assert str(eqn.source_info.name_stack) == "encoder"
    assert "test_rewrite.py" in ir.to_text(rewritten)


def test_effects_are_kept_in_order():
    seen = []

    def fn(x):
        jax.debug.callback(lambda v: seen.append(float(v)), x, ordered=True)
        y = jnp.sin(x)
        jax.debug.callback(lambda v: seen.append(float(v)), y, ordered=True)
        return y

    closed = ir.rewrite(jax.make_jaxpr(fn)(1.0), {"sin": lambda eqn: lambda x: x + 1})
    assert closed.effects
    jax.jit(lambda x: jax.core.eval_jaxpr(closed.jaxpr, closed.consts, x))(1.0)
    jax.effects_barrier()
    assert seen == [1.0, 2.0]


def test_sharding_constraints_are_kept():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))

    def fn(x):
        return lax.with_sharding_constraint(jnp.sin(x), sharding)

    rewritten = ir.rewrite(jax.make_jaxpr(fn)(jnp.ones(4)), SIN_TO_COS)
    (kept,) = [e for e in rewritten.jaxpr.eqns if e.primitive.name == "sharding_constraint"]
    assert kept.params["sharding"] == sharding


def test_random_draws_are_the_same():
    def fn(key):
        return jnp.sin(jax.random.normal(key, (5,)))

    key = jax.random.key(3)
    closed = ir.rewrite(jax.make_jaxpr(fn)(key), {"sin": lambda eqn: jnp.sin})
    (got,) = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, key)
    np.testing.assert_array_equal(got, fn(key))
