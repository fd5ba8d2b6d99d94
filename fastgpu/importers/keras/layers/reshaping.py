"""Layers that move, repeat, pad or cut values and compute nothing else."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

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
class Flatten(Layer):
    """Flatten: (batch, everything else). Channels come last even where they are stored first."""

    data_format: str = "channels_last"

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """(batch, ...) to (batch, product)."""
        if self.data_format == "channels_first" and x.ndim > 1:
            x = jnp.moveaxis(x, 1, -1)
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))


@dataclass(frozen=True, kw_only=True)
class Reshape(Layer):
    """Reshape: the target shape does not count the batch; one size may be -1."""

    target_shape: tuple[int, ...]

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """(batch, ...) to (batch, *target_shape)."""
        target = self.target_shape
        if -1 in target:
            known = math.prod(size for size in target if size != -1)
            missing = math.prod(x.shape[1:]) // known
            target = tuple(missing if size == -1 else size for size in target)
        return x.reshape(x.shape[0], *target)


@dataclass(frozen=True, kw_only=True)
class Permute(Layer):
    """Permute: axes counted from 1, the batch stays first."""

    dims: tuple[int, ...]

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Transpose."""
        return x.transpose(0, *self.dims)


@dataclass(frozen=True, kw_only=True)
class RepeatVector(Layer):
    """RepeatVector: (batch, features) to (batch, n, features)."""

    n: int

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Repeat along a new axis."""
        return jnp.broadcast_to(x[:, None], (x.shape[0], self.n, *x.shape[1:]))


@dataclass(frozen=True, kw_only=True)
class UpSampling(Layer):
    """UpSampling1D, UpSampling2D, UpSampling3D: repeat, or (2D) interpolate."""

    size: int | tuple[int, ...] = 2
    data_format: str = "channels_last"
    interpolation: str = "nearest"

    METHODS: ClassVar[tuple[str, ...]] = ("nearest", "bilinear", "bicubic", "lanczos3", "lanczos5")

    def __post_init__(self) -> None:
        """Refuse option values that Keras does not define."""
        one_of("data_format", self.data_format, DATA_FORMATS)
        one_of("interpolation", self.interpolation, self.METHODS)

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Multiply the spatial sizes."""
        axes = spatial_axes(self.data_format, x.ndim)
        factors = as_tuple(self.size, len(axes))
        if self.interpolation != "nearest":
            shape = list(x.shape)
            for axis, factor in zip(axes, factors, strict=True):
                shape[axis] *= factor
            return jax.image.resize(x, shape, self.interpolation, antialias=False)
        for axis, factor in zip(axes, factors, strict=True):
            x = _repeat(x, factor, axis)
        return x


def _repeat(x: jax.Array, times: int, axis: int) -> jax.Array:
    """`jnp.repeat` as a broadcast and a reshape, which XLA folds into the consumer."""
    shape = x.shape
    wide = jnp.broadcast_to(
        jnp.expand_dims(x, axis + 1), (*shape[: axis + 1], times, *shape[axis + 1 :])
    )
    return wide.reshape(*shape[:axis], shape[axis] * times, *shape[axis + 1 :])


@dataclass(frozen=True, kw_only=True)
class ZeroPadding(Layer):
    """ZeroPadding1D, ZeroPadding2D, ZeroPadding3D."""

    padding: Any = 1
    data_format: str = "channels_last"

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Zeros before and after each spatial axis."""
        widths = [(0, 0)] * x.ndim
        for axis, pair in zip(*borders(self.padding, self.data_format, x.ndim), strict=True):
            widths[axis] = pair
        return lax.pad(x, jnp.zeros((), x.dtype), [(*pair, 0) for pair in widths])


@dataclass(frozen=True, kw_only=True)
class Cropping(Layer):
    """Cropping1D, Cropping2D, Cropping3D."""

    cropping: Any = 1
    data_format: str = "channels_last"

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Cut the borders of each spatial axis."""
        for axis, (low, high) in zip(
            *borders(self.cropping, self.data_format, x.ndim), strict=True
        ):
            x = lax.slice_in_dim(x, low, x.shape[axis] - high, axis=axis)
        return x


def borders(
    option: Any, data_format: str, ndim: int
) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """The spatial axes, and for each the pair (before, after) that a Keras option stands for.

    >>> borders(((0, 1), 2), "channels_last", 4)
    ((1, 2), [(0, 1), (2, 2)])
    """
    axes = spatial_axes(data_format, ndim)
    if isinstance(option, int):
        return axes, [(option, option)] * len(axes)
    if len(axes) == 1 and isinstance(option[0], int):
        option = (option,)
    return axes, [(int(p), int(p)) if isinstance(p, int) else (p[0], p[1]) for p in option]
