"""Operators that reduce windows of spatial axes, and the inverse of one of them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.importers.onnx.dtypes import checked_shape, in_use, is_float
from fastgpu.importers.onnx.operators.operator import operator
from fastgpu.importers.onnx.operators.windows import Windows, per_axis, windows


def _reduced(x: jax.Array, over: Windows, start: Any, combine: Any) -> jax.Array:
    return jax.lax.reduce_window(
        x,
        start,
        combine,
        (1, 1, *over.kernel),
        (1, 1, *over.strides),
        ((0, 0), (0, 0), *over.padding),
        window_dilation=(1, 1, *over.dilations),
    )


@operator("AveragePool")
def average_pool(
    x: jax.Array,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> jax.Array:
    """Means of windows; padding counts only if the attribute says so."""
    over = windows(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    total = _reduced(x, over, x.dtype.type(0), jax.lax.add)
    return total / jnp.asarray(over.counts(bool(count_include_pad), x.shape[2:]), x.dtype)


@operator("MaxPool")
def max_pool(
    x: jax.Array,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
    call: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Maxima of windows and, if it is read, where in the image each one was."""
    over = windows(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    least = -np.inf if is_float(x.dtype) else np.iinfo(x.dtype).min
    if len(call.outputs) == 1:
        return _reduced(x, over, x.dtype.type(least), jax.lax.max)
    # padding is never chosen: of equal values the first wins, so it has to lose by its place
    real = over.patches(jnp.ones(x.shape, bool), False)
    patches = over.patches(x, x.dtype.type(least))
    chosen = jnp.argmax(jnp.where(real, patches, x.dtype.type(least)), -1)
    values = jnp.take_along_axis(patches, chosen[..., None], -1)[..., 0]
    numbers = np.arange(np.prod(x.shape, dtype=np.int64)).reshape(x.shape)
    if storage_order:
        spatial = np.arange(np.prod(x.shape[2:], dtype=np.int64)).reshape(x.shape[2:], order="F")
        first = numbers.reshape(*x.shape[:2], -1)[..., :1].reshape(
            *x.shape[:2], *(1,) * (x.ndim - 2)
        )
        numbers = first + spatial
    places = over.patches(jnp.asarray(numbers, in_use(np.int64, jnp)), 0)
    return values, jnp.take_along_axis(places, chosen[..., None], -1)[..., 0]


@operator("MaxUnpool", static=("output_shape",))
def max_unpool(
    x: jax.Array,
    indices: jax.Array,
    output_shape: np.ndarray | None = None,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> jax.Array:
    """Maxima put back to where they were; everything else is zero."""
    rank = x.ndim - 2
    strides, both = per_axis(strides, rank, 1), per_axis(pads, 2 * rank, 0)
    natural = [
        (x.shape[2 + i] - 1) * strides[i] + kernel_shape[i] - both[i] - both[rank + i]
        for i in range(rank)
    ]
    inner = checked_shape([*x.shape[:2], *natural], "MaxUnpool")
    flat = jnp.zeros(int(np.prod(inner)), x.dtype).at[indices.reshape(-1)].set(x.reshape(-1))
    if output_shape is None:
        return flat.reshape(inner)
    # indices count in the natural shape; a larger one is padded behind
    outer = checked_shape(output_shape, "MaxUnpool")
    return jnp.pad(flat.reshape(inner), [(0, b - a) for a, b in zip(inner, outer, strict=True)])


@operator("LpPool")
def lp_pool(
    x: jax.Array,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int],
    p: int = 2,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> jax.Array:
    """p-norms of windows."""
    over = windows(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    return _reduced(jnp.abs(x) ** p, over, x.dtype.type(0), jax.lax.add) ** (1 / p)


@operator("GlobalAveragePool")
def global_average_pool(x: jax.Array) -> jax.Array:
    """The mean of all positions."""
    return jnp.mean(x, range(2, x.ndim), keepdims=True)


@operator("GlobalMaxPool")
def global_max_pool(x: jax.Array) -> jax.Array:
    """The maximum of all positions."""
    return jnp.max(x, range(2, x.ndim), keepdims=True)


@operator("GlobalLpPool")
def global_lp_pool(x: jax.Array, *, p: int = 2) -> jax.Array:
    """The p-norm of all positions."""
    return jnp.sum(jnp.abs(x) ** p, range(2, x.ndim), keepdims=True) ** (1 / p)
