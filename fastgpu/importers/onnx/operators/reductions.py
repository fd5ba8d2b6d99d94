"""Operators that reduce axes, accumulate along them, or order what is on them."""

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.importers.onnx.dtypes import in_use, is_float
from fastgpu.importers.onnx.operators.operator import axes_of, axis_of, operator

Reduction = Callable[[ModuleType, Any, tuple[int, ...] | None, bool], Any]


def _sum(xp: ModuleType, x: Any, axes: Any, keep: bool) -> Any:
    return xp.sum(x, axes, keepdims=keep, dtype=x.dtype)


def _log_sum_exp(xp: ModuleType, x: Any, axes: Any, keep: bool) -> Any:
    floating = x if is_float(x.dtype) else x.astype("float32")
    return jax.nn.logsumexp(jnp.asarray(floating), axes, keepdims=keep).astype(x.dtype)


def _extreme(function: str) -> Reduction:
    def reduce(xp: ModuleType, x: Any, axes: Any, keep: bool) -> Any:
        # nothing to compare: the value that every other one replaces
        if is_float(x.dtype):
            least = xp.asarray(-np.inf if function == "max" else np.inf, x.dtype)
        elif x.dtype == bool:
            return (xp.any if function == "max" else xp.all)(x, axes, keepdims=keep)
        else:
            limits = np.iinfo(x.dtype)
            least = xp.asarray(limits.min if function == "max" else limits.max, x.dtype)
        return getattr(xp, function)(x, axes, keepdims=keep, initial=least)

    return reduce


_REDUCTIONS: dict[str, Reduction] = {
    "ReduceL1": lambda xp, x, axes, keep: _sum(xp, xp.abs(x), axes, keep),
    "ReduceL2": lambda xp, x, axes, keep: xp.sqrt(_sum(xp, x * x, axes, keep)).astype(x.dtype),
    "ReduceLogSum": lambda xp, x, axes, keep: xp.log(_sum(xp, x, axes, keep)).astype(x.dtype),
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceMax": _extreme("max"),
    "ReduceMin": _extreme("min"),
    "ReduceMean": lambda xp, x, axes, keep: xp.mean(x, axes, keepdims=keep).astype(x.dtype),
    "ReduceProd": lambda xp, x, axes, keep: xp.prod(x, axes, keepdims=keep, dtype=x.dtype),
    "ReduceSum": _sum,
    "ReduceSumSquare": lambda xp, x, axes, keep: _sum(xp, x * x, axes, keep),
}


def _reduction(reduce: Reduction, by_input_since: int, name: str) -> None:
    """Enter a reduction: its axes are an attribute in older opsets, an input in newer ones."""

    def by_attribute(
        x: Any, *, axes: Sequence[int] | None = None, keepdims: int = 1, xp: ModuleType
    ) -> Any:
        return reduce(xp, x, None if axes is None else axes_of(axes, x.ndim), bool(keepdims))

    def by_input(
        x: Any,
        axes: np.ndarray | None = None,
        *,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
        xp: ModuleType,
    ) -> Any:
        none = axes is None or axes.size == 0
        if none and noop_with_empty_axes:
            # no axis is reduced, but what is done to each element still is
            return reduce(xp, x, (), True)
        return reduce(xp, x, None if none else axes_of(axes, x.ndim), bool(keepdims))

    operator(name)(by_attribute)
    operator(name, since=by_input_since, static=("axes",))(by_input)


for _name, _reduce in _REDUCTIONS.items():
    _reduction(_reduce, 13 if _name == "ReduceSum" else 18, _name)


def _extreme_index(function: str) -> Callable[..., Any]:
    def compute(
        x: Any, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0, xp: ModuleType
    ) -> Any:
        axis = axis_of(axis, x.ndim)
        searched = xp.flip(x, axis) if select_last_index else x
        found = getattr(xp, function)(searched, axis, keepdims=bool(keepdims))
        found = x.shape[axis] - 1 - found if select_last_index else found
        return found.astype(in_use(np.int64, xp))

    return compute


operator("ArgMax")(_extreme_index("argmax"))
operator("ArgMin")(_extreme_index("argmin"))


def _accumulation(function: str) -> Callable[..., Any]:
    def compute(
        x: Any, axis: np.ndarray, *, exclusive: int = 0, reverse: int = 0, xp: ModuleType
    ) -> Any:
        along = axis_of(axis.item(), x.ndim)
        x = xp.flip(x, along) if reverse else x
        if exclusive:
            first = xp.zeros_like if function == "cumsum" else xp.ones_like
            x = xp.concatenate(
                [
                    first(xp.take(x, xp.arange(min(1, x.shape[along])), along)),
                    xp.take(x, xp.arange(max(x.shape[along] - 1, 0)), along),
                ],
                along,
            )
        total = getattr(xp, function)(x, along, dtype=x.dtype)
        return xp.flip(total, along) if reverse else total

    return compute


operator("CumSum", static=("axis",))(_accumulation("cumsum"))
operator("CumProd", static=("axis",))(_accumulation("cumprod"))


@operator("TopK")
def top_k_by_attribute(x: jax.Array, *, k: int, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    """Opsets up to 9: k is an attribute."""
    return top_k_of(x, k, axis, True)


@operator("TopK", since=10, static=("k",))
def top_k(
    x: jax.Array, k: np.ndarray, *, axis: int = -1, largest: int = 1, sorted: int = 1
) -> tuple[jax.Array, jax.Array]:
    """The k largest or smallest values along an axis, in order, and where they are."""
    return top_k_of(x, int(k.reshape(())), axis, bool(largest))


def top_k_of(x: jax.Array, k: int, axis: int, largest: bool) -> tuple[jax.Array, jax.Array]:
    """By a stable sort: of equal values the first comes first."""
    axis = axis_of(axis, x.ndim)
    if not 0 <= k <= x.shape[axis]:
        raise ValueError(f"k={k} of an axis of {x.shape[axis]}")
    order = jnp.argsort(x, axis, stable=True, descending=largest)
    order = jax.lax.slice_in_dim(order, 0, k, axis=axis)
    return jnp.take_along_axis(x, order, axis), order.astype(in_use(np.int64, jnp))


@operator("Hardmax")
def hardmax_from(x: jax.Array, *, axis: int = 1) -> jax.Array:
    """Opsets up to 12: over all axes from `axis` on."""
    return over_the_rest(lambda rows: hardmax(rows, axis=-1), x, axis)


@operator("Hardmax", since=13)
def hardmax(x: jax.Array, *, axis: int = -1) -> jax.Array:
    """One where the first largest value is, else zero."""
    place = jnp.argmax(x, axis, keepdims=True)
    positions = jax.lax.broadcasted_iota(place.dtype, x.shape, axis_of(axis, x.ndim))
    return (positions == place).astype(x.dtype)


@operator("Softmax")
def softmax_from(x: jax.Array, *, axis: int = 1) -> jax.Array:
    """Opsets up to 12: over all axes from `axis` on."""
    return over_the_rest(lambda rows: jax.nn.softmax(rows, -1), x, axis)


@operator("Softmax", since=13)
def softmax(x: jax.Array, *, axis: int = -1) -> jax.Array:
    """Exponentials that add up to one along an axis."""
    return jax.nn.softmax(x, axis)


@operator("LogSoftmax")
def log_softmax_from(x: jax.Array, *, axis: int = 1) -> jax.Array:
    """Opsets up to 12: over all axes from `axis` on."""
    return over_the_rest(lambda rows: jax.nn.log_softmax(rows, -1), x, axis)


@operator("LogSoftmax", since=13)
def log_softmax(x: jax.Array, *, axis: int = -1) -> jax.Array:
    """The logarithm of the softmax."""
    return jax.nn.log_softmax(x, axis)


def over_the_rest(function: Callable[[jax.Array], jax.Array], x: jax.Array, axis: int) -> jax.Array:
    """A function of rows, each of which holds all axes from `axis` on."""
    axis = axis if axis == x.ndim else axis_of(axis, x.ndim)
    rows = x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
    return function(rows).reshape(x.shape)


@operator("LpNormalization")
def lp_normalization(x: jax.Array, *, axis: int = -1, p: int = 2) -> jax.Array:
    """Divided by the norm along an axis; what has no length stays zero."""
    if p == 1:
        norm = jnp.sum(jnp.abs(x), axis, keepdims=True)
    elif p == 2:
        norm = jnp.sqrt(jnp.sum(x * x, axis, keepdims=True))
    else:
        raise ValueError(f"p={p} (expected 1 or 2)")
    return jnp.where(norm == 0, jnp.zeros_like(x), x / jnp.where(norm == 0, 1, norm))
