"""Operators that read or write by index."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.importers.onnx.dtypes import checked_shape
from fastgpu.importers.onnx.operators.operator import axis_of, one_of, operator


def _counted(indices: Any, size: int, xp: ModuleType) -> Any:
    """Indices counted from the front; negative ones count from the end."""
    return xp.where(indices < 0, indices + size, indices)


@operator("Gather")
def gather(data: Any, indices: Any, *, axis: int = 0, xp: ModuleType) -> Any:
    """Slices by index along an axis."""
    axis = axis_of(axis, data.ndim)
    return xp.take(data, _counted(indices, data.shape[axis], xp), axis)


@operator("GatherElements")
def gather_elements(data: Any, indices: Any, *, axis: int = 0, xp: ModuleType) -> Any:
    """Elements by an index for each place of the result."""
    axis = axis_of(axis, data.ndim)
    places = list(xp.meshgrid(*map(xp.arange, indices.shape), indexing="ij", sparse=True))
    places[axis] = _counted(indices, data.shape[axis], xp)
    return data[tuple(places)]


@operator("GatherND")
def gather_nd(data: Any, indices: Any, *, batch_dims: int = 0, xp: ModuleType) -> Any:
    """Slices by a vector of indices each."""
    batch = data.shape[:batch_dims]
    lead = xp.meshgrid(*map(xp.arange, batch), indexing="ij", sparse=True) if batch else []
    extra = indices.ndim - 1 - batch_dims
    places = [place.reshape(place.shape + (1,) * extra) for place in lead]
    for i in range(indices.shape[-1]):
        places.append(_counted(indices[..., i], data.shape[batch_dims + i], xp))
    return data[tuple(places)]


def _write(target: Any, value: jax.Array, reduction: str) -> jax.Array:
    one_of("reduction", reduction, ("none", "add", "mul", "min", "max"))
    name = {"none": "set", "mul": "multiply"}.get(reduction, reduction)
    return getattr(target, name)(value)


@operator("ScatterElements", "Scatter")
def scatter_elements(
    data: jax.Array,
    indices: jax.Array,
    updates: jax.Array,
    *,
    axis: int = 0,
    reduction: str = "none",
) -> jax.Array:
    """Elements written by an index for each."""
    axis = axis_of(axis, data.ndim)
    places = list(jnp.meshgrid(*map(jnp.arange, indices.shape), indexing="ij", sparse=True))
    places[axis] = _counted(indices, data.shape[axis], jnp)
    return _write(data.at[tuple(places)], updates, reduction)


@operator("ScatterND")
def scatter_nd(
    data: Any, indices: Any, updates: Any, *, reduction: str = "none", xp: ModuleType
) -> Any:
    """Slices written by a vector of indices each."""
    places = tuple(_counted(indices[..., i], data.shape[i], xp) for i in range(indices.shape[-1]))
    if xp is np and reduction == "none":
        data = data.copy()
        data[places] = updates
        return data
    return _write(jnp.asarray(data).at[places], jnp.asarray(updates), reduction)


@operator("TensorScatter")
def tensor_scatter(
    past: jax.Array,
    update: jax.Array,
    write_indices: jax.Array | None = None,
    *,
    axis: int = -2,
    mode: str = "linear",
) -> jax.Array:
    """New entries of a cache, written from a place per example on; "circular" wraps around."""
    one_of("mode", mode, ("linear", "circular"))
    axis = axis_of(axis, past.ndim)
    size, count = past.shape[axis], update.shape[axis]
    first = jnp.zeros(past.shape[0], jnp.int32) if write_indices is None else write_indices
    places = first[:, None] + jnp.arange(count)
    places = places % size if mode == "circular" else places

    def one(cache: jax.Array, new: jax.Array, where: jax.Array) -> jax.Array:
        moved = jnp.moveaxis(cache, axis - 1, 0).at[where].set(jnp.moveaxis(new, axis - 1, 0))
        return jnp.moveaxis(moved, 0, axis - 1)

    return jax.vmap(one)(past, update, places)


@operator("OneHot", static=("depth",))
def one_hot(
    indices: jax.Array, depth: np.ndarray, values: jax.Array, *, axis: int = -1
) -> jax.Array:
    """The second of two values at each index, else the first."""
    (size,) = checked_shape(depth.astype(np.int64), "OneHot")
    checked_shape([*indices.shape, size], "OneHot")
    axis = axis_of(axis, indices.ndim + 1)
    index = jnp.expand_dims(_counted(indices, size, jnp), axis)
    positions = jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
    positions = positions.reshape((size,) + (1,) * (indices.ndim - axis))
    return jnp.where(index == positions.astype(index.dtype), values[1], values[0])


@operator("ReverseSequence")
def reverse_sequence(
    x: jax.Array, lengths: jax.Array, *, batch_axis: int = 1, time_axis: int = 0
) -> jax.Array:
    """The first steps of each example in reverse, as many as its length."""
    return reverse_steps(x, lengths, batch_axis, time_axis)


def reverse_steps(x: jax.Array, lengths: jax.Array, batch_axis: int, time_axis: int) -> jax.Array:
    """Gather the steps of each example from the end of its sequence."""
    steps = jnp.arange(x.shape[time_axis])
    index = jnp.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)
    index = index if batch_axis < time_axis else index.T
    others = tuple(axis for axis in range(x.ndim) if axis not in (batch_axis, time_axis))
    return jnp.take_along_axis(x, jnp.expand_dims(index, others), time_axis)


@operator("NonZero", static=("x",))
def nonzero(x: np.ndarray, *, xp: ModuleType) -> np.ndarray:
    """The places of what is not zero."""
    return np.array(np.nonzero(np.atleast_1d(x)), np.int64)


@operator("Compress", static=("condition",))
def compress(x: Any, condition: np.ndarray, *, axis: int | None = None, xp: ModuleType) -> Any:
    """The slices at which a condition holds."""
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis_of(axis, x.ndim))
    return xp.take(x, np.flatnonzero(condition[: x.shape[axis]]), axis)


@operator("Unique", static=("x",))
def unique(
    x: np.ndarray, *, axis: int | None = None, sorted: int = 1, xp: ModuleType
) -> tuple[np.ndarray, ...]:
    """The different values, where each occurs first, which one is where, and how often."""
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis_of(axis, x.ndim))
    values, first, inverse, counts = np.unique(x, True, True, True, axis=axis)
    inverse = inverse.reshape(-1)
    if not sorted:
        order = np.argsort(first)
        values, first, counts = np.take(values, order, axis), first[order], counts[order]
        inverse = np.argsort(order)[inverse]
    return values, first.astype(np.int64), inverse.astype(np.int64), counts.astype(np.int64)
