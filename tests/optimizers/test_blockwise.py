"""8 bits a value: how far off, what is exact, and what never happens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpu.optimizers import dequantize, quantize

RATIO = 2 ** (1 / 6)
NEAREST = (RATIO - 1) / (RATIO + 1)  # half a code, relative to the middle between two codes
DITHERED = RATIO - 1  # a whole code
FLOAT32 = 1e-5  # log2 and exp2 of float32, with their arguments up to 32


def round_trip(x: jax.Array, **settings) -> np.ndarray:
    decoded = dequantize(quantize(x, **settings))
    assert (decoded.shape, decoded.dtype) == (x.shape, x.dtype)
    return np.asarray(decoded, np.float64)


def values_over(decades: float, size: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (10 ** rng.uniform(-decades, 0, size)).astype(np.float32)


def signed_values(decades: float, size: int, seed: int = 0) -> np.ndarray:
    signs = np.random.default_rng(seed + 1).choice([-1, 1], size)
    return (values_over(decades, size, seed) * signs).astype(np.float32)


@pytest.mark.parametrize(("dither", "bound"), [(None, NEAREST), (7, DITHERED)])
def test_the_relative_error_of_a_value_in_range_is_bounded(dither, bound):
    for x in (values_over(12.5, 5000), signed_values(6.2, 5000), values_over(12.5, 5000) * 1e-20):
        error = round_trip(jnp.asarray(x), dither=dither) / x - 1
        assert abs(error).max() <= bound + FLOAT32


def test_an_error_is_small_beside_the_blocks_largest_and_blocks_do_not_touch_each_other():
    x = np.random.default_rng(0).normal(size=(40, 100)).astype(np.float32)
    x[:20] *= 1e6
    error = abs(round_trip(jnp.asarray(x), block_size=100) - x)
    assert (error.max(axis=1) <= abs(x).max(axis=1) * (NEAREST + FLOAT32)).all()


@pytest.mark.parametrize("dither", [None, 3])
def test_the_largest_of_a_block_and_values_that_are_codes_are_exact(dither):
    x = jnp.asarray(signed_values(8, 4096))
    once = quantize(x, dither=dither)
    decoded = np.asarray(dequantize(once)).reshape(-1, 256)
    blocks = np.asarray(x).reshape(-1, 256)
    np.testing.assert_array_equal(abs(decoded).max(axis=1), abs(blocks).max(axis=1))
    again = quantize(dequantize(once), dither=None if dither is None else dither + 1)
    np.testing.assert_array_equal(dequantize(again), dequantize(once))


@pytest.mark.parametrize("dither", [None, *range(5)])
def test_only_zero_becomes_zero_where_nothing_is_negative(dither):
    x = values_over(30, 4096)
    x[::7] = 0
    decoded = round_trip(jnp.asarray(x), dither=dither)
    np.testing.assert_array_equal(decoded == 0, x == 0)
    lower = 1 - (NEAREST if dither is None else 1 - 1 / RATIO) - FLOAT32
    assert (decoded >= x * lower).all()


@pytest.mark.parametrize("dither", [None, *range(5)])
def test_what_is_too_small_for_a_block_with_negatives_vanishes_and_never_grows(dither):
    x = signed_values(30, 4096)
    decoded = round_trip(jnp.asarray(x), dither=dither)
    bound = NEAREST if dither is None else DITHERED
    assert (abs(decoded) <= abs(x) * (1 + bound + FLOAT32)).all()
    assert ((decoded == 0) | (np.sign(decoded) == np.sign(x))).all()
    assert (abs(decoded - x) <= abs(x).reshape(-1, 256).max(axis=1).repeat(256) * bound).all()


def test_dithered_rounding_is_right_in_the_mean_over_counts():
    x = values_over(6, 512)
    rounds = [round_trip(jnp.asarray(x), dither=count) for count in range(256)]
    # A low-discrepancy sequence: the mean of n is off by O(log n / n) codes, not 1 / sqrt(n).
    assert abs(np.mean(rounds, axis=0) / x - 1).max() < 0.02 * DITHERED


@pytest.mark.parametrize("shape", [(), (1,), (255,), (3, 5, 7), (0,), (257, 2)])
def test_any_shape_comes_back(shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    stored = quantize(x, block_size=32)
    assert stored.codes.shape == shape
    assert stored.scales.shape == (-(-x.size // 32),)
    np.testing.assert_allclose(dequantize(stored), x, rtol=NEAREST, atol=2e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_any_floating_point_dtype_comes_back(dtype):
    x = jnp.asarray(signed_values(3, 600), dtype)
    exact = np.asarray(x, np.float64)
    rounding = float(jnp.finfo(dtype).eps)
    assert abs(round_trip(x) / exact - 1).max() <= NEAREST + rounding


def test_zeros_stay_zeros_and_the_smallest_floats_stay_above_zero():
    assert (round_trip(jnp.zeros(300)) == 0).all()
    assert (round_trip(jnp.full(300, np.finfo(np.float32).tiny)) > 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_block_with_a_value_that_is_not_finite_shows_it_and_the_others_are_whole(bad):
    x = jnp.ones(512).at[3].set(bad).at[5].set(0)
    decoded = round_trip(x)
    assert not np.isfinite(decoded[:256]).any()
    assert (decoded[256:] == 1).all()


def test_it_can_be_compiled_and_mapped():
    x = jnp.asarray(signed_values(4, 3 * 512).reshape(3, 512))
    mapped = jax.vmap(lambda row: dequantize(quantize(row)))(x)
    np.testing.assert_array_equal(mapped, jnp.stack([dequantize(quantize(row)) for row in x]))
    compiled = jax.jit(lambda x: dequantize(quantize(x)))(x)
    np.testing.assert_allclose(compiled, dequantize(quantize(x)), rtol=FLOAT32)
