"""Normalization of each example by itself, without statistics of the batch."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu.importers.keras.layers.initializers import ONES, ZEROS, Initializer
from fastgpu.importers.keras.layers.layer import Layer, LayerState, along_axis, positive_axis


@dataclass(frozen=True, kw_only=True)
class GroupNormalization(Layer):
    """GroupNormalization (Wu and He, arXiv:1803.08494); groups=-1 gives every channel its own."""

    groups: int = 32
    axis: int = -1
    epsilon: float = 1e-3
    center: bool = True
    scale: bool = True
    beta_initializer: Initializer = ZEROS
    gamma_initializer: Initializer = ONES
    supports_masking: ClassVar[bool] = True

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Normalize over all axes but the batch, in groups of channels."""
        axis = positive_axis(self.axis, x.ndim)
        channels = x.shape[axis]
        groups = channels if self.groups == -1 else self.groups
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        shape = (*x.shape[:axis], groups, channels // groups, *x.shape[axis + 1 :])
        wide = x.astype(dtype).reshape(shape)
        axes = tuple(i for i in range(1, wide.ndim) if i != axis)
        mean = jnp.mean(wide, axes, keepdims=True)
        variance = jnp.mean(jnp.square(wide - mean), axes, keepdims=True)
        y = ((wide - mean) * lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        if self.scale:
            gamma = state.weight("gamma", (channels,), self.gamma_initializer, autocast=False)
            y = y * along_axis(gamma.astype(dtype), axis, x.ndim)
        if self.center:
            beta = state.weight("beta", (channels,), self.beta_initializer, autocast=False)
            y = y + along_axis(beta.astype(dtype), axis, x.ndim)
        return y.astype(state.policy.compute_dtype)


@dataclass(frozen=True, kw_only=True)
class RMSNormalization(Layer):
    """RMSNormalization (Zhang and Sennrich, arXiv:1910.07467)."""

    axis: int | tuple[int, ...] = -1
    epsilon: float = 1e-6

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Divide by the root of the mean square and multiply by a learned scale."""
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        axes = tuple(sorted(positive_axis(axis, x.ndim) for axis in axes))
        shape = tuple(x.shape[axis] for axis in axes)
        scale = state.weight("scale", shape, ONES)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        factor = lax.rsqrt(jnp.mean(jnp.square(wide), axes, keepdims=True) + self.epsilon)
        sizes = [x.shape[axis] if axis in axes else 1 for axis in range(x.ndim)]
        return (wide * factor * scale.astype(wide.dtype).reshape(sizes)).astype(x.dtype)


@dataclass(frozen=True, kw_only=True)
class UnitNormalization(Layer):
    """UnitNormalization: every vector along an axis gets length one."""

    axis: int | tuple[int, ...] = -1
    supports_masking: ClassVar[bool] = True

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """x over its length."""
        power = jnp.sum(jnp.square(x), self.axis, keepdims=True)
        return x * lax.rsqrt(jnp.maximum(power, 1e-24))
