"""Max-pool gradients by comparing each window's elements, instead of select-and-scatter.

XLA's CPU backend scatters one element at a time; its GPU backend first writes each window's winner
as an index into every dimension, more bytes than the pool's own values. The gradient of a max-pool
is the cotangent at the first largest element of each window: a handful of comparisons finds its
index, and every tap then adds the cotangents that it won (`benchmarks/lowerings.py`). The index
follows XLA's own rule for ties and for NaN, so the result is bit-equal where windows do not
overlap.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu.ir.lowered import Chooser, Site

# Each tap is an operation of its own: a larger window would make programs long to compile.
_MOST_TAPS = 64


def choose(site: Site, dense: bool) -> Callable[..., jax.Array] | None:
    """Code for a max-pool or its derivative in either direction; `None` for any other reduction.

    Windows at every position (stride 1) are left alone unless `dense`.
    """
    if site.primitive.name == "reduce_window_max":
        # The forward pass is good as it is: it is claimed so that its derivative comes here too.
        return partial(site.primitive.bind, **dict(site.params))
    operand = site.in_avals[1]
    sizes = (*operand.shape, *site.in_avals[0].shape)
    if str(site["select_prim"]) != "ge" or not jnp.issubdtype(operand.dtype, jnp.floating):
        return None
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    if not 1 < math.prod(site["window_dimensions"]) <= _MOST_TAPS:
        return None
    if not dense and all(stride == 1 for stride in site["window_strides"]):
        return None
    if site.primitive.name == "select_and_scatter_add":
        return lambda source, operand: _scatter(_Pool(site), source, operand)
    undilated = all(d == 1 for d in (*site["base_dilation"], *site["window_dilation"]))
    return (lambda t, operand: _gather(_Pool(site), t, operand)) if undilated else None


class _Pool:
    def __init__(self, site: Site) -> None:
        self.window: tuple[int, ...] = site["window_dimensions"]
        self.strides: tuple[int, ...] = site["window_strides"]
        self.padding: tuple[tuple[int, int], ...] = site["padding"]

    def taps(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*(range(size) for size in self.window))

    def pad(self, x: jax.Array, value: float) -> jax.Array:
        if all(low == high == 0 for low, high in self.padding):
            return x
        return lax.pad(x, jnp.asarray(value, x.dtype), [(lo, hi, 0) for lo, hi in self.padding])

    def window_element(
        self, padded: jax.Array, tap: tuple[int, ...], out: tuple[int, ...]
    ) -> jax.Array:
        """The element at `tap` of every window, of shape `out`."""
        stop = [t + (n - 1) * s + 1 for t, n, s in zip(tap, out, self.strides, strict=True)]
        return lax.slice(padded, tap, stop, self.strides)

    def selected(self, operand: jax.Array, out: tuple[int, ...]) -> jax.Array:
        """For every window the index of the tap that wins, uint8 of shape `out`."""
        # Padding takes part as it does in XLA: it loses to everything but NaN.
        values = lax.optimization_barrier(self.pad(operand, -jnp.inf))
        first, *rest = self.taps()
        best, index = self.window_element(values, first, out), jnp.zeros(out, jnp.uint8)
        for number, tap in enumerate(rest, start=1):
            value = self.window_element(values, tap, out)
            take = ~(best >= value)
            best = jnp.where(take, value, best)
            index = jnp.where(take, jnp.uint8(number), index)
        return lax.optimization_barrier(index)


def _scatter(pool: _Pool, source: jax.Array, operand: jax.Array) -> jax.Array:
    index = pool.selected(operand, source.shape)
    source = lax.optimization_barrier(source)
    zero = jnp.zeros((), source.dtype)
    total = None
    for number, tap in enumerate(pool.taps()):
        won = jnp.where(index == number, source, zero)
        config = []
        for t, (low, _), n, stride, size in zip(
            tap, pool.padding, source.shape, pool.strides, operand.shape, strict=True
        ):
            first = t - low
            config.append((first, size - (first + (n - 1) * stride + 1), stride - 1))
        part = lax.pad(won, zero, config)
        total = part if total is None else total + part
    assert total is not None
    return total


def _gather(pool: _Pool, tangent: jax.Array, operand: jax.Array) -> jax.Array:
    low_high = zip(pool.padding, pool.window, pool.strides, operand.shape, strict=True)
    out = tuple((lo + size + hi - k) // s + 1 for (lo, hi), k, s, size in low_high)
    index = pool.selected(operand, out)
    tangent = pool.pad(tangent, 0.0)
    total = jnp.zeros(out, tangent.dtype)
    for number, tap in enumerate(pool.taps()):
        total = jnp.where(index == number, pool.window_element(tangent, tap, out), total)
    return total


_PRIMITIVES = ("reduce_window_max", "select_and_scatter_add", "select_and_gather_add")
# On a CPU, where every input lies in every tap's output, the additions cost more than the scatter.
CHOOSER = Chooser("max_pool", _PRIMITIVES, partial(choose, dense=False))
DENSE_CHOOSER = Chooser("max_pool", _PRIMITIVES, partial(choose, dense=True))
