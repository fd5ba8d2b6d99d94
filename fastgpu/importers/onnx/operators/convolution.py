"""Convolutions: images are (batch, channels, space...), kernels (out, in / groups, space...)."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.importers.onnx.dtypes import checked_shape
from fastgpu.importers.onnx.operators.operator import one_of, operator
from fastgpu.importers.onnx.operators.resampling import sample
from fastgpu.importers.onnx.operators.windows import AUTO_PADS, per_axis, windows


def _numbers(rank: int) -> jax.lax.ConvDimensionNumbers:
    every = tuple(range(rank + 2))
    return jax.lax.ConvDimensionNumbers(every, every, every)


def _along_channels(b: jax.Array, rank: int) -> jax.Array:
    return b.reshape(1, -1, *(1,) * rank)


@operator("Conv")
def convolution(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> jax.Array:
    """A convolution over any number of spatial axes."""
    if kernel_shape is not None and tuple(kernel_shape) != w.shape[2:]:
        raise ValueError(f"kernel_shape {list(kernel_shape)} of a kernel {list(w.shape)}")
    over = windows(x.shape[2:], w.shape[2:], strides, dilations, pads, auto_pad)
    y = jax.lax.conv_general_dilated(
        x,
        w,
        over.strides,
        over.pads,
        rhs_dilation=over.dilations,
        dimension_numbers=_numbers(x.ndim - 2),
        feature_group_count=group,
    )
    return y if b is None else y + _along_channels(b, x.ndim - 2)


@operator("ConvTranspose")
def transposed_convolution(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> jax.Array:
    """The transpose of a convolution; kernels are (in, out / groups, spatial...)."""
    one_of("auto_pad", auto_pad, AUTO_PADS)
    rank = x.ndim - 2
    strides, dilations = per_axis(strides, rank, 1), per_axis(dilations, rank, 1)
    added, both = per_axis(output_padding, rank, 0), per_axis(pads, 2 * rank, 0)
    asked = None if output_shape is None else tuple(output_shape)[-rank:]
    padding = []
    for axis in range(rank):
        span = (w.shape[2 + axis] - 1) * dilations[axis] + 1
        full = strides[axis] * (x.shape[2 + axis] - 1) + span + added[axis]
        before, after = both[axis], both[rank + axis]
        if asked is not None or auto_pad.startswith("SAME"):
            out = x.shape[2 + axis] * strides[axis] if asked is None else asked[axis]
            total = full - out
            less, more = total // 2, total - total // 2
            before, after = (less, more) if auto_pad == "SAME_UPPER" else (more, less)
        elif auto_pad == "VALID":
            before = after = 0
        padding.append((span - 1 - before, span - 1 - after + added[axis]))
    c, m = w.shape[0], w.shape[1]
    kernel = w.reshape(group, c // group, m, *w.shape[2:]).swapaxes(1, 2)
    kernel = jnp.flip(kernel.reshape(group * m, c // group, *w.shape[2:]), range(2, rank + 2))
    checked_shape(
        [(n - 1) * s + a + b for n, s, (a, b) in zip(x.shape[2:], strides, padding, strict=True)],
        "ConvTranspose",
    )
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (1,) * rank,
        padding,
        lhs_dilation=strides,
        rhs_dilation=dilations,
        dimension_numbers=_numbers(rank),
        feature_group_count=group,
    )
    return y if b is None else y + _along_channels(b, rank)


@operator("ConvInteger")
def integer_convolution(
    x: jax.Array,
    w: jax.Array,
    x_zero_point: jax.Array | None = None,
    w_zero_point: jax.Array | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> jax.Array:
    """A convolution of 8-bit numbers, added up in 32 bits."""
    x, w = x.astype(jnp.int32), w.astype(jnp.int32)
    if x_zero_point is not None:
        x = x - x_zero_point.astype(jnp.int32)
    if w_zero_point is not None:
        w = w - w_zero_point.astype(jnp.int32).reshape(-1, *(1,) * (w.ndim - 1))
    return convolution(
        x,
        w,
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        kernel_shape=kernel_shape,
        pads=pads,
        strides=strides,
    )


@operator("DeformConv")
def deformable_convolution(
    x: jax.Array,
    w: jax.Array,
    offset: jax.Array,
    b: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    offset_group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> jax.Array:
    """A convolution that reads where learned offsets say (https://arxiv.org/abs/1811.11168)."""
    rank = x.ndim - 2
    over = windows(x.shape[2:], w.shape[2:], strides, dilations, pads, "NOTSET")
    n, c, taps = x.shape[0], x.shape[1], math.prod(over.kernel)
    # where each tap of each window lies, as (taps, axis, out...)
    places = np.stack(
        [
            np.broadcast_to(place - over.pads[axis][0], (*over.outputs, *over.kernel))
            for axis, place in enumerate(over.places())
        ],
    ).reshape(rank, *over.outputs, taps)
    regular = jnp.asarray(np.moveaxis(places, -1, 0), offset.dtype)
    moved = offset.reshape(n, offset_group, taps, rank, *over.outputs) + regular
    grouped = x.reshape(n * offset_group, c // offset_group, *x.shape[2:])
    where = jnp.moveaxis(moved, 3, -1).reshape(n * offset_group, taps, *over.outputs, rank)
    read = jax.vmap(lambda image, at: sample(image, at, "linear", "zeros"))(grouped, where)
    if mask is not None:
        read = read * mask.reshape(n * offset_group, 1, taps, *over.outputs)
    read = read.reshape(n, group, c // group, taps, *over.outputs)
    kernel = w.reshape(group, w.shape[0] // group, c // group, taps)
    y = jnp.einsum("ngct...,gmct->ngm...", read, kernel).reshape(n, -1, *over.outputs)
    return y if b is None else y + _along_channels(b, rank)


@operator("Col2Im", static=("image_shape", "block_shape"))
def columns_to_image(
    x: jax.Array,
    image_shape: np.ndarray,
    block_shape: np.ndarray,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> jax.Array:
    """Windows put back where they were cut out; what overlaps is added."""
    image = checked_shape(image_shape, "Col2Im")
    block = checked_shape(block_shape, "Col2Im")
    over = windows(image, block, strides, dilations, pads, "NOTSET")
    rank, n = len(image), x.shape[0]
    columns = x.reshape(n, -1, *block, *over.outputs)
    columns = columns.transpose(0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank))
    padded = [size + a + b for size, (a, b) in zip(image, over.pads, strict=True)]
    whole = jnp.zeros((*columns.shape[:2], *padded), x.dtype).at[(..., *over.places())].add(columns)
    inside = [slice(a, a + size) for size, (a, _) in zip(image, over.pads, strict=True)]
    return whole[(..., *inside)]
