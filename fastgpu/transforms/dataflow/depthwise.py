"""Depthwise convolutions as shifted multiply-adds, their weight gradients as a scan over the batch.

XLA's CPU backend runs a depthwise convolution as a general grouped one, and its weight gradient as
a dense convolution of C by C features of which it keeps the diagonal: 10 to 100 times slower than
the few multiply-adds that are needed (`benchmarks/lowerings.py`).
"""

import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu.ir.lowered import Chooser, Site
from fastgpu.transforms.dataflow.convolution import Convolution, accumulation_dtype

# Each tap is an operation of its own: a larger window would make programs long to compile.
_MOST_TAPS = 64


def choose(site: Site) -> Callable[..., jax.Array] | None:
    """Code for a depthwise convolution or one of its gradients; `None` for any other."""
    conv = Convolution.of(site)
    if conv is None:
        return None
    taps = 1
    if conv.feature_groups == conv.in_features > 1 and conv.batch_groups == 1:
        for size in conv.window:
            taps *= size
        return (lambda lhs, rhs: _shifted(conv, lhs, rhs)) if taps <= _MOST_TAPS else None
    if conv.batch_groups == conv.batch > 1 and conv.feature_groups == 1:
        for size in conv.out_spatial:
            taps *= size
        return (lambda lhs, rhs: _weight_gradient(conv, lhs, rhs)) if taps <= _MOST_TAPS else None
    return None


def _taps(sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(size) for size in sizes))


def _shifted(conv: Convolution, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The forward convolution, and the input gradient (a convolution over a dilated cotangent)."""
    dtype = accumulation_dtype(lhs.dtype, rhs.dtype)
    lhs = conv.padded(_repeat_features(conv, conv.lhs_last(lhs)))
    # Without the barrier every tap computes the producer of `lhs` again.
    lhs = lax.optimization_barrier(lhs)
    kernel = conv.rhs_last(rhs)[..., 0, :].astype(dtype)
    total = None
    for tap in _taps(conv.window):
        term = conv.element_of_windows(lhs, tap).astype(dtype) * kernel[tap]
        total = term if total is None else total + term
    assert total is not None
    return conv.from_last(total)


def _repeat_features(conv: Convolution, lhs: jax.Array) -> jax.Array:
    multiplier = conv.out_features // lhs.shape[-1]
    return lhs if multiplier == 1 else jnp.repeat(lhs, multiplier, axis=-1)


def _weight_gradient(conv: Convolution, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """out[0, tap, g] = sum over examples and space of lhs[example, space + tap, g] * rhs[..., g].

    In the convolution that means this, the features of `lhs` are its batch, and the examples its
    features; the window is the cotangent. Products of one example are added up elementwise, and the
    sum over space is taken once at the end.
    """
    dtype = accumulation_dtype(lhs.dtype, rhs.dtype)
    examples = jnp.moveaxis(conv.lhs_last(lhs), (0, -1), (-1, 0))
    examples = conv.padded(_repeat_features(conv, examples))
    cotangents = jnp.moveaxis(conv.rhs_last(rhs), -2, 0)
    taps = list(_taps(conv.out_spatial))

    def add_example(totals: tuple[jax.Array, ...], pair: tuple[jax.Array, jax.Array]):
        example, cotangent = pair
        cotangent = cotangent.astype(dtype)
        return tuple(
            total + conv.window_at(example[None], tap)[0].astype(dtype) * cotangent
            for total, tap in zip(totals, taps, strict=True)
        ), None

    zeros = tuple(jnp.zeros(cotangents.shape[1:], dtype) for _ in taps)
    totals, _ = lax.scan(add_example, zeros, (examples, cotangents))
    space = tuple(range(len(conv.window)))
    sums = jnp.stack([jnp.sum(total, axis=space) for total in totals])
    return conv.from_last(sums.reshape(1, *conv.out_spatial, conv.out_features))


CHOOSER = Chooser("depthwise", ("conv_general_dilated",), choose)
