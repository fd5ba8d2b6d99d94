"""Wide convolutions over few positions as a matrix product of their windows.

At 4x4 positions and 512 features, a 3x3 convolution has too few positions to keep XLA's CPU loop
busy: copying every window out and multiplying once is 1.2 to 1.4 times as fast
(`benchmarks/lowerings.py`). With more positions, or 256 features, the copies cost what they gain.
"""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fastgpu.ir.lowered import Chooser, Site
from fastgpu.transforms.dataflow.convolution import Convolution

_MOST_TAPS = 9
_MOST_POSITIONS = 16
_FEWEST_FEATURES = 512


def choose(site: Site) -> Callable[..., jax.Array] | None:
    """Code for a small wide convolution or one of its gradients; `None` for any other."""
    conv = Convolution.of(site)
    if conv is None or conv.feature_groups != 1 or conv.batch_groups != 1:
        return None
    window, positions = math.prod(conv.window), math.prod(conv.out_spatial)
    if conv.out_features < _FEWEST_FEATURES:
        return None
    few_taps = 1 < window <= _MOST_TAPS and positions <= _MOST_POSITIONS
    if few_taps and conv.in_features >= _FEWEST_FEATURES:
        return lambda lhs, rhs: _by_tap(conv, site, lhs, rhs)
    # The weight gradient: its batch are the features, its features the examples.
    few_outputs = 1 < positions <= _MOST_TAPS and window <= _MOST_POSITIONS
    if few_outputs and conv.batch >= _FEWEST_FEATURES:
        return lambda lhs, rhs: _by_position(conv, site, lhs, rhs)
    return None


def _by_tap(conv: Convolution, site: Site, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The convolution itself and its input gradient: windows side by side, one row a position."""
    lhs = conv.padded(conv.lhs_last(lhs))
    taps = itertools.product(*map(range, conv.window))
    slices = [conv.element_of_windows(lhs, tap) for tap in taps]
    windows = jnp.concatenate(slices, axis=-1)
    rows = windows.reshape(-1, windows.shape[-1])
    kernel = conv.rhs_last(rhs).reshape(-1, conv.out_features)
    out = _product(site, rows, kernel)
    return conv.from_last(out.reshape(conv.batch, *conv.out_spatial, conv.out_features))


def _by_position(conv: Convolution, site: Site, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The weight gradient, whose window is the cotangent: one block of rows an output position."""
    lhs = conv.padded(conv.lhs_last(lhs))
    positions = itertools.product(*map(range, conv.out_spatial))
    blocks = [conv.window_at(lhs, at).reshape(conv.batch, -1) for at in positions]
    kernel = conv.rhs_last(rhs).reshape(-1, conv.out_features)
    out = _product(site, jnp.concatenate(blocks), kernel)
    out = out.reshape(*conv.out_spatial, conv.batch, conv.out_features)
    return conv.from_last(jnp.moveaxis(out, -2, 0))


def _product(site: Site, rows: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(
        rows,
        kernel,
        precision=site["precision"],
        preferred_element_type=site["preferred_element_type"],
    )


CHOOSER = Chooser("small_spatial", ("conv_general_dilated",), choose)
