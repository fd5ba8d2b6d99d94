"""Pooling windows, and pooling over all of space."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu.importers.keras.layers.layer import (
    DATA_FORMATS,
    Layer,
    LayerState,
    as_tuple,
    one_of,
    spatial_axes,
)


@dataclass(frozen=True, kw_only=True)
class _Pooling(Layer):
    """The options of windowed pooling."""

    pool_size: int | tuple[int, ...] = 2
    strides: int | tuple[int, ...] | None = None
    padding: str = "valid"
    data_format: str = "channels_last"

    def __post_init__(self) -> None:
        """Refuse option values that Keras does not define."""
        one_of("padding", self.padding, ("valid", "same"))
        one_of("data_format", self.data_format, DATA_FORMATS)

    def window(self, x: jax.Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Window and strides over every axis, 1 over batch and channels."""
        axes = spatial_axes(self.data_format, x.ndim)
        strides = self.pool_size if self.strides is None else self.strides
        size, step = [1] * x.ndim, [1] * x.ndim
        sizes, steps = as_tuple(self.pool_size, len(axes)), as_tuple(strides, len(axes))
        for axis, length, stride in zip(axes, sizes, steps, strict=True):
            size[axis], step[axis] = length, stride
        return tuple(size), tuple(step)


@dataclass(frozen=True, kw_only=True)
class MaxPooling(_Pooling):
    """MaxPooling1D, MaxPooling2D, MaxPooling3D."""

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """The largest value of each window."""
        return lax.reduce_window(x, -jnp.inf, lax.max, *self.window(x), self.padding.upper())


@dataclass(frozen=True, kw_only=True)
class AveragePooling(_Pooling):
    """AveragePooling1D, AveragePooling2D, AveragePooling3D; padding does not count."""

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """The mean of each window."""
        size, step = self.window(x)
        total = lax.reduce_window(x, 0.0, lax.add, size, step, self.padding.upper())
        if self.padding == "valid":
            return total / math.prod(size)
        covered = jnp.ones([n if w > 1 else 1 for n, w in zip(x.shape, size, strict=True)], x.dtype)
        return total / lax.reduce_window(covered, 0.0, lax.add, size, step, "SAME")


@dataclass(frozen=True, kw_only=True)
class _GlobalPooling(Layer):
    """The options of pooling over all spatial axes."""

    data_format: str = "channels_last"
    keepdims: bool = False

    def __post_init__(self) -> None:
        """Refuse option values that Keras does not define."""
        one_of("data_format", self.data_format, DATA_FORMATS)


@dataclass(frozen=True, kw_only=True)
class GlobalAveragePooling(_GlobalPooling):
    """GlobalAveragePooling1D, 2D, 3D; half precision is summed in float32."""

    def call(
        self, state: LayerState, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """The mean over space; in 1D over the steps that the mask keeps."""
        axes = spatial_axes(self.data_format, x.ndim)
        if state.mask is not None and x.ndim == 3:
            keep = jnp.expand_dims(state.mask, -1 if axes == (1,) else 1).astype(bool)
            total = jnp.sum(jnp.where(keep, x, 0), axes, keepdims=self.keepdims)
            return total / jnp.sum(keep.astype(x.dtype), axes, keepdims=self.keepdims)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.mean(x, axes, dtype=wide, keepdims=self.keepdims).astype(x.dtype)


@dataclass(frozen=True, kw_only=True)
class GlobalMaxPooling(_GlobalPooling):
    """GlobalMaxPooling1D, 2D, 3D."""

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """The maximum over space."""
        return jnp.max(x, spatial_axes(self.data_format, x.ndim), keepdims=self.keepdims)


@dataclass(frozen=True, kw_only=True)
class _AdaptivePooling(Layer):
    """Pooling to a given size: bin i of m covers i * n // m to ceil((i + 1) * n / m)."""

    output_size: int | tuple[int, ...]
    data_format: str = "channels_last"

    def __post_init__(self) -> None:
        """Refuse option values that Keras does not define."""
        one_of("data_format", self.data_format, DATA_FORMATS)

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Pool one axis after the other: the bins are products."""
        axes = spatial_axes(self.data_format, x.ndim)
        for axis, count in zip(axes, as_tuple(self.output_size, len(axes)), strict=True):
            size = x.shape[axis]
            bins = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
            parts = [
                self.reduce(lax.slice_in_dim(x, start, stop, axis=axis), axis)
                for start, stop in bins
            ]
            x = jnp.concatenate(parts, axis)
        return x

    def reduce(self, x: jax.Array, axis: int) -> jax.Array:
        """One value for all of an axis, which stays as one of size 1."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class AdaptiveAveragePooling(_AdaptivePooling):
    """AdaptiveAveragePooling1D, 2D, 3D."""

    def reduce(self, x: jax.Array, axis: int) -> jax.Array:
        """The mean."""
        return jnp.mean(x, axis, keepdims=True)


@dataclass(frozen=True, kw_only=True)
class AdaptiveMaxPooling(_AdaptivePooling):
    """AdaptiveMaxPooling1D, 2D, 3D."""

    def reduce(self, x: jax.Array, axis: int) -> jax.Array:
        """The maximum."""
        return jnp.max(x, axis, keepdims=True)
