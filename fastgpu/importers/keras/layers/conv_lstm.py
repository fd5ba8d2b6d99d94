"""ConvLSTM: an LSTM whose products are convolutions."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu.importers.keras.layers.activations import Activation
from fastgpu.importers.keras.layers.cells import (
    SIGMOID,
    TANH,
    Bound,
    Cell,
    UnitForgetBias,
    dropout_masks,
    lstm_step,
)
from fastgpu.importers.keras.layers.initializers import (
    GLOROT_UNIFORM,
    ORTHOGONAL,
    ZEROS,
    Initializer,
)
from fastgpu.importers.keras.layers.layer import (
    DATA_FORMATS,
    LayerState,
    along_axis,
    as_tuple,
    channel_axis,
    one_of,
    positive_axis,
)
from fastgpu.importers.keras.layers.recurrent import Recurrence


@dataclass(frozen=True, kw_only=True)
class ConvLSTM(Recurrence, Cell):
    """ConvLSTM1D, ConvLSTM2D, ConvLSTM3D (Shi et al., arXiv:1506.04214)."""

    filters: int
    kernel_size: int | tuple[int, ...]
    strides: int | tuple[int, ...] = 1
    padding: str = "valid"
    data_format: str = "channels_last"
    dilation_rate: int | tuple[int, ...] = 1
    activation: Activation = TANH
    recurrent_activation: Activation = SIGMOID
    use_bias: bool = True
    unit_forget_bias: bool = True
    kernel_initializer: Initializer = GLOROT_UNIFORM
    recurrent_initializer: Initializer = ORTHOGONAL
    bias_initializer: Initializer = ZEROS
    dropout: float = 0.0
    recurrent_dropout: float = 0.0
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {**Cell.fixed, "time_major": (False,)}

    def __post_init__(self) -> None:
        """Refuse option values that Keras does not define."""
        one_of("padding", self.padding, ("valid", "same"))
        one_of("data_format", self.data_format, DATA_FORMATS)

    def initial(self, projected: jax.Array) -> list[Any]:
        """States h and c as large as the convolved input, with `filters` channels."""
        shape = list(projected.shape)
        shape[channel_axis(self.data_format)] = self.filters
        return [jnp.zeros(shape, projected.dtype)] * 2

    def bind(self, state: LayerState, x: jax.Array, train: bool) -> Bound:
        """Kernels (k..., in, 4 * filters) and (k..., filters, 4 * filters)."""
        rank, channels = x.ndim - 2, channel_axis(self.data_format)
        window = as_tuple(self.kernel_size, rank)
        width = 4 * self.filters
        kernel = state.weight(
            "kernel", (*window, x.shape[channels], width), self.kernel_initializer
        )
        recurrent = state.weight(
            "recurrent_kernel", (*window, self.filters, width), self.recurrent_initializer
        )
        bias = None
        if self.use_bias:
            initializer = self.bias_initializer
            if self.unit_forget_bias:
                initializer = UnitForgetBias(rest=initializer)
            bias = state.weight("bias", (width,), initializer)
        strides, dilation = as_tuple(self.strides, rank), as_tuple(self.dilation_rate, rank)

        def inputs(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return self._convolve(x, kernel, strides, dilation, self.padding.upper())

        def states(h: jax.Array, kernel: jax.Array) -> jax.Array:
            return self._convolve(h, kernel, (1,) * rank, (1,) * rank, "SAME")

        drop = recurrent_drop = None
        if train:
            drop = dropout_masks(state, x.shape, kernel.dtype, self.dropout, 4)
            first = jax.eval_shape(lambda x: self.initial(inputs(x, kernel))[0], x)
            rate = self.recurrent_dropout
            recurrent_drop = dropout_masks(state, first.shape, kernel.dtype, rate, 4)

        def project(x: jax.Array) -> jax.Array:
            lead = x.shape[: x.ndim - rank - 2]
            flat = x.reshape(-1, *x.shape[x.ndim - rank - 1 :])
            masks = drop and [jnp.broadcast_to(m, x.shape).reshape(flat.shape) for m in drop]
            y = self._per_gate(inputs, flat, kernel, masks)
            if bias is not None:
                y = y + along_axis(bias, channels, y.ndim)
            return y.reshape(*lead, -1, *y.shape[1:]) if lead else y

        def step(projected: jax.Array, old: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
            z = projected + self._per_gate(states, old[0], recurrent, recurrent_drop)
            gates = jnp.split(z, 4, axis=channels)
            return lstm_step(gates, old[1], self.activation, self.recurrent_activation)

        return Bound(project, step)

    def _per_gate(self, convolve: Any, x: jax.Array, kernel: jax.Array, masks: Any) -> jax.Array:
        if masks is None:
            return convolve(x, kernel)
        axis = positive_axis(channel_axis(self.data_format), x.ndim)
        parts = jnp.split(kernel, 4, axis=-1)
        return jnp.concatenate(
            [convolve(x * mask, part) for mask, part in zip(masks, parts, strict=True)], axis
        )

    def _convolve(
        self,
        x: jax.Array,
        kernel: jax.Array,
        strides: tuple[int, ...],
        dilation: tuple[int, ...],
        padding: str,
    ) -> jax.Array:
        spatial = "DHW"[-(x.ndim - 2) :]
        layout = f"N{spatial}C" if self.data_format == "channels_last" else f"NC{spatial}"
        return lax.conv_general_dilated(
            x.astype(kernel.dtype),
            kernel,
            strides,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=(layout, f"{spatial}IO", layout),
        )
