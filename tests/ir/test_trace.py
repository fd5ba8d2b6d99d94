import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpu import ir
from fastgpu.errors import TraceError


def test_a_traced_function_gives_back_the_same_function():
    def fn(a, *, b):
        return {"sum": a["x"] + b, "pair": (a["x"] * 2, b)}

    args = {"x": jnp.arange(3.0)}
    traced = ir.trace(fn, args, b=jnp.ones(3))
    again = traced.as_fun()(args, b=jnp.ones(3))
    expected = fn(args, b=jnp.ones(3))
    assert jax.tree.structure(again) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, again, expected)


def test_shapes_are_enough_to_trace():
    traced = ir.trace(jnp.sin, jax.ShapeDtypeStruct((4, 2), jnp.bfloat16))
    (out,) = traced.closed_jaxpr.out_avals
    assert (out.shape, out.dtype) == ((4, 2), jnp.bfloat16)


def test_an_output_that_is_no_array_is_named():
    with pytest.raises(TraceError, match=r"output leaf 1 of 'fn'(?s:.*)got: 'text'.*str"):

        def fn(x):
            return x, "text"

        ir.trace(fn, jnp.ones(3))


def test_other_arguments_than_the_traced_ones_are_refused():
    fun = ir.trace(lambda d: d["x"], {"x": jnp.ones(3)}).as_fun()
    with pytest.raises(TraceError, match=r"another structure(?s:.*)expected(?s:.*)got"):
        fun({"y": jnp.ones(3)})
