"""Operators that draw random numbers, from the "dropout" stream or from a seed in the file."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.importers.onnx.dtypes import ELEMENT_TYPES, checked_shape, in_use
from fastgpu.importers.onnx.operators.operator import operator


def _dropped(x: jax.Array, rate: float, active: bool, seed: Any, call: Any) -> tuple[Any, Any]:
    if not active or rate == 0:
        return x, jnp.ones(x.shape, bool)
    keep = jax.random.bernoulli(call.key(seed), 1 - rate, x.shape)
    scaled = jnp.where(keep, x / (1 - rate), jnp.zeros_like(x)) if rate < 1 else jnp.zeros_like(x)
    return scaled.astype(x.dtype), keep


@operator("Dropout")
def dropout_by_attribute(
    x: jax.Array, *, is_test: int = 0, ratio: float = 0.5, call: Any
) -> tuple[Any, Any]:
    """Opsets up to 11: drops in training calls; in opset 6 always, unless the file says no."""
    always = call.opset < 7 and not is_test
    y, mask = _dropped(x, ratio, call.train or always, None, call)
    return y, mask if call.opset >= 10 else mask.astype(x.dtype)


@operator("Dropout", since=12, static=("ratio", "training_mode"))
def dropout(
    x: jax.Array,
    ratio: np.ndarray | None = None,
    training_mode: np.ndarray | None = None,
    *,
    seed: int | None = None,
    call: Any,
) -> tuple[Any, Any]:
    """Drops in training calls, and in every call if the file says that it trains."""
    rate = 0.5 if ratio is None else float(ratio.reshape(()))
    always = training_mode is not None and bool(training_mode.reshape(()))
    return _dropped(x, rate, call.train or always, None if call.train else seed, call)


def _normal(shape: Any, dtype: Any, mean: float, scale: float, seed: Any, call: Any) -> jax.Array:
    sizes, kind = checked_shape(shape, "RandomNormal"), in_use(dtype, jnp)
    return (jax.random.normal(call.key(seed), sizes, jnp.float32) * scale + mean).astype(kind)


def _uniform(shape: Any, dtype: Any, low: float, high: float, seed: Any, call: Any) -> jax.Array:
    sizes, kind = checked_shape(shape, "RandomUniform"), in_use(dtype, jnp)
    drawn = jax.random.uniform(call.key(seed), sizes, jnp.float32, low, high)
    return drawn.astype(kind)


@operator("RandomNormal")
def random_normal(
    *,
    dtype: int = 1,
    mean: float = 0.0,
    scale: float = 1.0,
    seed: float | None = None,
    shape: Sequence[int],
    call: Any,
) -> jax.Array:
    """Normal numbers in a given shape."""
    return _normal(shape, ELEMENT_TYPES[dtype], mean, scale, seed, call)


@operator("RandomNormalLike")
def random_normal_like(
    x: jax.Array,
    *,
    dtype: int | None = None,
    mean: float = 0.0,
    scale: float = 1.0,
    seed: float | None = None,
    call: Any,
) -> jax.Array:
    """Normal numbers in the shape of an array."""
    kind = x.dtype if dtype is None else ELEMENT_TYPES[dtype]
    return _normal(x.shape, kind, mean, scale, seed, call)


@operator("RandomUniform")
def random_uniform(
    *,
    dtype: int = 1,
    high: float = 1.0,
    low: float = 0.0,
    seed: float | None = None,
    shape: Sequence[int],
    call: Any,
) -> jax.Array:
    """Uniform numbers in a given shape."""
    return _uniform(shape, ELEMENT_TYPES[dtype], low, high, seed, call)


@operator("RandomUniformLike")
def random_uniform_like(
    x: jax.Array,
    *,
    dtype: int | None = None,
    high: float = 1.0,
    low: float = 0.0,
    seed: float | None = None,
    call: Any,
) -> jax.Array:
    """Uniform numbers in the shape of an array."""
    kind = x.dtype if dtype is None else ELEMENT_TYPES[dtype]
    return _uniform(x.shape, kind, low, high, seed, call)


@operator("Bernoulli")
def bernoulli(
    x: jax.Array, *, dtype: int | None = None, seed: float | None = None, call: Any
) -> jax.Array:
    """One with the probability that the array says, else zero."""
    kind = x.dtype if dtype is None else in_use(ELEMENT_TYPES[dtype], jnp)
    return jax.random.bernoulli(call.key(seed), x).astype(kind)


@operator("Multinomial")
def multinomial(
    x: jax.Array,
    *,
    dtype: int = 6,
    sample_size: int = 1,
    seed: float | None = None,
    call: Any,
) -> jax.Array:
    """Classes drawn by unnormalized log-probabilities."""
    checked_shape([x.shape[0], sample_size], "Multinomial")
    drawn = jax.random.categorical(call.key(seed), x, shape=(sample_size, x.shape[0]))
    return drawn.T.astype(in_use(ELEMENT_TYPES[dtype], jnp))
