"""Layers that add randomness in training, from the "dropout" stream, and nothing otherwise."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from fastgpu.importers.keras.layers.layer import ANY, DATA_FORMATS, Layer, LayerState, one_of


@dataclass(frozen=True, kw_only=True)
class Dropout(Layer):
    """Dropout (Srivastava et al., 2014). Sizes of `noise_shape` may be None: as the input."""

    rate: float
    noise_shape: tuple[int | None, ...] | None = None
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {"seed": ANY}
    supports_masking: ClassVar[bool] = True

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Zero some values and scale the others up."""
        return drop(state, x, self.rate, self.shape(x)) if train else x

    def shape(self, x: jax.Array) -> tuple[int, ...]:
        """The shape of the mask."""
        sizes = self.noise_shape or (None,) * x.ndim
        return tuple(n if size is None else size for n, size in zip(x.shape, sizes, strict=True))


@dataclass(frozen=True, kw_only=True)
class SpatialDropout(Layer):
    """SpatialDropout1D, 2D, 3D: drops whole channels."""

    rate: float
    data_format: str = "channels_last"
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {"seed": ANY, "noise_shape": (None,)}
    supports_masking: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse option values that Keras does not define."""
        one_of("data_format", self.data_format, DATA_FORMATS)

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Zero some channels and scale the others up."""
        channel = x.ndim - 1 if self.data_format == "channels_last" else 1
        shape = tuple(n if axis in (0, channel) else 1 for axis, n in enumerate(x.shape))
        return drop(state, x, self.rate, shape) if train else x


@dataclass(frozen=True, kw_only=True)
class AlphaDropout(Dropout):
    """AlphaDropout (Klambauer et al., arXiv:1706.02515), which keeps mean and variance."""

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Set some values to the negative saturation of SELU."""
        if not train or self.rate == 0:
            return x
        alpha = -1.6732632423543772 * 1.0507009873554805
        scale = ((1 - self.rate) * (1 + self.rate * alpha**2)) ** -0.5
        keep = jax.random.bernoulli(state.key(), 1 - self.rate, self.shape(x))
        return scale * jnp.where(keep, x, alpha) - scale * alpha * self.rate


@dataclass(frozen=True, kw_only=True)
class ActivityRegularization(Layer):
    """ActivityRegularization: the input; its penalty on the loss is reported as ignored."""

    penalties: ClassVar[tuple[str, ...]] = ("l1", "l2")
    supports_masking: ClassVar[bool] = True

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Return the input."""
        return x


@dataclass(frozen=True, kw_only=True)
class GaussianDropout(Layer):
    """GaussianDropout: multiplies by noise around one."""

    rate: float
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {"seed": ANY}
    supports_masking: ClassVar[bool] = True

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """x * N(1, rate / (1 - rate))."""
        if not train or self.rate == 0:
            return x
        deviation = math.sqrt(self.rate / (1.0 - self.rate))
        return x * (1 + deviation * jax.random.normal(state.key(), x.shape, x.dtype))


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Layer):
    """GaussianNoise: adds noise around zero."""

    stddev: float
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {"seed": ANY}
    supports_masking: ClassVar[bool] = True

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """x + N(0, stddev^2)."""
        if not train or self.stddev == 0:
            return x
        return x + self.stddev * jax.random.normal(state.key(), x.shape, x.dtype)


def drop(state: LayerState, x: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Zero values of `x` with a mask of `shape`, which broadcasts, and scale up the others."""
    if rate == 0:
        return x
    if rate == 1:
        return jnp.zeros_like(x)
    keep = jax.random.bernoulli(state.key(), 1.0 - rate, shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
