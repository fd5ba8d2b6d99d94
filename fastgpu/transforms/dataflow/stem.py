"""Weight gradients of a network's first convolution, one matrix product of windows an example.

Over the three features of an image, XLA's CPU backend has nothing to vectorize: it takes 1.6 to 6
times as long as copying the windows of one example side by side, while they fit into the caches,
and multiplying them with its cotangent (`benchmarks/lowerings.py`).
"""

import itertools
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu.ir.lowered import Chooser, Site
from fastgpu.transforms.dataflow.convolution import Convolution, accumulation_dtype

# With more features the compiler's own loops are as fast.
_MOST_FEATURES = 4
# Each tap is an operation of its own: a larger window would make programs long to compile.
_MOST_TAPS = 64


def choose(site: Site) -> Callable[..., jax.Array] | None:
    """Code for the weight gradient of a convolution over few features; `None` for any other.

    In the convolution that means it, the features are the batch, the examples the features, and
    the cotangent is the window.
    """
    conv = Convolution.of(site)
    if conv is None or conv.feature_groups != 1 or conv.batch_groups != 1:
        return None
    window, positions = math.prod(conv.window), math.prod(conv.out_spatial)
    if conv.batch <= _MOST_FEATURES and 1 < positions <= _MOST_TAPS and positions < window:
        return lambda lhs, rhs: _weight_gradient(conv, site, lhs, rhs)
    if conv.in_features <= _MOST_FEATURES and 1 < window <= _MOST_TAPS and window < positions:
        # Good as it is: it is claimed so that its gradient comes here, too.
        return partial(site.primitive.bind, **dict(site.params))
    return None


def _weight_gradient(conv: Convolution, site: Site, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    dtype = accumulation_dtype(lhs.dtype, rhs.dtype)
    images = conv.padded(conv.lhs_last(lhs))  # [features, *spatial, examples]
    images = jnp.moveaxis(images, (0, -1), (-1, 0))
    cotangents = jnp.moveaxis(conv.rhs_last(rhs), -2, 0)
    taps = list(itertools.product(*map(range, conv.out_spatial)))

    def add_example(total: jax.Array, pair: tuple[jax.Array, jax.Array]):
        image, cotangent = pair
        windows = jnp.concatenate([conv.window_at(image[None], tap)[0] for tap in taps], axis=-1)
        product = lax.dot_general(
            windows.reshape(-1, windows.shape[-1]),
            cotangent.reshape(-1, conv.out_features),
            (((0,), (0,)), ((), ())),
            precision=site["precision"],
            preferred_element_type=dtype,
        )
        return total + product, None

    zeros = jnp.zeros((len(taps) * conv.batch, conv.out_features), dtype)
    total, _ = lax.scan(add_example, zeros, (images, cotangents))
    total = total.reshape(*conv.out_spatial, conv.batch, conv.out_features)
    return conv.from_last(jnp.moveaxis(total, -2, 0))


CHOOSER = Chooser("stem", ("conv_general_dilated",), choose)
