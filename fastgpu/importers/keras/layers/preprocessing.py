"""Preprocessing of numbers and images that does the same in training and inference."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import nn

from fastgpu.importers.keras.layers.layer import (
    ANY,
    DATA_FORMATS,
    Layer,
    LayerState,
    one_of,
    spatial_axes,
)

_METHODS = ("nearest", "bilinear", "bicubic", "lanczos3", "lanczos5")
_ENCODINGS = ("int", "one_hot", "multi_hot", "count")


@dataclass(frozen=True, kw_only=True)
class Resizing(Layer):
    """Resizing; the aspect ratio may be kept by cropping or padding first."""

    height: int
    width: int
    interpolation: str = "bilinear"
    crop_to_aspect_ratio: bool = False
    pad_to_aspect_ratio: bool = False
    fill_value: float = 0.0
    antialias: bool = False
    data_format: str = "channels_last"
    autocast: ClassVar[bool] = False
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {
        "fill_mode": ("constant",),
        "bounding_box_format": ANY,
    }

    def __post_init__(self) -> None:
        """Refuse option values that Keras does not define."""
        one_of("data_format", self.data_format, DATA_FORMATS)
        one_of("interpolation", self.interpolation, _METHODS)

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """(batch, height, width, channels) to the new height and width; the dtype stays."""
        axes = spatial_axes(self.data_format, x.ndim)
        size = (self.height, self.width)
        if self.crop_to_aspect_ratio:
            x = crop_to_ratio(x, size, axes)
        elif self.pad_to_aspect_ratio:
            x = self._pad(x, size, axes)
        y = resize(x, size, axes, self.interpolation, self.antialias)
        if jnp.issubdtype(x.dtype, jnp.integer):
            limits = jnp.iinfo(x.dtype)
            y = jnp.clip(jnp.round(y), limits.min, limits.max)
        return y.astype(x.dtype)

    def _pad(self, x: jax.Array, size: tuple[int, int], axes: tuple[int, ...]) -> jax.Array:
        height, width = x.shape[axes[0]], x.shape[axes[1]]
        tall = max(height, int(width * size[0] / size[1]))
        wide = max(width, int(height * size[1] / size[0]))
        top, left = (tall - height) // 2, (wide - width) // 2
        widths = [(0, 0)] * x.ndim
        # As Keras does it: one side only is padded.
        axis, pad = (axes[0], top) if top > 0 else (axes[1], left)
        widths[axis] = (pad, pad)
        return jnp.pad(x, widths, constant_values=self.fill_value)


@dataclass(frozen=True, kw_only=True)
class CenterCrop(Layer):
    """CenterCrop; smaller images are cropped to the aspect ratio and enlarged."""

    height: int
    width: int
    data_format: str = "channels_last"

    def __post_init__(self) -> None:
        """Refuse option values that Keras does not define."""
        one_of("data_format", self.data_format, DATA_FORMATS)

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """(batch, height, width, channels) to the new height and width."""
        return centered(x.astype(state.policy.compute_dtype), self)


def centered(x: jax.Array, to: Any) -> jax.Array:
    """The middle of `x`, of the height and width that a layer has as options."""
    axes, size = spatial_axes(to.data_format, x.ndim), (to.height, to.width)
    spare = [x.shape[axis] - length for axis, length in zip(axes, size, strict=True)]
    if min(spare) < 0:
        return resize(crop_to_ratio(x, size, axes), size, axes, "bilinear", False)
    for axis, extra, length in zip(axes, spare, size, strict=True):
        x = jax.lax.slice_in_dim(x, extra // 2, extra // 2 + length, axis=axis)
    return x


def resize(
    x: jax.Array, size: tuple[int, int], axes: tuple[int, ...], method: str, antialias: bool
) -> jax.Array:
    """`jax.image.resize` of two axes; integers are resized as floats."""
    shape = list(x.shape)
    for axis, length in zip(axes, size, strict=True):
        shape[axis] = length
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.float32)
    return jax.image.resize(x, shape, method, antialias=antialias)


def crop_to_ratio(x: jax.Array, size: tuple[int, int], axes: tuple[int, ...]) -> jax.Array:
    """The middle of `x` that has the aspect ratio of `size`."""
    height, width = x.shape[axes[0]], x.shape[axes[1]]
    kept = (
        max(min(height, int(width * size[0] / size[1])), 1),
        max(min(width, int(height * size[1] / size[0])), 1),
    )
    for axis, length in zip(axes, kept, strict=True):
        start = int((x.shape[axis] - length) / 2)
        x = jax.lax.slice_in_dim(x, start, start + length, axis=axis)
    return x


@dataclass(frozen=True, kw_only=True)
class AutoContrast(Layer):
    """AutoContrast: every channel of every image is stretched over the whole range of values."""

    value_range: tuple[float, float] = (0, 255)
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {"data_format": ANY, "bounding_box_format": ANY}

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Channels of one value stay as they are."""
        x = x.astype(state.policy.compute_dtype)
        low = jnp.min(x, axis=(1, 2), keepdims=True)
        spread = jnp.max(x, axis=(1, 2), keepdims=True) - low
        first, last = self.value_range
        y = (x - low) / jnp.where(spread == 0, 1, spread) * (last - first) + first
        return jnp.where(spread == 0, x, jnp.clip(y, first, last))


@dataclass(frozen=True, kw_only=True)
class CategoryEncoding(Layer):
    """CategoryEncoding of integers below `num_tokens`."""

    num_tokens: int
    output_mode: str = "multi_hot"
    autocast: ClassVar[bool] = False
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {"sparse": (False,)}

    def __post_init__(self) -> None:
        """Refuse option values that Keras does not define."""
        one_of("output_mode", self.output_mode, _ENCODINGS[1:])

    def call(
        self, state: LayerState, x: jax.Array, *, train: bool, count_weights: Any = None
    ) -> jax.Array:
        """(batch, n) to (batch, num_tokens); one_hot keeps the axes, but for one of size 1."""
        dtype = state.policy.compute_dtype
        return encode(x, self.output_mode, self.num_tokens, dtype, count_weights)


@dataclass(frozen=True, kw_only=True)
class Discretization(Layer):
    """Discretization: the number of the bin that a value falls into."""

    bin_boundaries: tuple[float, ...]
    output_mode: str = "int"
    autocast: ClassVar[bool] = False
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {
        "num_bins": ANY,
        "epsilon": ANY,
        "sparse": (False,),
    }

    def __post_init__(self) -> None:
        """Refuse option values that Keras does not define, and a layer that was not adapted."""
        one_of("output_mode", self.output_mode, _ENCODINGS)
        if self.bin_boundaries is None:
            raise ValueError("bin_boundaries=None (the layer was never adapted)")

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Numbers (...) to integers (...), or to an encoding of them."""
        bins = jnp.digitize(x, jnp.asarray(self.bin_boundaries, jnp.float32))
        dtype = "int64" if self.output_mode == "int" else state.policy.compute_dtype
        return encode(bins, self.output_mode, len(self.bin_boundaries) + 1, dtype)


@dataclass(frozen=True, kw_only=True)
class IntegerLookup(Layer):
    """IntegerLookup: the index of an integer in a vocabulary that the config holds."""

    vocabulary: tuple[int, ...]
    max_tokens: int | None = None
    num_oov_indices: int = 1
    mask_token: int | None = None
    output_mode: str = "int"
    pad_to_max_tokens: bool = False
    autocast: ClassVar[bool] = False
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {
        "invert": (False,),
        "sparse": (False,),
        "idf_weights": (None,),
        "oov_token": ANY,
        "oov_method": ANY,
        "salt": ANY,
        "vocabulary_size": ANY,
        "vocabulary_dtype": ANY,
        "encoding": ANY,
    }

    def __post_init__(self) -> None:
        """Refuse what needs strings, and a vocabulary that is not in the config."""
        one_of("output_mode", self.output_mode, _ENCODINGS)
        one_of("num_oov_indices", self.num_oov_indices, (0, 1))
        if not isinstance(self.vocabulary, tuple):
            raise ValueError("vocabulary is not in the config (pass it to the layer)")

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Integers (...) to indices (...), or to an encoding of them."""
        counts_mask = self.mask_token is not None and self.output_mode == "int"
        first = int(counts_mask)
        words = np.asarray(self.vocabulary, "int32")
        order = np.argsort(words)
        place = jnp.searchsorted(words[order], x).clip(0, len(words) - 1)
        unknown = first if self.num_oov_indices else -1
        index = jnp.asarray(order)[place] + first + self.num_oov_indices
        index = jnp.where(jnp.asarray(words[order])[place] == x, index, unknown)
        if self.mask_token is not None:  # Encodings leave it out: -1 is no one-hot vector.
            index = jnp.where(x == self.mask_token, 0 if counts_mask else -1, index)
        size = len(words) + self.num_oov_indices
        size = self.max_tokens if self.pad_to_max_tokens and self.max_tokens else size
        dtype = "int64" if self.output_mode == "int" else state.policy.compute_dtype
        return encode(index, self.output_mode, size, dtype)


def encode(x: Any, mode: str, depth: int, dtype: str, weights: Any = None) -> jax.Array:
    """Indices as they are, as one-hot vectors, or the largest or the sum of those of a row.

    >>> encode(jnp.array([[0, 2, 2]]), "count", 3, "float32").tolist()
    [[1.0, 0.0, 2.0]]
    """
    if mode == "int":
        return x.astype(jax.dtypes.canonicalize_dtype(dtype))
    x = x.astype("int32")
    if mode == "one_hot":
        x = x[..., 0] if x.ndim > 1 and x.shape[-1] == 1 else x
        return nn.one_hot(x, depth, dtype=dtype)
    hot = nn.one_hot(x, depth, dtype=dtype)
    axis = 1 if x.ndim > 1 else 0
    if mode == "multi_hot":
        return jnp.max(hot, axis)
    return jnp.sum(hot if weights is None else hot * weights[..., None].astype(dtype), axis)
