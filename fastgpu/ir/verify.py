"""Check that a rewritten jaxpr is well-typed and gives the original's numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.errors import VerificationError
from fastgpu.ir.compat import ClosedJaxpr, Tracer, check_jaxpr, eval_jaxpr


def verify(before: ClosedJaxpr, after: ClosedJaxpr, *, label: str = "rewrite", seed: int = 0):
    """Raise `VerificationError` unless `after` has `before`'s types and computes its numbers.

    Numbers are compared on random inputs: normal floats, small non-negative integers, seeded keys.
    The tolerance is that of sums taken in another order, relative to each output's largest element:
    512 units in the last place, or 8 for 16-bit dtypes, whose sums are kept in float32.

    >>> import jax
    >>> one, two = jax.make_jaxpr(lambda x: x + x)(1.0), jax.make_jaxpr(lambda x: 2 * x)(1.0)
    >>> verify(one, two)
    >>> verify(one, jax.make_jaxpr(lambda x: 3 * x)(1.0))
    Traceback (most recent call last):
    ...
    fastgpu.errors.VerificationError: rewrite changed output 0
    """
    verify_types(before, after, label=label)
    verify_numbers(before, after, label=label, seed=seed)


def verify_types(before: ClosedJaxpr, after: ClosedJaxpr, *, label: str) -> None:
    """Raise `VerificationError` when `after` is ill-typed or its inputs or outputs differ.

    >>> import jax
    >>> closed = jax.make_jaxpr(lambda x: x + 1)(1.0)
    >>> verify_types(closed, closed, label="nothing")
    """
    try:
        check_jaxpr(after.jaxpr)
    except Exception as error:
        raise VerificationError(f"{label} made an ill-typed jaxpr: {error}") from error
    for side in ("in_avals", "out_avals"):
        expected = [_type(aval) for aval in getattr(before, side)]
        got = [_type(aval) for aval in getattr(after, side)]
        if expected != got:
            raise VerificationError(
                f"{label} changed the program's {side}", expected=str(expected), got=str(got)
            )


def verify_numbers(before: ClosedJaxpr, after: ClosedJaxpr, *, label: str, seed: int = 0) -> None:
    """Raise `VerificationError` when the two give other numbers on the same random inputs.

    >>> import jax
    >>> closed = jax.make_jaxpr(lambda x: x + 1)(1.0)
    >>> verify_numbers(closed, closed, label="nothing")
    """
    rng = np.random.default_rng(seed)
    with jax.ensure_compile_time_eval():
        args = [_random(aval, rng) for aval in before.in_avals]
        consts: dict[int, Any] = {}
        results = [_evaluate(closed, args, consts, rng) for closed in (before, after)]
    for index, (expected, got) in enumerate(zip(*results, strict=True)):
        _compare(expected, got, f"{label} changed output {index}")


def _evaluate(
    closed: ClosedJaxpr, args: list[Any], consts: dict[int, Any], rng: np.random.Generator
) -> list[np.ndarray]:
    """Outputs as float64 or integer arrays; consts of an outer trace become random values too."""

    def concrete(const: Any) -> Any:
        if not isinstance(const, Tracer):
            return const
        return consts.setdefault(id(const), _random(jax.typeof(const), rng))

    values = [concrete(const) for const in closed.consts]
    outputs = jax.jit(lambda consts, args: eval_jaxpr(closed.jaxpr, consts, *args))(values, args)
    return [_as_numpy(output) for output in outputs]


def _random(aval: Any, rng: np.random.Generator) -> Any:
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), aval.shape)
        return keys
    if jnp.issubdtype(aval.dtype, jnp.floating) or jnp.issubdtype(aval.dtype, jnp.complexfloating):
        return jnp.asarray(rng.normal(size=aval.shape), aval.dtype)
    if aval.dtype == bool:
        return jnp.asarray(rng.integers(0, 2, size=aval.shape), bool)
    return jnp.asarray(rng.integers(0, 3, size=aval.shape), aval.dtype)


def _as_numpy(value: jax.Array) -> np.ndarray:
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return np.asarray(value)


def _compare(expected: np.ndarray, got: np.ndarray, message: str) -> None:
    if not jnp.issubdtype(expected.dtype, jnp.inexact):
        same = np.array_equal(expected, got)
        tolerance, error = 0.0, float(np.sum(expected != got))
    else:
        wide = np.complex128 if np.iscomplexobj(expected) else np.float64
        one, two = expected.astype(wide), got.astype(wide)
        finite = one[np.isfinite(one)]
        scale = float(np.max(np.abs(finite))) if finite.size else 0.0
        info = jnp.finfo(expected.dtype)
        tolerance = (8 if info.bits < 32 else 512) * float(info.eps) * scale
        same = np.allclose(one, two, rtol=0, atol=tolerance, equal_nan=True)
        error = float(np.nanmax(np.abs(one - two))) if one.size else 0.0
    if not same:
        raise VerificationError(
            message,
            expected=f"the original's numbers within {tolerance:.3g}",
            got=f"a largest difference of {error:.3g}",
            fix="drop the pass by name, and report the function",
        )


def _type(aval: Any) -> tuple[Any, Any]:
    return getattr(aval, "shape", None), getattr(aval, "dtype", None)
