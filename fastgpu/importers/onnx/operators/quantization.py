"""Numbers in few bits: to them, from them, and products of them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.importers.onnx.dtypes import ELEMENT_TYPES, is_float
from fastgpu.importers.onnx.operators.convolution import integer_convolution
from fastgpu.importers.onnx.operators.elementwise import cast_to
from fastgpu.importers.onnx.operators.operator import axis_of, operator


def _spread(value: jax.Array, x: jax.Array, axis: int, block_size: int) -> jax.Array:
    """Scales of the whole array, of an axis, or of blocks along an axis, ready to broadcast."""
    if value.size == 1:
        return value.reshape(())
    axis = axis_of(axis, x.ndim)
    if block_size:
        repeated = jnp.repeat(value, block_size, axis)
        return jax.lax.slice_in_dim(repeated, 0, x.shape[axis], axis=axis)
    return value.reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def _wide(x: jax.Array) -> jax.Array:
    # XLA's CPU code has no direct way from 4 bits to floats
    return x if is_float(x.dtype) or x.dtype.itemsize > 1 else x.astype(jnp.int32)


@operator("QuantizeLinear")
def quantize(
    x: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> jax.Array:
    """x / scale + zero point, rounded to even and cut to the type of the zero point."""
    dtype = ELEMENT_TYPES[output_dtype] if output_dtype else np.dtype(np.uint8)
    dtype = dtype if zero_point is None else np.dtype(zero_point.dtype)
    divisor = _spread(scale, x, axis, block_size)
    if precision:
        x, divisor = (value.astype(ELEMENT_TYPES[precision]) for value in (x, divisor))
    ratio = x / divisor
    if is_float(dtype):
        return cast_to(ratio, dtype, bool(saturate), jnp)
    rounded = jnp.round(ratio)
    limits = jnp.iinfo(dtype)
    if zero_point is not None:
        offset = _spread(_wide(zero_point), x, axis, block_size)
        rounded = rounded + offset.astype(rounded.dtype)
    return jnp.clip(rounded, limits.min, limits.max).astype(jnp.int32).astype(dtype)


@operator("DequantizeLinear")
def dequantize(
    x: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> jax.Array:
    """(x - zero point) scale, in the type of the scale."""
    dtype = ELEMENT_TYPES[output_dtype] if output_dtype else scale.dtype
    wide = _wide(x)
    if zero_point is not None and not is_float(zero_point.dtype):
        wide = wide.astype(jnp.int32)
        wide = wide - _spread(zero_point.astype(jnp.int32), x, axis, block_size)
    wide = wide.astype(jnp.float32)
    return (wide * _spread(scale, x, axis, block_size).astype(jnp.float32)).astype(dtype)


@operator("DynamicQuantizeLinear")
def dynamic_quantize(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """To 8 bits, by a scale and zero point that the values themselves give."""
    low, high = jnp.minimum(jnp.min(x), 0), jnp.maximum(jnp.max(x), 0)
    scale = jnp.where(high == low, 1, high - low) / 255
    zero_point = jnp.round(jnp.clip(-low / scale, 0, 255))
    y = jnp.clip(jnp.round(x / scale) + zero_point, 0, 255)
    return y.astype(jnp.uint8), scale, zero_point.astype(jnp.uint8)


def _requantized(total: jax.Array, factor: jax.Array, zero_point: jax.Array) -> jax.Array:
    limits = jnp.iinfo(zero_point.dtype)
    y = jnp.round(total.astype(jnp.float32) * factor.astype(jnp.float32))
    y = y + zero_point.astype(jnp.float32)
    return jnp.clip(y, limits.min, limits.max).astype(zero_point.dtype)


@operator("QLinearMatMul")
def quantized_matrix_product(
    a: jax.Array,
    a_scale: jax.Array,
    a_zero_point: jax.Array,
    b: jax.Array,
    b_scale: jax.Array,
    b_zero_point: jax.Array,
    y_scale: jax.Array,
    y_zero_point: jax.Array,
) -> jax.Array:
    """A product of 8-bit matrices, added up in 32 bits and rounded to 8 bits again."""

    def rows(value: jax.Array) -> jax.Array:
        return value[..., None] if value.ndim and value.size > 1 else value

    left = a.astype(jnp.int32) - rows(a_zero_point).astype(jnp.int32)
    right = b.astype(jnp.int32) - b_zero_point.astype(jnp.int32)
    factor = rows(a_scale).astype(jnp.float32) * b_scale.astype(jnp.float32)
    factor = factor / rows(y_scale).astype(jnp.float32)
    return _requantized(jnp.matmul(left, right), factor, rows(y_zero_point))


@operator("QLinearConv")
def quantized_convolution(
    x: jax.Array,
    x_scale: jax.Array,
    x_zero_point: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    w_zero_point: jax.Array,
    y_scale: jax.Array,
    y_zero_point: jax.Array,
    b: jax.Array | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> jax.Array:
    """A convolution of 8-bit numbers, added up in 32 bits and rounded to 8 bits again."""
    windows: dict[str, Any] = {
        "auto_pad": auto_pad,
        "dilations": dilations,
        "kernel_shape": kernel_shape,
        "pads": pads,
        "strides": strides,
    }
    total = integer_convolution(x, w, x_zero_point, w_zero_point, group=group, **windows)
    shape = (-1, *(1,) * (x.ndim - 2))
    if b is not None:
        total = total + b.reshape(shape)
    factor = x_scale * w_scale / y_scale
    return _requantized(total, factor.reshape(shape) if factor.size > 1 else factor, y_zero_point)
