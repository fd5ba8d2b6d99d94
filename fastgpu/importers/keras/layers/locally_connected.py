"""Convolutions with a kernel of its own at every position, which Keras 3 no longer has."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.importers.keras.layers.activations import LINEAR, Activation
from fastgpu.importers.keras.layers.initializers import GLOROT_UNIFORM, ZEROS, Initializer
from fastgpu.importers.keras.layers.layer import (
    DATA_FORMATS,
    Layer,
    LayerState,
    as_tuple,
    one_of,
)


@dataclass(frozen=True, kw_only=True)
class LocallyConnected(Layer):
    """LocallyConnected1D, LocallyConnected2D of Keras 2, saved with `implementation=1`."""

    filters: int
    kernel_size: int | tuple[int, ...]
    strides: int | tuple[int, ...] = 1
    data_format: str = "channels_last"
    activation: Activation = LINEAR
    use_bias: bool = True
    kernel_initializer: Initializer = GLOROT_UNIFORM
    bias_initializer: Initializer = ZEROS
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {
        "padding": ("valid",),
        "implementation": (1,),
    }

    def __post_init__(self) -> None:
        """Refuse option values that Keras does not define."""
        one_of("data_format", self.data_format, DATA_FORMATS)

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Kernel (positions, window * in, filters), bias (positions..., filters)."""
        first = self.data_format == "channels_first"
        x = jnp.moveaxis(x, 1, -1) if first else x
        rank, channels = x.ndim - 2, x.shape[-1]
        window, strides = as_tuple(self.kernel_size, rank), as_tuple(self.strides, rank)
        sizes = []
        for axis, (k, s) in enumerate(zip(window, strides, strict=True)):
            starts = np.arange(0, x.shape[1 + 2 * axis] - k + 1, s)
            x = jnp.take(x, starts[:, None] + np.arange(k), axis=1 + 2 * axis)
            sizes.append(len(starts))
        # (batch, positions, window, positions, window, ..., in)
        order = [*range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2)]
        x = x.transpose(0, *order, x.ndim - 1)
        positions, width = int(np.prod(sizes)), int(np.prod(window)) * channels
        patches = x.reshape(x.shape[0], positions, width)
        shape = (positions, width, self.filters)
        kernel = state.weight("kernel", shape, self.kernel_initializer)
        y = jnp.einsum("bpw,pwf->bpf", patches.astype(kernel.dtype), kernel)
        y = y.reshape(-1, *sizes, self.filters)
        if self.use_bias:
            y = y + state.weight("bias", (*sizes, self.filters), self.bias_initializer)
        return self.activation(jnp.moveaxis(y, -1, 1) if first else y)
