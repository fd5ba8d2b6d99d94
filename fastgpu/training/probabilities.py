"""Models that end in a softmax or a sigmoid give probabilities where most losses take logits.

Keras models usually do. Here are Keras's own formulas for them, and a way to see from the program
whether a model is one: the last operation of its jaxpr.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fastgpu.ir import Traced
from fastgpu.ir.compat import Jaxpr, JaxprEqn, Var, sub_jaxprs

# keras.config.epsilon()
_EPSILON = 1e-7

_CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "checkpoint",
    "remat2",
)
# What may stand between a softmax and the output without making it something else.
_PASSES_ON = (
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "reshape",
    "squeeze",
    "stop_gradient",
    "transpose",
)


def sparse_categorical_crossentropy(probabilities: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of `probabilities` [..., classes] and integer `labels` [...]; returns [...].

    Normalized, then clipped to [1e-7, 1 - 1e-7], as `keras.losses` does on its JAX backend.

    >>> sparse_categorical_crossentropy(jnp.array([[0.5, 0.5], [0.0, 1.0]]), jnp.array([0, 1]))
    Array([6.9314718e-01, 1.1920929e-07], dtype=float32)
    """
    one_hot = jax.nn.one_hot(labels, probabilities.shape[-1], dtype=probabilities.dtype)
    return categorical_crossentropy(probabilities, one_hot)


def categorical_crossentropy(probabilities: jax.Array, labels: jax.Array) -> jax.Array:
    """As `sparse_categorical_crossentropy`, with `labels` [..., classes] one-hot or soft."""
    normalized = probabilities / jnp.sum(probabilities, axis=-1, keepdims=True)
    return -jnp.sum(labels * jnp.log(_clipped(normalized)), axis=-1)


def binary_crossentropy(probabilities: jax.Array, labels: jax.Array) -> jax.Array:
    """Elementwise cross-entropy of `probabilities` and `labels` (0 or 1) of one shape, clipped."""
    p = _clipped(probabilities)
    return -(labels * jnp.log(p) + (1 - labels) * jnp.log(1 - p))


FROM_PROBABILITIES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "softmax_cross_entropy_with_integer_labels": sparse_categorical_crossentropy,
    "softmax_cross_entropy": categorical_crossentropy,
    "sigmoid_binary_cross_entropy": binary_crossentropy,
}


def ends_in(traced: Traced) -> str | None:
    """ "softmax", "sigmoid" or None: what the first output of a traced function is.

    >>> from fastgpu import ir
    >>> x = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    >>> [ends_in(ir.trace(f, x)) for f in (jax.nn.softmax, jax.nn.sigmoid, jnp.tanh)]
    ['softmax', 'sigmoid', None]
    """
    jaxpr = traced.closed_jaxpr.jaxpr
    return _ends_in(jaxpr, jaxpr.outvars[0]) if jaxpr.outvars else None


def _ends_in(jaxpr: Jaxpr, output: Any) -> str | None:
    producers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    var = _see_through(output, producers)
    if var not in producers:
        return None
    eqn = producers[var]
    if eqn.primitive.name in _CALLS:
        inner = sub_jaxprs(eqn)[0]
        return _ends_in(inner, inner.outvars[eqn.outvars.index(var)])
    if eqn.primitive.name == "div" and _is_softmax(eqn, producers):
        return "softmax"
    return "sigmoid" if eqn.primitive.name == "logistic" else None


def _is_softmax(division: JaxprEqn, producers: dict[Any, JaxprEqn]) -> bool:
    """Whether it divides exponentials by their own sum."""
    numerator, total = (_see_through(var, producers) for var in division.invars)
    if numerator not in producers or total not in producers:
        return False
    return (
        producers[numerator].primitive.name == "exp"
        and producers[total].primitive.name == "reduce_sum"
        and _see_through(producers[total].invars[0], producers) is numerator
    )


def _see_through(var: Any, producers: dict[Any, JaxprEqn]) -> Var | None:
    """The variable that `var` is a cast or another shape of."""
    while isinstance(var, Var) and var in producers and producers[var].primitive.name in _PASSES_ON:
        var = producers[var].invars[0]
    return var if isinstance(var, Var) else None


def _clipped(probabilities: jax.Array) -> jax.Array:
    return jnp.clip(probabilities, _EPSILON, 1 - _EPSILON)
