"""The export pass: nine operations that TensorFlow cannot read, and those it has no code for."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax import lax

from fastgpu import ir, models
from fastgpu.errors import ExportError
from fastgpu.exporters import tensorflow_ops
from fastgpu.exporters.tensorflow_ops import refuse_unknown_calls, runnable_in_tensorflow

_RNG = np.random.default_rng(0)
_ENDS = [0.0, -0.0, np.nan]
_WIDE = np.concatenate(
    [_RNG.normal(size=500) * scale for scale in (1e-30, 1e-6, 1e-3, 0.1, 1, 10, 80)]
    + [_ENDS, [np.inf, -np.inf, 88.9, -88.9, 1e30]]
)
_UNIT = np.concatenate(
    [_RNG.uniform(-1, 1, 2000), 1 - 10 ** _RNG.uniform(-7, -1, 500), _ENDS, [1, -1, 1.5, -1.5]]
)
_ABOVE_ONE = np.concatenate([1 + 10 ** _RNG.uniform(-7, 10, 2000), [1, 0.5, -3, -1e10, np.inf]])
_REFERENCE = {
    "erf": (_WIDE, scipy.special.erf),
    "asin": (_UNIT, np.arcsin),
    "acos": (_UNIT, np.arccos),
    "asinh": (_WIDE, np.arcsinh),
    "acosh": (_ABOVE_ONE, np.arccosh),
    "atanh": (_UNIT, np.arctanh),
    "sinh": (_WIDE, np.sinh),
    "cosh": (_WIDE, np.cosh),
}


@pytest.mark.parametrize("name", sorted(_REFERENCE))
@pytest.mark.parametrize(("dtype", "relative"), [(np.float32, 1e-6), (np.float64, 5e-14)])
def test_each_form_has_the_digits_of_its_dtype(name, dtype, relative):
    # A few units in the last place; XLA's own log1p has 1.6e-14 in float64, which atanh inherits.
    domain, reference = _REFERENCE[name]
    x = domain.astype(dtype)
    with np.errstate(all="ignore"):
        wanted = reference(x.astype(np.float64)).astype(dtype)
    with jax.enable_x64(dtype is np.float64):
        got = np.asarray(jax.jit(runnable_in_tensorflow(getattr(lax, name)))(x))
    assert got.dtype == dtype
    np.testing.assert_allclose(got, wanted, rtol=relative, atol=np.finfo(dtype).tiny)
    not_nan = ~np.isnan(wanted)
    np.testing.assert_array_equal(np.signbit(got)[not_nan], np.signbit(wanted)[not_nan])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16, jnp.int32, jnp.uint8])
@pytest.mark.parametrize("axis", [0, 1])
def test_top_k_orders_ties_as_xla_does(dtype, axis):
    x = jnp.asarray(np.random.default_rng(1).integers(0, 9, (12, 11)), dtype)
    values, indices = jax.jit(partial(tensorflow_ops.top_k, k=7, axis=axis))(x)
    wanted_values, wanted_indices = lax.top_k(x, 7, axis=axis)
    assert values.dtype == dtype
    np.testing.assert_array_equal(values, wanted_values)
    np.testing.assert_array_equal(indices, wanted_indices)


def test_top_k_orders_nan_and_signed_zeros_as_xla_does():
    x = jnp.array([0.0, -0.0, jnp.nan, 1.0, -jnp.nan, jnp.inf, -0.0, 0.0, -jnp.inf])
    np.testing.assert_array_equal(
        tensorflow_ops.top_k(x, k=9, axis=0)[1], lax.top_k(x, 9, axis=0)[1]
    )


def _primitives(fn, *args):
    return {eqn.primitive.name for eqn in ir.walk(jax.make_jaxpr(fn)(*args).jaxpr)}


def test_nested_programs_are_rewritten_and_nothing_else():
    def fn(x):
        x = jax.checkpoint(jnp.sinh)(jax.jit(lax.erf)(x))
        x, _ = lax.scan(lambda c, _: (jnp.arcsinh(c), None), x, length=3)
        x = lax.cond(x[0] > 0, jnp.cosh, jnp.arctanh, x)
        return lax.while_loop(lambda c: c[0] < 0, lambda c: lax.top_k(c, c.shape[0])[0], x)

    before = _primitives(fn, jnp.ones(4))
    after = _primitives(runnable_in_tensorflow(fn), jnp.ones(4))
    replaced = {"erf", "sinh", "asinh", "cosh", "atanh", "top_k"}
    assert replaced <= before
    assert not after & tensorflow_ops.PORTABLE_FORMS.keys()
    assert before - replaced <= after
    x = jnp.linspace(-0.9, 0.9, 4)
    rewritten = jax.jit(runnable_in_tensorflow(fn))
    np.testing.assert_allclose(rewritten(x), jax.jit(fn)(x), rtol=1e-6)


def test_a_function_without_such_operations_keeps_its_jaxpr():
    def fn(x):
        return jnp.tanh(x) @ x

    x = jnp.ones((3, 3))
    assert str(jax.make_jaxpr(runnable_in_tensorflow(fn))(x)) == str(jax.make_jaxpr(fn)(x))


def test_symbolic_sizes_stay_symbolic():
    shape = jax.export.symbolic_shape("batch, 5")
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    out, indices = jax.eval_shape(runnable_in_tensorflow(lambda x: lax.top_k(lax.erf(x), 2)), x)
    assert str(out.shape) == str(indices.shape) == "(batch, 2)"


@pytest.mark.parametrize("family", models.families())
def test_every_reference_model_has_a_portable_program_for_any_batch(family):
    model, x = models.tiny(family)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    shape = jax.export.symbolic_shape(f"batch, {', '.join(map(str, x.shape[1:]))}")
    exported = jax.export.export(
        jax.jit(runnable_in_tensorflow(model.apply)), platforms=("cpu", "cuda")
    )(variables, jax.ShapeDtypeStruct(shape, x.dtype))
    refuse_unknown_calls(exported.mlir_module())
    assert str(exported.out_avals[0].shape[0]) == "batch"


_SQUARE = jnp.eye(3)
_IMPOSSIBLE = {
    "cholesky": jnp.linalg.cholesky,
    "svd": jnp.linalg.svd,
    "eigh": jnp.linalg.eigh,
    "eig": jnp.linalg.eig,
    "lu": jnp.linalg.inv,
    "qr": jnp.linalg.qr,
    "triangular_solve": lambda x: jax.scipy.linalg.solve_triangular(x, x),
    "tridiagonal_solve": lambda x: lax.linalg.tridiagonal_solve(x[0], x[0], x[0], x[:, :1]),
    "ragged_dot_general": lambda x: lax.ragged_dot(x, x[None], jnp.array([3])),
    "pure_callback": lambda x: jax.pure_callback(np.sin, x, x),
    "debug_print": lambda x: jax.debug.print("{}", x),
}


@pytest.mark.parametrize("name", sorted(_IMPOSSIBLE))
def test_an_operation_without_a_portable_form_is_refused_by_name_and_line(name):
    def users_function(x):
        return _IMPOSSIBLE[name](x)

    with pytest.raises(ExportError, match=rf"cannot run '{name}'") as caught:
        jax.eval_shape(runnable_in_tensorflow(users_function), _SQUARE)
    message = str(caught.value)
    assert re.search(r"test_tensorflow_ops\.py:\d+", message)
    assert "expected:" in message and "to do:" in message


def test_a_complex_arc_sine_is_refused():
    with pytest.raises(ExportError, match="'asin' of complex numbers"):
        jax.eval_shape(runnable_in_tensorflow(lax.asin), jnp.ones(3, jnp.complex64))


def test_library_calls_are_refused_by_name_whatever_operation_they_come_from():
    refuse_unknown_calls("stablehlo.custom_call @shape_assertion(%0) custom_call @ApproxTopK(%1)")
    with pytest.raises(ExportError, match=r"'__cudnn\$fmha', 'lapack_sgesdd_ffi'"):
        refuse_unknown_calls(
            'custom_call @lapack_sgesdd_ffi(%0) custom_call @"__cudnn$fmha"(%1) custom_call'
        )
