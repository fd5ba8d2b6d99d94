"""Normalizations. In a training call batch statistics are used, and their moving means updated."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.errors import UnsupportedLayerError
from fastgpu.importers.onnx.operators.operator import axis_of, operator


def _along_channels(vector: jax.Array, rank: int) -> jax.Array:
    return vector.reshape(1, -1, *(1,) * (rank - 2)) if rank > 1 else vector


def _standard(x: jax.Array, axes: Any, epsilon: float) -> jax.Array:
    mean = jnp.mean(x, axes, keepdims=True)
    centred = x - mean
    variance = jnp.mean(centred * centred, axes, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon)


@operator("BatchNormalization")
def batch_normalization(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    *,
    consumed_inputs: Sequence[int] | None = None,
    epsilon: float = 1e-5,
    is_test: int = 0,
    momentum: float = 0.9,
    spatial: int = 1,
    training_mode: int = 0,
    call: Any,
) -> tuple[jax.Array, ...]:
    """By moving statistics; by those of the batch in a training call, or if the file says so."""
    if not spatial:
        raise UnsupportedLayerError(
            "spatial=0: statistics for every position", fix="export the model at opset 9 or newer"
        )
    outputs, rank = len(call.outputs), x.ndim
    in_file = bool(training_mode) or (call.opset < 14 and outputs > 1)
    in_file |= call.opset < 7 and not is_test
    running = (mean, var)
    if call.train or in_file:
        axes = tuple(axis for axis in range(rank) if axis != 1)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        batch_mean = jnp.mean(wide, axes)
        batch_var = jnp.mean(jnp.square(wide - _along_channels(batch_mean, rank)), axes)
        running = tuple(
            (old * momentum + new * (1 - momentum)).astype(old.dtype)
            for old, new in ((mean, batch_mean), (var, batch_var))
        )
        mean, var = batch_mean, batch_var
        if call.train:
            call.update("mean", running[0])
            call.update("var", running[1])
    wide = jnp.promote_types(x.dtype, mean.dtype)
    factor = scale * jax.lax.rsqrt(var.astype(wide) + epsilon)
    centred = x.astype(wide) - _along_channels(mean, rank)
    y = centred * _along_channels(factor, rank) + _along_channels(bias, rank)
    # older opsets can also give the batch's own statistics
    return (y.astype(x.dtype), *running, mean, var)[: max(outputs, 1)]


@operator("InstanceNormalization")
def instance_normalization(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float = 1e-5
) -> jax.Array:
    """Each channel of each example by its own statistics."""
    y = _standard(x, tuple(range(2, x.ndim)), epsilon)
    return y * _along_channels(scale, x.ndim) + _along_channels(bias, x.ndim)


@operator("GroupNormalization")
def group_normalization_by_group(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float = 1e-5,
    num_groups: int,
    stash_type: int = 1,
) -> jax.Array:
    """Opsets 18 to 20: one scale and bias for each group."""
    each = x.shape[1] // num_groups
    scale, bias = jnp.repeat(scale, each), jnp.repeat(bias, each)
    return group_normalization(x, scale, bias, epsilon=epsilon, num_groups=num_groups)


@operator("GroupNormalization", since=21)
def group_normalization(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float = 1e-5,
    num_groups: int,
    stash_type: int = 1,
) -> jax.Array:
    """Groups of channels by their own statistics; one scale and bias for each channel."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    grouped = wide.reshape(x.shape[0], num_groups, -1)
    y = _standard(grouped, 2, epsilon).reshape(x.shape).astype(x.dtype)
    return y * _along_channels(scale, x.ndim) + _along_channels(bias, x.ndim)


@operator("LayerNormalization")
def layer_normalization(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All axes from `axis` on by their own statistics, in float32 at least."""
    axes = tuple(range(axis_of(axis, x.ndim), x.ndim))
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(wide, axes, keepdims=True)
    centred = wide - mean
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axes, keepdims=True) + epsilon)
    y = (centred * inverse).astype(x.dtype) * scale
    return y if bias is None else y + bias, mean, inverse


@operator("RMSNormalization")
def rms_normalization(
    x: jax.Array, scale: jax.Array, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> jax.Array:
    """All axes from `axis` on divided by the root of their mean square."""
    axes = tuple(range(axis_of(axis, x.ndim), x.ndim))
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axes, keepdims=True) + epsilon)
    return (y.astype(x.dtype) * scale).astype(scale.dtype)


@operator("LRN")
def local_response_normalization(
    x: jax.Array, *, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, size: int
) -> jax.Array:
    """Each channel by its neighbours' squares."""
    before = (size - 1) // 2
    squares = jax.lax.reduce_window(
        x * x,
        x.dtype.type(0),
        jax.lax.add,
        (1, size, *(1,) * (x.ndim - 2)),
        (1,) * x.ndim,
        ((0, 0), (before, size - 1 - before), *((0, 0),) * (x.ndim - 2)),
    )
    return x / (bias + alpha / size * squares) ** beta


@operator("MeanVarianceNormalization")
def mean_variance_normalization(x: jax.Array, *, axes: Sequence[int] = (0, 2, 3)) -> jax.Array:
    """To mean 0 and deviation 1 over some axes."""
    centred = x - jnp.mean(x, tuple(axes), keepdims=True)
    deviation = jnp.sqrt(jnp.mean(centred * centred, tuple(axes), keepdims=True))
    return centred / (deviation + np.asarray(1e-9, x.dtype))
