"""Random bits as arithmetic that fuses into whatever reads them.

JAX's default generator (Threefry-2x32, Salmon et al. 2011) hashes each element's own position. For
CPUs JAX writes its twenty rounds as a loop, and every round reads and writes arrays as large as the
result. Written out they are one pass, with nothing in memory: 3 to 10 times faster, bit for bit the
same (`benchmarks/lowerings.py`).
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu.ir.lowered import Chooser, Site

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
# For fewer, the rounds are not worth compiling.
_FEWEST_ELEMENTS = 1 << 12


def choose(site: Site) -> Callable[..., jax.Array] | None:
    """Code for many random bits from one Threefry key; `None` for any other."""
    (keys,) = site.in_avals
    shape, width = site["shape"], site["bit_width"]
    if keys.shape or str(keys.dtype) != "key<fry>" or width not in (8, 16, 32):
        return None
    if not jax.config.jax_threefry_partitionable:  # pyright: ignore[reportAttributeAccessIssue]
        return None
    if not all(isinstance(size, int) for size in shape):
        return None
    if not _FEWEST_ELEMENTS <= math.prod(shape) < 1 << 32:
        return None
    return partial(_bits, shape, width)


def _bits(shape: tuple[int, ...], width: int, key: jax.Array) -> jax.Array:
    first, second = jax.random.key_data(key)
    schedule = (first, second, first ^ second ^ jnp.uint32(0x1BD11BDA))
    # Each element is the hash of its position, of which the upper word is 0.
    left = jnp.broadcast_to(first, shape)
    right = _positions(shape) + second
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            left = left + right
            right = left ^ _rotated(right, distance)
        left = left + schedule[(group + 1) % 3]
        right = right + (schedule[(group + 2) % 3] + jnp.uint32(group + 1))
    return (left ^ right).astype(f"uint{width}")


def _positions(shape: tuple[int, ...]) -> jax.Array:
    """The place of every element in the flat array."""
    total, stride = jnp.zeros(shape, jnp.uint32), 1
    for dim in reversed(range(len(shape))):
        total = total + lax.broadcasted_iota(jnp.uint32, shape, dim) * jnp.uint32(stride)
        stride *= shape[dim]
    return total


def _rotated(x: jax.Array, distance: int) -> jax.Array:
    return (x << jnp.uint32(distance)) | (x >> jnp.uint32(32 - distance))


CHOOSER = Chooser("random_bits", ("random_bits",), choose)
