"""Random augmentation of images: nothing in inference, noise from "dropout" in training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from fastgpu.errors import UnsupportedLayerError
from fastgpu.importers.keras.layers.layer import (
    ANY,
    DATA_FORMATS,
    Layer,
    LayerState,
    one_of,
    spatial_axes,
)
from fastgpu.importers.keras.layers.preprocessing import centered, crop_to_ratio, resize

# What changes only which numbers are drawn, or how other data than images is treated.
_FIXED: dict[str, tuple[Any, ...]] = {
    "seed": ANY,
    "rng_type": ANY,
    "auto_vectorize": ANY,
    "bounding_box_format": ANY,
    "value_range": ANY,
    "data_format": ANY,
}


@dataclass(frozen=True, kw_only=True)
class RandomFlip(Layer):
    """RandomFlip: every image is flipped or not, each way with probability one half."""

    mode: str = "horizontal_and_vertical"
    data_format: str = "channels_last"
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = _FIXED

    def __post_init__(self) -> None:
        """Refuse option values that Keras does not define."""
        one_of("mode", self.mode, ("horizontal", "vertical", "horizontal_and_vertical"))
        one_of("data_format", self.data_format, DATA_FORMATS)

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Flip along height, width, or both independently."""
        x = x.astype(state.policy.compute_dtype)
        if not train:
            return x
        names = ("vertical", "horizontal")
        for axis, name in zip(spatial_axes(self.data_format, x.ndim), names, strict=True):
            if name in self.mode:
                flip = jax.random.bernoulli(state.key(), 0.5, (x.shape[0], 1, 1, 1))
                x = jnp.where(flip, jnp.flip(x, axis), x)
        return x


@dataclass(frozen=True, kw_only=True)
class RandomBrightness(Layer):
    """RandomBrightness: one random number is added to all of an image, which is then clipped."""

    factor: float | tuple[float, float]
    value_range: tuple[float, float] = (0, 255)
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = _FIXED

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Brighten or darken every image."""
        x = x.astype(state.policy.compute_dtype)
        if not train:
            return x
        low, high = self.value_range
        factor = self.factor
        factor = (-factor, factor) if isinstance(factor, int | float) else factor
        key, shape = state.key(), (x.shape[0], 1, 1, 1)
        delta = jax.random.uniform(key, shape, x.dtype, min(factor), max(factor)) * (high - low)
        return jnp.clip(x + delta, low, high)


@dataclass(frozen=True, kw_only=True)
class RandomCrop(Layer):
    """RandomCrop: in training one random part of all images of a batch.

    In inference Keras 3 leaves images as large as they are; Keras 2 takes their middle.
    """

    height: int
    width: int
    data_format: str = "channels_last"
    crops_always: bool = False
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = _FIXED

    @classmethod
    def complete(cls, config: Mapping[str, Any], keras_2: bool) -> Mapping[str, Any]:
        """Which of the two Keras it is."""
        return {**config, "crops_always": keras_2}

    def __post_init__(self) -> None:
        """Refuse option values that Keras does not define."""
        one_of("data_format", self.data_format, DATA_FORMATS)

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """(batch, height, width, channels) to the new height and width."""
        if not train:
            return centered(x, self) if self.crops_always else x
        axes, size = spatial_axes(self.data_format, x.ndim), (self.height, self.width)
        spare = [x.shape[axis] - length for axis, length in zip(axes, size, strict=True)]
        if min(spare) <= 0:
            return resize(crop_to_ratio(x, size, axes), size, axes, "bilinear", False)
        for axis, extra, length in zip(axes, spare, size, strict=True):
            start = jax.random.randint(state.key(), (), 0, extra + 1)
            x = jax.lax.dynamic_slice_in_dim(x, start, length, axis)
        return x


@dataclass(frozen=True, kw_only=True)
class InferenceOnly(Layer):
    """An augmentation that leaves images alone in inference and has no equal in training."""

    @classmethod
    def named(cls, class_name: str, options: tuple[str, ...]) -> type[Layer]:
        """The rule of one class, which takes any value of its options."""
        fixed = {**_FIXED, **dict.fromkeys(options, ANY)}
        doc = f"{class_name}: the image in inference; refused in training."
        return type(class_name, (cls,), {"fixed": fixed, "__doc__": doc})

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """Return the images; raise `UnsupportedLayerError` in training."""
        if train:
            raise UnsupportedLayerError(
                f"layer {'/'.join(state.path)!r} ({type(self).__name__}) has no equal in training",
                expected="train=False, or augmentation before the model",
                fix="augment in the input pipeline, or replace the layer with "
                "custom_objects={name: function}",
            )
        return x.astype(state.policy.compute_dtype)


_FILL = ("fill_mode", "fill_value", "interpolation")
_INFERENCE_ONLY: dict[str, tuple[str, ...]] = {
    "AugMix": ("num_chains", "chain_depth", "factor", "alpha", "all_ops", "interpolation"),
    "CutMix": ("factor",),
    "Equalization": ("bins",),
    "MixUp": ("alpha",),
    "RandAugment": ("num_ops", "factor", "interpolation"),
    "RandomColorDegeneration": ("factor",),
    "RandomColorJitter": (
        *("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor"),
    ),
    "RandomContrast": ("factor",),
    "RandomElasticTransform": ("factor", "scale", *_FILL),
    "RandomErasing": ("factor", "scale", "fill_value"),
    "RandomGaussianBlur": ("factor", "kernel_size", "sigma"),
    "RandomGrayscale": ("factor",),
    "RandomHue": ("factor",),
    "RandomInvert": ("factor",),
    "RandomPerspective": ("factor", "scale", "interpolation", "fill_value"),
    "RandomPosterization": ("factor",),
    "RandomRotation": ("factor", *_FILL),
    "RandomSaturation": ("factor",),
    "RandomSharpness": ("factor",),
    "RandomShear": ("x_factor", "y_factor", *_FILL),
    "RandomTranslation": ("height_factor", "width_factor", *_FILL),
    "Solarization": ("addition_factor", "threshold_factor"),
    "RandomZoom": ("height_factor", "width_factor", *_FILL),
}
INFERENCE_ONLY = {
    name: InferenceOnly.named(name, options) for name, options in _INFERENCE_ONLY.items()
}
