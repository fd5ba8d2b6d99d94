"""Spectrograms of sound: STFTSpectrogram by learned kernels, MelSpectrogram by FFT."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fastgpu.importers.keras.layers.initializers import GLOROT_UNIFORM
from fastgpu.importers.keras.layers.layer import ANY, DATA_FORMATS, Layer, LayerState, one_of

_MODES = ("log", "magnitude", "psd", "real", "imag", "angle", "stft")
_EPSILON = 1e-7


@dataclass(frozen=True, kw_only=True)
class STFTSpectrogram(Layer):
    """STFTSpectrogram: a convolution with a real and an imaginary kernel of waves."""

    mode: str = "log"
    frame_length: int = 256
    frame_step: int | None = None
    fft_length: int | None = None
    padding: str = "valid"
    expand_dims: bool = False
    data_format: str = "channels_last"
    # They shape the first value of the kernels, which a file holds.
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {"window": ANY, "periodic": ANY, "scaling": ANY}

    def __post_init__(self) -> None:
        """Refuse option values that Keras does not define."""
        one_of("mode", self.mode, _MODES)
        one_of("padding", self.padding, ("valid", "same"))
        one_of("data_format", self.data_format, DATA_FORMATS)

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """(batch, time, channels) to (batch, frames, channels * frequencies)."""
        x = jnp.moveaxis(x, -1, 1) if self.data_format == "channels_last" else x
        if self.mode == "real":
            return self._arranged(self._waves(state, "real_kernel", x))
        if self.mode == "imag":
            return self._arranged(self._waves(state, "imag_kernel", x))
        real = self._waves(state, "real_kernel", x)
        imag = self._waves(state, "imag_kernel", x)
        if self.mode == "angle":
            return self._arranged(jnp.arctan2(imag, real))
        if self.mode == "stft":
            return self._arranged(jnp.concatenate([real, imag], axis=2))
        power = jnp.square(real) + jnp.square(imag)
        if self.mode == "psd":
            inner = jnp.pad(power[:, :, 1:-1], [(0, 0), (0, 0), (1, 1), (0, 0)])
            return self._arranged(power + inner)
        magnitude = self._arranged(jnp.sqrt(jnp.maximum(power, _EPSILON)))
        return magnitude if self.mode == "magnitude" else jnp.log(jnp.maximum(magnitude, _EPSILON))

    def _waves(self, state: LayerState, name: str, x: jax.Array) -> jax.Array:
        """(batch, channels, time) to (batch, channels, frequencies, frames)."""
        length = self.fft_length or 2 ** (self.frame_length - 1).bit_length()
        kernel = state.weight(name, (self.frame_length, 1, length // 2 + 1), GLOROT_UNIFORM)
        y = lax.conv_general_dilated(
            x.reshape(-1, 1, x.shape[-1]).astype(kernel.dtype),
            kernel,
            (self.frame_step or self.frame_length // 2,),
            self.padding.upper(),
            dimension_numbers=("NCW", "WIO", "NCW"),
        )
        return y.reshape(*x.shape[:2], *y.shape[1:])

    def _arranged(self, y: jax.Array) -> jax.Array:
        """(batch, channels, frequencies, frames) with the axes where the options want them."""
        last = self.data_format == "channels_last"
        if self.expand_dims:
            return y.transpose(0, 3, 2, 1) if last else y.transpose(0, 1, 3, 2)
        y = y.reshape(y.shape[0], -1, y.shape[-1])
        return y.transpose(0, 2, 1) if last else y


@dataclass(frozen=True, kw_only=True)
class MelSpectrogram(Layer):
    """MelSpectrogram: power by frequency on the mel scale (HTK's), in decibels if asked for."""

    fft_length: int = 2048
    sequence_stride: int = 512
    sequence_length: int | None = None
    window: str | None = "hann"
    sampling_rate: int = 16000
    num_mel_bins: int = 128
    min_freq: float = 20.0
    max_freq: float | None = None
    power_to_db: bool = True
    top_db: float = 80.0
    mag_exp: float = 2.0
    min_power: float = 1e-10
    ref_power: float = 1.0

    def __post_init__(self) -> None:
        """Refuse windows other than the usual ones."""
        one_of("window", self.window, ("hann", "hamming", None))

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """(batch, time) to (batch, num_mel_bins, frames)."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        half = self.fft_length // 2
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(half, half)], mode="reflect")
        starts = np.arange(0, x.shape[-1] - self.fft_length + 1, self.sequence_stride)
        frames = x[..., starts[:, None] + np.arange(self.fft_length)]
        spectrum = jnp.abs(jnp.fft.rfft(frames * self._window())) ** self.mag_exp
        y = spectrum @ self._mel_weights()
        if self.power_to_db:
            y = 10 * jnp.log10(jnp.maximum(y, self.min_power))
            y = y - 10 * np.log10(max(abs(self.ref_power), self.min_power))
            y = jnp.maximum(y, jnp.max(y) - self.top_db)
        return jnp.swapaxes(y, -1, -2).astype(state.policy.compute_dtype)

    def _window(self) -> np.ndarray:
        """The window in the middle of a frame of `fft_length`."""
        length = self.sequence_length or self.fft_length
        phase = np.cos(2 * np.pi * np.arange(length) / length)
        low = {"hann": 0.5, "hamming": 0.46, None: 0.0}[self.window]
        left = (self.fft_length - length) // 2
        window = np.pad(1 - low - low * phase, (left, self.fft_length - length - left))
        return window.astype("float32")

    def _mel_weights(self) -> np.ndarray:
        """Triangles on the mel scale, (frequencies, num_mel_bins); the constant part counts not."""
        mel = lambda hertz: 1127.0 * np.log1p(np.asarray(hertz) / 700.0)  # noqa: E731
        highest = self.max_freq or self.sampling_rate // 2
        edges = np.linspace(mel(self.min_freq), mel(highest), self.num_mel_bins + 2)
        bins = mel(np.linspace(0, self.sampling_rate / 2, self.fft_length // 2 + 1))[1:, None]
        low, center, high = edges[:-2], edges[1:-1], edges[2:]
        rising, falling = (bins - low) / (center - low), (high - bins) / (high - center)
        weights = np.maximum(0, np.minimum(rising, falling))
        return np.pad(weights, [(1, 0), (0, 0)]).astype("float32")
