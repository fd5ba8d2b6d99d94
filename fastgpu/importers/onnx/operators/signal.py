"""Fourier transforms and what goes with them."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.importers.onnx.dtypes import ELEMENT_TYPES, checked_shape, in_use
from fastgpu.importers.onnx.operators.operator import axis_of, operator


@operator("DFT", static=("dft_length",))
def fourier_by_attribute(
    x: jax.Array,
    dft_length: np.ndarray | None = None,
    *,
    axis: int = 1,
    inverse: int = 0,
    onesided: int = 0,
) -> jax.Array:
    """Opsets 17 to 19: the axis is an attribute."""
    return _fourier(x, dft_length, axis, bool(inverse), bool(onesided))


@operator("DFT", since=20, static=("dft_length", "axis"))
def fourier(
    x: jax.Array,
    dft_length: np.ndarray | None = None,
    axis: np.ndarray | None = None,
    *,
    inverse: int = 0,
    onesided: int = 0,
) -> jax.Array:
    """The discrete Fourier transform; complex numbers are pairs on the last axis."""
    along = -2 if axis is None else int(axis.item())
    return _fourier(x, dft_length, along, bool(inverse), bool(onesided))


def _fourier(x: jax.Array, length: Any, axis: int, inverse: bool, onesided: bool) -> jax.Array:
    axis = axis_of(axis, x.ndim)
    half = inverse and onesided
    default = 2 * (x.shape[axis] - 1) if half else x.shape[axis]
    size = default if length is None else int(length.item())
    checked_shape([size], "DFT")
    numbers = x[..., 0] if x.shape[-1] == 1 else jax.lax.complex(x[..., 0], x[..., 1])
    if half:
        return jnp.fft.irfft(numbers, size, axis)[..., None].astype(x.dtype)
    if inverse:
        found = jnp.fft.ifft(numbers, size, axis)
    elif onesided:
        found = jnp.fft.rfft(numbers.real, size, axis)
    else:
        found = jnp.fft.fft(numbers, size, axis)
    return jnp.stack((found.real, found.imag), -1).astype(x.dtype)


@operator("STFT", static=("frame_step", "frame_length"))
def short_time_fourier(
    x: jax.Array,
    frame_step: np.ndarray,
    window: jax.Array | None = None,
    frame_length: np.ndarray | None = None,
    *,
    onesided: int = 1,
) -> jax.Array:
    """The Fourier transforms of frames, each times a window."""
    size = window.shape[0] if window is not None else x.shape[1]
    size = size if frame_length is None else int(frame_length.item())
    step = int(frame_step.item())
    count = 1 + (x.shape[1] - size) // step
    places = np.arange(count)[:, None] * step + np.arange(size)
    frames = x.reshape(*x.shape[:2], -1)[:, places]
    if window is not None:
        frames = frames * window.reshape(-1, 1)
    return _fourier(frames, None, 2, False, bool(onesided))


def _window(factors: tuple[float, float, float]) -> Callable[..., Any]:
    def compute(
        size: np.ndarray, *, output_datatype: int = 1, periodic: int = 1, xp: ModuleType
    ) -> Any:
        (count,) = checked_shape(size, "a window")
        phase = 2 * math.pi * np.arange(count) / (count if periodic else count - 1)
        a, b, c = factors
        values = a - b * np.cos(phase) + c * np.cos(2 * phase)
        return values.astype(ELEMENT_TYPES[output_datatype])

    return compute


operator("HannWindow", static=("size",))(_window((0.5, 0.5, 0.0)))
operator("HammingWindow", static=("size",))(_window((25 / 46, 21 / 46, 0.0)))
operator("BlackmanWindow", static=("size",))(_window((0.42, 0.5, 0.08)))


@operator(
    "MelWeightMatrix",
    static=("mel_bins", "dft_length", "sample_rate", "lower_hertz", "upper_hertz"),
)
def mel_weights(
    mel_bins: np.ndarray,
    dft_length: np.ndarray,
    sample_rate: np.ndarray,
    lower_hertz: np.ndarray,
    upper_hertz: np.ndarray,
    *,
    output_datatype: int = 1,
    xp: ModuleType,
) -> np.ndarray:
    """A matrix from frequencies to mel bands, each a triangle between its neighbours."""
    bins, length = int(mel_bins.item()), int(dft_length.item())
    shape = checked_shape([length // 2 + 1, bins], "MelWeightMatrix")
    low, high = (2595 * np.log10(1 + v.item() / 700) for v in (lower_hertz, upper_hertz))
    mels = np.arange(bins + 2) * (high - low) / (bins + 2) + low
    hertz = 700 * (10 ** (mels / 2595) - 1)
    edges = ((length + 1) * hertz // sample_rate.item()).astype(int)
    weights = np.zeros(shape)
    for i, (left, middle, right) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        if left == middle:
            weights[middle, i] = 1
        else:
            rise = np.arange(left, middle + 1)
            weights[rise, i] = (rise - left) / (middle - left)
        fall = np.arange(middle, right)
        if right > middle:
            weights[fall, i] = (right - fall) / (right - middle)
    return weights.astype(in_use(ELEMENT_TYPES[output_datatype], np))
