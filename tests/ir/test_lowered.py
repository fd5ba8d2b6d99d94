"""An equation with other code keeps every derivative of the one that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpu import ir


def _choose(site):
    plain = site["dimension_numbers"] == (((1,), (0,)), ((), ()))
    return (lambda a, b: jnp.sum(a[:, :, None] * b[None], axis=1)) if plain else None


CHOOSER = ir.Chooser("elementwise", ("dot_general",), _choose)


def _product(a, b):
    return jnp.tanh(a @ b)


def _rewritten(a, b):
    traced = ir.trace(_product, a, b)
    return traced.with_jaxpr(ir.lower_by(traced.closed_jaxpr, CHOOSER)).as_fun()(a, b)


A = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
B = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)), jnp.float32)


def test_the_other_code_is_what_runs():
    text = jax.jit(_rewritten).lower(A, B).as_text()
    assert "dot_general" not in text and "dot_general" in jax.jit(_product).lower(A, B).as_text()


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f,
        lambda f: jax.jacrev(f, (0, 1)),
        lambda f: jax.jacfwd(f, (0, 1)),
        lambda f: jax.hessian(lambda a, b: jnp.sum(f(a, b)), (0, 1)),
        lambda f: lambda a, b: jax.linearize(f, a, b)[1](a, b),
        lambda f: jax.grad(
            lambda a, b: jnp.sum(jax.vmap(f)(jnp.stack([a, 2 * a]), jnp.stack([b, b])))
        ),
        lambda f: jax.vmap(jax.grad(lambda a, b: jnp.sum(f(a[None], b))), (0, None)),
        lambda f: jax.grad(lambda a, b: jnp.sum(jax.checkpoint(f)(a, b))),
        lambda f: jax.grad(
            lambda a, b: jax.lax.scan(lambda c, row: (c + jnp.sum(f(row[None], b)), None), 0.0, a)[
                0
            ]
        ),
    ],
)
def test_transformations_see_the_original(transform):
    expected = jax.jit(transform(_product))(A, B)
    got = jax.jit(transform(_rewritten))(A, B)
    jax.tree.map(lambda e, g: np.testing.assert_allclose(g, e, rtol=2e-5, atol=2e-6), expected, got)


def test_it_runs_without_jit():
    np.testing.assert_allclose(_rewritten(A, B), _product(A, B), rtol=1e-6)


def test_it_is_priced_and_printed_as_the_equation_it_stands_for():
    closed = jax.make_jaxpr(_rewritten)(A, B)
    (eqn,) = [eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name == "lowered"]
    assert ir.stands_for(eqn)[0] == "dot_general"
    assert ir.equation_cost(eqn).flops == 2 * 3 * 4 * 5
    assert "dot_general by elementwise" in ir.to_text(closed)
