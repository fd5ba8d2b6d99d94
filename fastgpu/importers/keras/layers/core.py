"""Dense, Embedding, activations and rescaling."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax, nn

from fastgpu.importers.keras.layers.activations import LINEAR, Activation
from fastgpu.importers.keras.layers.initializers import (
    GLOROT_UNIFORM,
    RANDOM_UNIFORM,
    ZEROS,
    Initializer,
)
from fastgpu.importers.keras.layers.layer import ANY, MERGED, Layer, LayerState


@dataclass(frozen=True, kw_only=True)
class Identity(Layer):
    """Identity."""

    supports_masking: ClassVar[bool] = True

    def call(self, state: LayerState, x: Any, *, train: bool) -> Any:
        """Return the input."""
        return x


@dataclass(frozen=True, kw_only=True)
class Dense(Layer):
    """Dense over the last axis."""

    units: int
    activation: Activation = LINEAR
    use_bias: bool = True
    kernel_initializer: Initializer = GLOROT_UNIFORM
    bias_initializer: Initializer = ZEROS
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {"quantization_config": (None,), **MERGED}
    supports_masking: ClassVar[bool] = True

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Kernel (in, units)."""
        kernel = state.weight("kernel", (x.shape[-1], self.units), self.kernel_initializer)
        dtype = jnp.promote_types(x.dtype, kernel.dtype)
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        y = lax.dot_general(x.astype(dtype), kernel.astype(dtype), contract)
        if self.use_bias:
            y = y + state.weight("bias", (self.units,), self.bias_initializer)
        return self.activation(y)


@dataclass(frozen=True, kw_only=True)
class Embedding(Layer):
    """Embedding: row i of the table for every integer i; `mask_zero` masks the zeros."""

    input_dim: int
    output_dim: int
    mask_zero: bool = False
    embeddings_initializer: Initializer = RANDOM_UNIFORM
    autocast: ClassVar[bool] = False
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {
        "input_length": ANY,
        "quantization_config": (None,),
        **MERGED,
    }

    def output_mask(self, masks: tuple[Any, ...], *inputs: Any) -> Any:
        """Where the integers are not zero."""
        return inputs[0] != 0 if self.mask_zero else None

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Integers (...) to vectors (..., output_dim)."""
        shape = (self.input_dim, self.output_dim)
        table = state.weight("embeddings", shape, self.embeddings_initializer)
        if not jnp.issubdtype(x.dtype, jnp.integer):
            x = x.astype("int32")
        return jnp.take(table, x, axis=0)


@dataclass(frozen=True, kw_only=True)
class ReversibleEmbedding(Embedding):
    """ReversibleEmbedding: an embedding, and with `reverse=True` the logits of its rows."""

    tie_weights: bool = True
    reverse_dtype: str | None = None
    logit_soft_cap: float | None = None

    def call(
        self, state: LayerState, x: jax.Array, *, train: bool, reverse: bool = False
    ) -> jax.Array:
        """Integers (...) to vectors (..., output_dim), or vectors to logits (..., input_dim)."""
        shape = (self.input_dim, self.output_dim)
        table = state.weight("embeddings", shape, self.embeddings_initializer)
        kernel = table.T
        if not self.tie_weights:
            initializer = self.embeddings_initializer
            kernel = state.weight("reverse_embeddings", shape[::-1], initializer)
        if not reverse:
            return jnp.take(table, x.astype("int32"), axis=0)
        x = x.astype(kernel.dtype)
        if self.reverse_dtype is not None:
            x, kernel = x.astype(self.reverse_dtype), kernel.astype(self.reverse_dtype)
        logits = x @ kernel
        cap = self.logit_soft_cap
        return logits if cap is None else jnp.tanh(logits / cap) * cap


@dataclass(frozen=True, kw_only=True)
class Masking(Layer):
    """Masking: zeros the steps whose features all equal a value, and masks them from here on."""

    mask_value: float = 0.0

    def output_mask(self, masks: tuple[Any, ...], *inputs: Any) -> Any:
        """The steps that are kept."""
        return jnp.any(inputs[0] != self.mask_value, axis=-1)

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Zero the masked steps."""
        keep = jnp.any(x != self.mask_value, axis=-1, keepdims=True)
        return jnp.where(keep, x, jnp.zeros_like(x))


@dataclass(frozen=True, kw_only=True)
class ActivationLayer(Layer):
    """Activation."""

    activation: Activation
    supports_masking: ClassVar[bool] = True

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Apply the activation."""
        return self.activation(x)


@dataclass(frozen=True, kw_only=True)
class ReLU(Layer):
    """ReLU with a ceiling, a slope below the threshold, and a threshold."""

    max_value: float | None = None
    negative_slope: float = 0.0
    threshold: float = 0.0
    supports_masking: ClassVar[bool] = True

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Keras's `relu` with all its options."""
        if self.negative_slope and self.max_value is None and not self.threshold:
            return nn.leaky_relu(x, self.negative_slope)
        if self.max_value == 6 and not self.threshold:
            y = nn.relu6(x)
        else:
            y = jnp.where(x > self.threshold, x, 0) if self.threshold else nn.relu(x)
            y = y if self.max_value is None else jnp.clip(y, 0, self.max_value)
        if not self.negative_slope:
            return y
        below = nn.relu(self.threshold - x) if self.threshold else nn.relu(-x)
        return y - self.negative_slope * below


@dataclass(frozen=True, kw_only=True)
class LeakyReLU(Layer):
    """LeakyReLU; Keras 2 calls the slope `alpha`."""

    negative_slope: float = 0.3
    renamed: ClassVar[dict[str, str]] = {"alpha": "negative_slope"}
    supports_masking: ClassVar[bool] = True

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """x above zero, slope * x below."""
        return nn.leaky_relu(x, self.negative_slope)


@dataclass(frozen=True, kw_only=True)
class ThresholdedReLU(Layer):
    """ThresholdedReLU of Keras 2."""

    theta: float = 1.0
    supports_masking: ClassVar[bool] = True

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """x above the threshold, zero elsewhere."""
        return jnp.where(x > self.theta, x, jnp.zeros_like(x))


@dataclass(frozen=True, kw_only=True)
class ELU(Layer):
    """ELU."""

    alpha: float = 1.0
    supports_masking: ClassVar[bool] = True

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """x above zero, alpha * (exp(x) - 1) below."""
        return nn.elu(x, self.alpha)


@dataclass(frozen=True, kw_only=True)
class PReLU(Layer):
    """PReLU: a learned slope per position, shared over some axes (counted from 1)."""

    alpha_initializer: Initializer = ZEROS
    shared_axes: int | tuple[int, ...] | None = None
    supports_masking: ClassVar[bool] = True

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """x above zero, alpha * x below."""
        shared = (self.shared_axes,) if isinstance(self.shared_axes, int) else self.shared_axes
        shape = tuple(1 if i in (shared or ()) else x.shape[i] for i in range(1, x.ndim))
        alpha = state.weight("alpha", shape, self.alpha_initializer)
        return nn.relu(x) - alpha * nn.relu(-x)


@dataclass(frozen=True, kw_only=True)
class Softmax(Layer):
    """Softmax over one axis or several."""

    axis: int | tuple[int, ...] = -1
    supports_masking: ClassVar[bool] = True

    def call(
        self, state: LayerState, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """exp(x) / sum(exp(x)) over what the mask keeps, zero elsewhere."""
        return masked_softmax(x, state.mask, self.axis)


def masked_softmax(
    x: jax.Array, mask: jax.Array | None, axis: int | tuple[int, ...] = -1
) -> jax.Array:
    """Softmax over the positions that a mask keeps; all zeros where it keeps none.

    >>> masked_softmax(jnp.zeros(3), jnp.array([True, True, False])).tolist()
    [0.5, 0.5, 0.0]
    """
    if mask is None:
        return nn.softmax(x, axis)
    keep = mask if mask.dtype == bool else mask > 0.5
    lowest = -3e4 if x.dtype == jnp.float16 else -1e9
    return jnp.where(keep, nn.softmax(jnp.where(keep, x, lowest), axis), 0)


@dataclass(frozen=True, kw_only=True)
class Rescaling(Layer):
    """Rescaling: x * scale + offset, numbers or one per channel; integers become floats."""

    scale: Any
    offset: Any = 0.0
    supports_masking: ClassVar[bool] = True

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Rescale in the compute dtype."""
        dtype = state.policy.compute_dtype
        return x.astype(dtype) * jnp.asarray(self.scale, dtype) + jnp.asarray(self.offset, dtype)
