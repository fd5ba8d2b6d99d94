"""Arrays in 8 bits a value: blocks with a scale of their own, and a logarithmic code.

Block-wise quantization (Dettmers et al. 2021, arXiv:2110.02861): the array is cut, flattened, into
blocks; each is divided by its largest magnitude. Where the paper has a dynamic tree, the code here
is plainly logarithmic, so that the relative error is the same for large and small values:
neighbours differ by a factor of 2^(1/6).

    block           codes                                          range below the largest
    has negatives   0, and 127 magnitudes with a sign bit          2^-21 = 4.8e-7
    has none        0, and 255 magnitudes                          2^-42.3 = 1.8e-13

Second moments have no negative values, so they get twice the octaves, as squares need. What lies
below the range moves to the side on which an Adam update shrinks: signed values (first moments) to
zero, the others (second moments, under the fraction) up to the smallest magnitude. Only zero
becomes zero in a block without negatives.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike

# In the run of benchmarks/compressed_optimizer.py, moments leave the range at 8 and above: the
# largest error of an update is seven times that at 6. At 5, all errors are larger.
_STEPS_PER_OCTAVE = 6
_RATIO = 2 ** (1 / _STEPS_PER_OCTAVE)
_UNSIGNED_TOP, _SIGNED_TOP, _SIGN_BIT = 255, 127, 128
# Far above the rounding of float32's log2, far below what one step changes in a slow average.
_ON_A_CODE = 1e-4


class Blockwise(struct.PyTreeNode):
    """An array in 8 bits a value.

    codes: uint8, of the array's shape, so that what shards the array shards them.
    scales: floating-point `[ceil(size / block_size)]`, the largest magnitude of each block of the
      flattened array; negative where the block has negative values and its codes a sign bit.
    dtype, block_size: static; the dtype that `dequantize` gives.

    >>> quantize(jnp.array([1.0, 2.0, -4.0]), block_size=2).scales
    Array([ 2., -4.], dtype=float32)
    """

    codes: jax.Array
    scales: jax.Array
    dtype: Any = struct.field(pytree_node=False)
    block_size: int = struct.field(pytree_node=False)


def quantize(x: jax.Array, *, block_size: int = 256, dither: ArrayLike | None = None) -> Blockwise:
    """`x` in 8 bits a value and one scale a block.

    Args:
      x: floating-point, any shape.
      block_size: values per scale.
      dither: None rounds to the nearest code: a value in range is off by at most 5.8%.
        An integer scalar, to be counted up from call to call, rounds up or down such that the mean
        over many calls is right; off by at most 12.3% in one call. The thresholds are a
        low-discrepancy sequence in position and count (Roberts 2018), not random numbers: equal
        inputs give equal bits.

    The largest magnitude of each block is exact, and so is a value that is a code already. A block
    that holds an infinity or NaN has no finite value afterwards.

    >>> quantize(jnp.array([0.0, 0.5, -1.0, 1e-9])).codes
    Array([  0, 121, 255,   0], dtype=uint8)
    >>> quantize(jnp.array([0.0, 0.5, 1.0, 1e-20])).codes
    Array([  0, 249, 255,   1], dtype=uint8)
    """
    blocks = _blocks(x.astype(_working_dtype(x.dtype)), block_size)  # [blocks, block_size]
    magnitude = abs(blocks)
    largest = magnitude.max(axis=1)  # [blocks]
    signed = (blocks < 0).any(axis=1)
    top = jnp.where(signed, _SIGNED_TOP, _UNSIGNED_TOP)[:, None]

    fraction = magnitude / jnp.where(largest == 0, 1, largest)[:, None]
    position = top + _STEPS_PER_OCTAVE * jnp.log2(fraction)  # -inf where the value is zero
    whole = jnp.round(position)
    position = jnp.where(abs(position - whole) < _ON_A_CODE, whole, position)
    below = jnp.floor(position)
    # How far the value, not its logarithm, is on the way from one code to the next.
    share = (jnp.exp2((position - below) / _STEPS_PER_OCTAVE) - 1) / (_RATIO - 1)
    threshold = 0.5 if dither is None else _thresholds(blocks.shape, dither, share.dtype)
    code = jnp.clip(below + (share > threshold), 1, top)
    vanishes = (magnitude == 0) | (signed[:, None] & (position < 1))
    code = jnp.where(vanishes, 0, code).astype(jnp.uint8)
    code = jnp.where(blocks < 0, code | _SIGN_BIT, code)
    return Blockwise(
        codes=code.reshape(-1)[: x.size].reshape(x.shape),
        scales=jnp.where(signed, -largest, largest),
        dtype=np.dtype(x.dtype),
        block_size=block_size,
    )


def dequantize(x: Blockwise) -> jax.Array:
    """The array that `x` stands for, in `x.dtype`.

    >>> dequantize(quantize(jnp.array([0.0, 0.5, -1.0, 0.3])))
    Array([ 0.        ,  0.5       , -1.        ,  0.31498027], dtype=float32)
    """
    codes = _blocks(x.codes, x.block_size)  # [blocks, block_size]
    largest = abs(x.scales)[:, None]
    signed = x.scales[:, None] < 0
    top = jnp.where(signed, _SIGNED_TOP, _UNSIGNED_TOP)
    code = jnp.where(signed, codes & ~np.uint8(_SIGN_BIT), codes).astype(x.scales.dtype)
    level = largest * jnp.exp2((code - top) / _STEPS_PER_OCTAVE)
    level = jnp.maximum(level, jnp.finfo(level.dtype).tiny)  # not zero by underflow
    magnitude = jnp.where(code == 0, largest * 0, level)
    values = jnp.where(signed & (codes >= _SIGN_BIT), -magnitude, magnitude)
    return values.reshape(-1)[: x.codes.size].reshape(x.codes.shape).astype(x.dtype)


def _working_dtype(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _blocks(x: jax.Array, block_size: int) -> jax.Array:
    """`x` flattened and filled up with zeros to whole blocks: `[blocks, block_size]`."""
    return jnp.pad(x.reshape(-1), (0, -x.size % block_size)).reshape(-1, block_size)


def _thresholds(shape: tuple[int, ...], count: ArrayLike, dtype: Any) -> jax.Array:
    """Numbers in [0, 1), spread evenly over positions at one count and over counts at one position.

    Multiples of two irrational numbers, modulo one, in 32-bit integers: they wrap around exactly.
    """
    position = jnp.arange(np.prod(shape), dtype=jnp.uint32).reshape(shape)
    by_position = np.uint32(0.7548776662466927 * 2**32)  # the plastic number's reciprocal
    by_count = np.uint32(0.6180339887498949 * 2**32)  # the golden ratio's
    phase = position * by_position + jnp.asarray(count).astype(jnp.uint32) * by_count
    return (phase >> 8).astype(dtype) * 2.0**-24
