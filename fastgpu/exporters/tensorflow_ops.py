"""The operations that TensorFlow's copy of XLA cannot run: rewritten by rule, or refused by name.

JAX writes StableHLO of a newer version than TensorFlow reads. Nine operations changed in between,
so a model that uses one saves without complaint and fails when TensorFlow first calls it. Each is
rewritten here to operations that both sides know. What remains are calls into libraries that only
JAX has (LAPACK, cuSOLVER, Python callbacks); these are refused before anything is written.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu import ir
from fastgpu.errors import ExportError
from fastgpu.ir.compat import ClosedJaxpr, Jaxpr, JaxprEqn, source_line, sub_jaxprs

# Lowered to a library call on at least one platform, or not at all; measured with TensorFlow 2.21.
REFUSED = frozenset(
    {
        "cholesky",
        "cholesky_update",
        "svd",
        "eigh",
        "eig",
        "lu",
        "lu_pivots_to_permutation",
        "qr",
        "householder_product",
        "schur",
        "hessenberg",
        "triangular_solve",
        "tridiagonal",
        "tridiagonal_solve",
        "symmetric_product",
        "ragged_dot_general",
        "composite",
        "pallas_call",
        "ffi_call",
        "pure_callback",
        "io_callback",
        "debug_callback",
        "debug_print",
    }
)
# Custom calls that are part of StableHLO's own conventions rather than of a library.
_KNOWN_CUSTOM_CALLS = re.compile(
    r"shape_assertion|ApproxTopK|Sharding|SPMD\w+|annotate_device_placement|(stablehlo|mhlo)\..+"
)
_FIX = (
    "compute this step outside of the exported function, or replace it by matrix products and"
    " elementwise operations (a fixed number of Newton iterations, for an inverse)"
)


def runnable_in_tensorflow(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` without the operations that TensorFlow cannot run, rewritten whenever it is traced.

    Raises `ExportError`, when traced, if an operation has no portable form: the message names the
    operation and the line of the user's program that it comes from.

    >>> fn = runnable_in_tensorflow(lambda x: lax.erf(x) + 1)
    >>> jaxpr = jax.make_jaxpr(fn)(jnp.zeros(3))
    >>> "erf " in str(jaxpr)
    False
    """

    def portable(*args: Any) -> Any:
        traced = ir.trace(fn, *args)
        refuse_unknown_operations(traced.closed_jaxpr)
        return traced.with_jaxpr(ir.rewrite(traced.closed_jaxpr, PORTABLE_FORMS)).as_fun()(*args)

    portable.__name__ = getattr(fn, "__name__", type(fn).__name__)
    return portable


def refuse_unknown_operations(closed: ClosedJaxpr) -> None:
    """Raise `ExportError` naming the first operation that TensorFlow has no code for.

    >>> closed = jax.make_jaxpr(jnp.linalg.cholesky)(jnp.eye(3))
    >>> refuse_unknown_operations(closed)
    Traceback (most recent call last):
    ...
    fastgpu.errors.ExportError: TensorFlow cannot run 'cholesky'
    """
    for eqn, line in _with_lines(closed.jaxpr, "an unknown line"):
        name = eqn.primitive.name
        if name in REFUSED or (name in PORTABLE_FORMS and _is_complex(eqn)):
            kind = " of complex numbers" if name in PORTABLE_FORMS else ""
            raise ExportError(
                f"TensorFlow cannot run '{name}'{kind}",
                expected="operations that StableHLO and TensorFlow's XLA both have",
                got=f"'{name}' at {line}",
                fix=_FIX,
            )


def _with_lines(jaxpr: Jaxpr, outer: str) -> Iterator[tuple[JaxprEqn, str]]:
    """Every equation with its source line; JAX's own jitted functions have that of their call."""
    for eqn in jaxpr.eqns:
        line = source_line(eqn) or outer
        yield eqn, line
        for sub in sub_jaxprs(eqn):
            yield from _with_lines(sub, line)


def refuse_unknown_calls(stablehlo: str) -> None:
    """Raise `ExportError` naming the custom calls in a module's text that TensorFlow does not have.

    >>> refuse_unknown_calls('stablehlo.custom_call @lapack_spotrf_ffi(%0)')
    Traceback (most recent call last):
    ...
    fastgpu.errors.ExportError: TensorFlow cannot run the library call 'lapack_spotrf_ffi'
    """
    called = set(re.findall(r'custom_call @"?([^"(\s]+)', stablehlo))
    if unknown := sorted(name for name in called if not _KNOWN_CUSTOM_CALLS.fullmatch(name)):
        raise ExportError(
            f"TensorFlow cannot run the library call {', '.join(map(repr, unknown))}",
            expected="operations that StableHLO and TensorFlow's XLA both have",
            got="a call into a library that only JAX brings",
            fix=_FIX,
        )


def _is_complex(eqn: JaxprEqn) -> bool:
    return jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.complexfloating)  # pyright: ignore


def erf(x: jax.Array) -> jax.Array:
    """Error function: W. J. Cody's rational form (Cephes `ndtr.c`) to 1, `1 - erfc` beyond.

    Relative error about 2e-7 in float32 and 1e-15 in float64. Gradients are not meant to be taken.
    """
    z = x * x
    top = jnp.full_like(x, 9.60497373987051638749e0)
    for coefficient in (
        9.00260197203842689217e1,
        2.23200534594684319226e3,
        7.00332514112805075473e3,
        5.55923013010394962768e4,
    ):
        top = top * z + coefficient
    bottom = jnp.ones_like(x)
    for coefficient in (
        3.35617141647503099647e1,
        5.21357949780152679795e2,
        4.59432382970980127987e3,
        2.26290000613890934246e4,
        4.92673942608635921086e4,
    ):
        bottom = bottom * z + coefficient
    return jnp.where(jnp.abs(x) < 1, x * top / bottom, 1 - lax.erfc(x))


def asin(x: jax.Array) -> jax.Array:
    """Arc sine; the product `(1 - x)(1 + x)` keeps the digits near the ends."""
    return lax.atan2(x, jnp.sqrt((1 - x) * (1 + x)))


def acos(x: jax.Array) -> jax.Array:
    """Arc cosine; the product `(1 - x)(1 + x)` keeps the digits near the ends."""
    return lax.atan2(jnp.sqrt((1 - x) * (1 + x)), x)


def asinh(x: jax.Array) -> jax.Array:
    """Inverse hyperbolic sine; the square is avoided where it would overflow."""
    a = jnp.abs(x)
    large = a > 1 / jnp.finfo(x.dtype).eps
    square = jnp.where(large, 0, a * a)
    small_result = jnp.log1p(a + square / (1 + jnp.sqrt(1 + square)))
    return jnp.copysign(jnp.where(large, jnp.log(a) + jnp.log(2.0), small_result), x)


def acosh(x: jax.Array) -> jax.Array:
    """Inverse hyperbolic cosine, written in `x - 1` so that it is exact near 1; NaN below 1."""
    large = x > 1 / jnp.finfo(x.dtype).eps
    t = jnp.where(large, 0, x - 1)
    result = jnp.where(large, jnp.log(x) + jnp.log(2.0), jnp.log1p(t + jnp.sqrt(t * (t + 2))))
    return jnp.where(x < 1, jnp.nan, result)


def atanh(x: jax.Array) -> jax.Array:
    """Inverse hyperbolic tangent; the two logarithms never cancel, because their signs differ."""
    return 0.5 * (jnp.log1p(x) - jnp.log1p(-x))


def sinh(x: jax.Array) -> jax.Array:
    """Hyperbolic sine: `expm1` below 1; above, the half exponent, which overflows only with it."""
    a = jnp.abs(x)
    small = jnp.expm1(jnp.minimum(a, 1))
    half = jnp.exp(a / 2)
    large = 0.5 * half * half - 0.5 / half / half
    return jnp.copysign(jnp.where(a < 1, 0.5 * (small + small / (small + 1)), large), x)


def cosh(x: jax.Array) -> jax.Array:
    """Hyperbolic cosine by the half exponent, which overflows only where the result does."""
    half = jnp.exp(jnp.abs(x) / 2)
    return 0.5 * half * half + 0.5 / half / half


def top_k(x: jax.Array, *, k: int, axis: int) -> tuple[jax.Array, jax.Array]:
    """The `k` largest along `axis`, in order, and where they were; the first of equals comes first.

    XLA's `top_k` orders floats totally (NaN above infinity, 0 above -0), which is the order of
    their bits read as integers once the negative ones are turned around.
    """
    keys = x
    if jnp.issubdtype(x.dtype, jnp.floating):
        bits = lax.bitcast_convert_type(x, jnp.dtype(f"int{x.dtype.itemsize * 8}"))
        keys = jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)
    indices = lax.broadcasted_iota(jnp.int32, x.shape, axis)
    _, values, indices = lax.sort((~keys, x, indices), dimension=axis, num_keys=1, is_stable=True)
    return (
        lax.slice_in_dim(values, 0, k, axis=axis),
        lax.slice_in_dim(indices, 0, k, axis=axis),
    )


def _in_float32(form: Callable[[jax.Array], jax.Array]) -> ir.Rule:
    """A rule for an elementwise form: 16-bit floats are computed in float32, as XLA does."""

    def rule(_eqn: JaxprEqn) -> Callable[[jax.Array], jax.Array]:
        def apply(x: jax.Array) -> jax.Array:
            wide = jnp.promote_types(x.dtype, jnp.float32)
            return form(x.astype(wide)).astype(x.dtype)

        return apply

    return rule


def _top_k_rule(eqn: JaxprEqn) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    return lambda x: top_k(x, k=eqn.params["k"], axis=eqn.params["axis"])


PORTABLE_FORMS: dict[str, ir.Rule] = {
    "top_k": _top_k_rule,
    **{
        form.__name__: _in_float32(form)
        for form in (erf, asin, acos, asinh, acosh, atanh, sinh, cosh)
    },
}
