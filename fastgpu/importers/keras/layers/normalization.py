"""Normalization layers: by batch, by layer, and by statistics adapted before training."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu.importers.keras.layers.initializers import ONES, ZEROS, Initializer
from fastgpu.importers.keras.layers.layer import (
    ANY,
    Layer,
    LayerState,
    along_axis,
    positive_axis,
)

# Keras's backend.epsilon(), the smallest deviation that Normalization divides by.
_EPSILON = 1e-7


@dataclass(frozen=True, kw_only=True)
class BatchNormalization(Layer):
    """BatchNormalization (Ioffe and Szegedy, arXiv:1502.03167), with Keras's biased variance.

    `trainable=False` makes it use the moving statistics even in training, as in Keras.
    """

    axis: int | tuple[int, ...] = -1
    momentum: float = 0.99
    epsilon: float = 1e-3
    center: bool = True
    scale: bool = True
    beta_initializer: Initializer = ZEROS
    gamma_initializer: Initializer = ONES
    moving_mean_initializer: Initializer = ZEROS
    moving_variance_initializer: Initializer = ONES
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {
        "renorm": (False,),
        "renorm_clipping": (None, ()),
        "renorm_momentum": ANY,
        "synchronized": (False,),
        "fused": ANY,
        "virtual_batch_size": (None,),
    }
    supports_masking: ClassVar[bool] = True
    mixes_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Keras 2 writes the axis as a list of one."""
        if not isinstance(self.axis, int):
            (axis,) = self.axis
            object.__setattr__(self, "axis", axis)

    def call(
        self, state: LayerState, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """Normalize over all axes but one; masked positions do not count in training."""
        assert isinstance(self.axis, int)
        axis = positive_axis(self.axis, x.ndim)
        shape = (x.shape[axis],)
        gamma = beta = None
        if self.scale:
            gamma = state.weight("gamma", shape, self.gamma_initializer, autocast=False)
        if self.center:
            beta = state.weight("beta", shape, self.beta_initializer, autocast=False)
        mean = state.statistic("moving_mean", shape, self.moving_mean_initializer)
        variance = state.statistic("moving_variance", shape, self.moving_variance_initializer)

        # Half precision overflows in sums of squares: compute in float32, cast the result.
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        x, mean, variance = x.astype(dtype), mean.astype(dtype), variance.astype(dtype)
        if train and not state.frozen:
            if state.mask is None:
                batch_mean, batch_variance = _moments(x, axis)
            else:
                batch_mean, batch_variance = _masked_moments(x, axis, state.mask)
            keep = self.momentum
            state.update_statistic("moving_mean", mean * keep + batch_mean * (1.0 - keep))
            state.update_statistic(
                "moving_variance", variance * keep + batch_variance * (1.0 - keep)
            )
            mean, variance = batch_mean, batch_variance
        return _normalize(x, mean, variance, axis, gamma, beta, self.epsilon).astype(
            state.policy.compute_dtype
        )


def _moments(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance over all axes but `axis`, both accurate and cheap to differentiate.

    E[(x - c)^2] - (E[x] - c)^2 is the variance whatever the constant c is, so c needs no gradient,
    and its derivatives of every order are right. With c = E[x] nothing cancels, the second term is
    zero, and the gradient saves the sum over x - E[x] that it has for `jnp.var`.
    """
    axes = tuple(i for i in range(x.ndim) if i != axis)
    mean = jnp.mean(x, axes)
    centre = lax.stop_gradient(mean)
    spread = jnp.mean(jnp.square(x - along_axis(centre, axis, x.ndim)), axes)
    return mean, spread - jnp.square(mean - centre)


def _masked_moments(x: jax.Array, axis: int, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance over the positions that `mask`, without the last axis, keeps."""
    axes = tuple(i for i in range(x.ndim) if i != axis)
    keep = jnp.broadcast_to(mask[..., None].astype(bool), x.shape)
    count = jnp.sum(keep.astype(x.dtype), axes) + _EPSILON
    mean = jnp.sum(jnp.where(keep, x, 0), axes) / count
    difference = jnp.where(keep, x - along_axis(mean, axis, x.ndim), 0)
    return mean, jnp.sum(jnp.square(difference), axes) / count


def _normalize(
    x: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    axis: int,
    gamma: jax.Array | None,
    beta: jax.Array | None,
    epsilon: float,
) -> jax.Array:
    """One multiply and one add per element: the per-channel part is folded into two vectors."""
    factor = lax.rsqrt(variance + epsilon)
    if gamma is not None:
        factor = factor * gamma.astype(x.dtype)
    offset = -mean * factor
    if beta is not None:
        offset = offset + beta.astype(x.dtype)
    return x * along_axis(factor, axis, x.ndim) + along_axis(offset, axis, x.ndim)


@dataclass(frozen=True, kw_only=True)
class LayerNormalization(Layer):
    """LayerNormalization (Lei Ba et al., arXiv:1607.06450) over one or several axes."""

    axis: int | tuple[int, ...] = -1
    epsilon: float = 1e-3
    center: bool = True
    scale: bool = True
    beta_initializer: Initializer = ZEROS
    gamma_initializer: Initializer = ONES
    autocast: ClassVar[bool] = False
    rms_scaling: bool = False
    supports_masking: ClassVar[bool] = True

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Normalize every example over the given axes; `rms_scaling` does not take off the mean."""
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        axes = tuple(sorted(positive_axis(axis, x.ndim) for axis in axes))
        shape = tuple(x.shape[axis] for axis in axes)
        broadcast = [x.shape[axis] if axis in axes else 1 for axis in range(x.ndim)]
        original, dtype = x.dtype, jnp.promote_types(x.dtype, jnp.float32)
        x = x.astype(dtype)
        mean = jnp.mean(x, axes, keepdims=True)
        variance = jnp.mean(jnp.square(x - mean), axes, keepdims=True)
        factor = lax.rsqrt(variance + self.epsilon)
        if self.scale or self.rms_scaling:
            gamma = state.weight("gamma", shape, self.gamma_initializer, autocast=False)
            factor = factor * gamma.astype(dtype).reshape(broadcast)
        offset = jnp.zeros_like(mean) if self.rms_scaling else -mean * factor
        if self.center and not self.rms_scaling:
            beta = state.weight("beta", shape, self.beta_initializer, autocast=False)
            offset = offset + beta.astype(dtype).reshape(broadcast)
        return (x * factor + offset).astype(original).astype(state.policy.compute_dtype)


@dataclass(frozen=True, kw_only=True)
class Normalization(Layer):
    """Normalization by a mean and a variance from the config, or from weights set by `adapt`."""

    axis: int | tuple[int, ...] | None = -1
    mean: Any = None
    variance: Any = None
    invert: bool = False
    supports_masking: ClassVar[bool] = True

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """(x - mean) / deviation, or back with `invert`."""
        axes = () if self.axis is None else self.axis
        axes = (axes,) if isinstance(axes, int) else axes
        axes = tuple(sorted(positive_axis(axis, x.ndim) for axis in axes))
        broadcast = [x.shape[axis] if axis in axes else 1 for axis in range(x.ndim)]
        if self.mean is None:
            shape = tuple(x.shape[axis] for axis in axes)
            mean = state.constant("mean", shape, ZEROS).reshape(broadcast)
            variance = state.constant("variance", shape, ONES).reshape(broadcast)
            state.constant("count", (), ZEROS, "int32")
        else:
            mean = _right_aligned(self.mean, axes, x.ndim)
            variance = _right_aligned(self.variance, axes, x.ndim)
        dtype = state.policy.compute_dtype
        x, mean, variance = x.astype(dtype), mean.astype(dtype), variance.astype(dtype)
        deviation = jnp.maximum(jnp.sqrt(variance), _EPSILON)
        return mean + x * deviation if self.invert else (x - mean) / deviation


def _right_aligned(values: Any, axes: tuple[int, ...], ndim: int) -> jax.Array:
    """Place the axes of `values` on the last ones of `axes`, as Keras broadcasts them."""
    array = jnp.asarray(values, jnp.float32)
    shape = [1] * ndim
    for i in range(1, array.ndim + 1):
        shape[axes[-i]] = array.shape[-i]
    return array.reshape(shape)
