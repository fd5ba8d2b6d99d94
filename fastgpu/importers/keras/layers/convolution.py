"""Convolutions. Kernels keep Keras's names and shapes; reshapes happen inside.

Everything lowers to `conv_general_dilated`, so that the convolution passes recognise it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from jax import lax

from fastgpu.importers.keras.layers.activations import LINEAR, Activation
from fastgpu.importers.keras.layers.initializers import GLOROT_UNIFORM, ZEROS, Initializer
from fastgpu.importers.keras.layers.layer import (
    ANY,
    DATA_FORMATS,
    MERGED,
    Layer,
    LayerState,
    along_axis,
    as_tuple,
    channel_axis,
    one_of,
    spatial_axes,
)


@dataclass(frozen=True, kw_only=True)
class _Convolution(Layer):
    """The options that all convolutions share."""

    kernel_size: int | tuple[int, ...]
    strides: int | tuple[int, ...] = 1
    padding: str = "valid"
    data_format: str = "channels_last"
    dilation_rate: int | tuple[int, ...] = 1
    activation: Activation = LINEAR
    use_bias: bool = True
    bias_initializer: Initializer = ZEROS

    def __post_init__(self) -> None:
        """Refuse option values that Keras does not define."""
        one_of("padding", self.padding, ("valid", "same", "causal"))
        one_of("data_format", self.data_format, DATA_FORMATS)

    def window(self, x: jax.Array) -> tuple[int, ...]:
        """The kernel size per spatial axis."""
        return as_tuple(self.kernel_size, x.ndim - 2)

    def convolve(
        self,
        x: jax.Array,
        kernel: jax.Array,
        groups: int,
        strides: int | tuple[int, ...] | None = None,
    ) -> jax.Array:
        """The convolution itself; `kernel` is (spatial..., in / groups, out)."""
        rank = x.ndim - 2
        spatial = "DHW"[-rank:]
        layout = f"N{spatial}C" if self.data_format == "channels_last" else f"NC{spatial}"
        dilation = as_tuple(self.dilation_rate, rank)
        padding: Any = self.padding.upper()
        if padding == "CAUSAL":
            padding = [(dilation[0] * (kernel.shape[0] - 1), 0)]
        return lax.conv_general_dilated(
            x.astype(kernel.dtype),
            kernel,
            as_tuple(self.strides if strides is None else strides, rank),
            padding,
            rhs_dilation=dilation,
            dimension_numbers=(layout, f"{spatial}IO", layout),
            feature_group_count=groups,
        )

    def finish(self, state: LayerState, y: jax.Array) -> jax.Array:
        """Add the bias and apply the activation."""
        if self.use_bias:
            axis = channel_axis(self.data_format)
            bias = state.weight("bias", (y.shape[axis],), self.bias_initializer)
            y = y + along_axis(bias, axis, y.ndim)
        return self.activation(y)


@dataclass(frozen=True, kw_only=True)
class Conv(_Convolution):
    """Conv1D, Conv2D, Conv3D, with groups."""

    filters: int
    groups: int = 1
    kernel_initializer: Initializer = GLOROT_UNIFORM
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = MERGED

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Kernel (spatial..., in / groups, filters)."""
        channels = x.shape[channel_axis(self.data_format)]
        shape = (*self.window(x), channels // self.groups, self.filters)
        kernel = state.weight("kernel", shape, self.kernel_initializer)
        return self.finish(state, self.convolve(x, kernel, self.groups))


@dataclass(frozen=True, kw_only=True)
class ConvTranspose(_Convolution):
    """Conv1DTranspose, Conv2DTranspose, Conv3DTranspose."""

    filters: int
    output_padding: int | tuple[int, ...] | None = None
    kernel_initializer: Initializer = GLOROT_UNIFORM
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {"groups": (1,)}

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Kernel (spatial..., filters, in)."""
        rank, window = x.ndim - 2, self.window(x)
        shape = (*window, self.filters, x.shape[channel_axis(self.data_format)])
        kernel = state.weight("kernel", shape, self.kernel_initializer)
        spatial = "DHW"[-rank:]
        layout = f"N{spatial}C" if self.data_format == "channels_last" else f"NC{spatial}"
        y = lax.conv_transpose(
            x.astype(kernel.dtype),
            kernel,
            as_tuple(self.strides, rank),
            self._padding(x),
            rhs_dilation=as_tuple(self.dilation_rate, rank),
            dimension_numbers=(layout, f"{spatial}IO", layout),
            transpose_kernel=True,
        )
        return self.finish(state, y)

    def _padding(self, x: jax.Array) -> Any:
        """The padding of the dilated input; its ends follow from the size that Keras gives."""
        if self.output_padding is None:
            return self.padding.upper()
        rank = x.ndim - 2
        sizes = [x.shape[axis] for axis in spatial_axes(self.data_format, x.ndim)]
        extra = as_tuple(self.output_padding, rank)
        pads = []
        options = (self.window(x), as_tuple(self.strides, rank), as_tuple(self.dilation_rate, rank))
        for n, k, s, d, more in zip(sizes, *options, extra, strict=True):
            k = (k - 1) * d + 1
            same = self.padding == "same"
            full = (n - 1) * s + k
            out = full - 2 * (k // 2 if same else 0) + more
            left = max(full - out, 0) // 2 if same else 0
            pads.append((k - 1 - left, out - full + k - 1 + left))
        return pads


@dataclass(frozen=True, kw_only=True)
class DepthwiseConv(_Convolution):
    """DepthwiseConv1D, DepthwiseConv2D: every channel has its own filters."""

    depth_multiplier: int = 1
    depthwise_initializer: Initializer = GLOROT_UNIFORM
    # Keras 2 writes options of the plain convolution, which mean nothing here.
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {
        "groups": ANY,
        "filters": ANY,
        "kernel_initializer": ANY,
    }

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Kernel (spatial..., in, multiplier)."""
        channels = x.shape[channel_axis(self.data_format)]
        shape = (*self.window(x), channels, self.depth_multiplier)
        kernel = state.weight("kernel", shape, self.depthwise_initializer)
        return self.finish(state, self.convolve(x, per_channel(kernel), channels))


@dataclass(frozen=True, kw_only=True)
class SeparableConv(_Convolution):
    """SeparableConv1D, SeparableConv2D: a depthwise convolution, then a 1x1 one."""

    filters: int
    depth_multiplier: int = 1
    depthwise_initializer: Initializer = GLOROT_UNIFORM
    pointwise_initializer: Initializer = GLOROT_UNIFORM
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {"groups": ANY, "kernel_initializer": ANY}

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Kernels (spatial..., in, multiplier) and (1..., in * multiplier, filters)."""
        window, channels = self.window(x), x.shape[channel_axis(self.data_format)]
        depthwise = state.weight(
            "depthwise_kernel",
            (*window, channels, self.depth_multiplier),
            self.depthwise_initializer,
        )
        pointwise = state.weight(
            "pointwise_kernel",
            (*(1 for _ in window), channels * self.depth_multiplier, self.filters),
            self.pointwise_initializer,
        )
        x = self.convolve(x, per_channel(depthwise), channels)
        return self.finish(state, self.convolve(x, pointwise, 1, strides=1))


def per_channel(kernel: jax.Array) -> jax.Array:
    """A Keras depthwise kernel (k..., in, m) as one with `in` groups, (k..., 1, in * m).

    >>> import numpy as np
    >>> per_channel(np.zeros((3, 3, 8, 2))).shape
    (3, 3, 1, 16)
    """
    return kernel.reshape(*kernel.shape[:-2], 1, -1)
