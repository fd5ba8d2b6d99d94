"""VGG (Simonyan and Zisserman, 2014, arXiv:1409.1556): 3×3 convolutions, three dense layers.

Configurations D and E of the paper, without batch norm. Nine tenths of the parameters are in the
dense layers, the first of which belongs to one size of image.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from fastgpu.errors import ModelError


@dataclass(frozen=True)
class VGGConfig:
    """Convolutions in each stage and their channels; units of both dense layers before the head.

    Raises `ModelError` when a stage lacks its number of convolutions or its channels.

    >>> VGGConfig.vgg16(num_classes=10).smallest
    32
    """

    stage_sizes: tuple[int, ...] = (2, 2, 3, 3, 3)
    channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    dense: int = 4096
    num_classes: int = 1000
    dropout: float = 0.5

    def __post_init__(self) -> None:
        if len(self.stage_sizes) != len(self.channels):
            raise ModelError(
                "every stage of a VGG has a number of convolutions and a number of channels",
                expected="stage_sizes and channels of the same length",
                got=f"stage_sizes={self.stage_sizes}, channels={self.channels}",
                fix="set both",
            )

    @property
    def smallest(self) -> int:
        """The least height and width in pixels: every stage ends by halving them."""
        return 2 ** len(self.stage_sizes)

    @classmethod
    def vgg16(cls, **overrides: Any) -> Self:
        """Configuration D, 138,357,544 parameters for images of 224 by 224."""
        return cls(**overrides)

    @classmethod
    def vgg19(cls, **overrides: Any) -> Self:
        """Configuration E, 143,667,240 parameters for images of 224 by 224."""
        stages: dict[str, Any] = {"stage_sizes": (2, 2, 4, 4, 4)}
        return cls(**stages | overrides)

    @classmethod
    def tiny(cls, **overrides: Any) -> Self:
        """Three convolutions in two stages, 16 dense units: for tests and first tries."""
        small = {"stage_sizes": (1, 2), "channels": (4, 8), "dense": 16, "num_classes": 4}
        return cls(**small | overrides)


class VGG(nn.Module):
    """Images `[N, H, W, C]` to float32 logits `[N, num_classes]`.

    The parameters fit the H and W they were initialized for. Raises `ModelError` for an image
    below `config.smallest`.

    >>> model = VGG(VGGConfig.tiny())
    >>> x = jnp.ones((2, 8, 8, 3))
    >>> jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0].shape
    (2, 4)
    """

    config: VGGConfig = VGGConfig.vgg16()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Class logits of `x`; `train=True` drops units and needs the rng "dropout"."""
        config = self.config
        self._check_image(x.shape)
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.normal(0.01))

        for i, (size, channels) in enumerate(zip(config.stage_sizes, config.channels, strict=True)):
            x = self._stage(x, size=size, channels=channels, name=f"stage{i + 1}")
        x = x.reshape(x.shape[0], -1)  # [N, H * W * C]
        for i in (1, 2):
            x = nn.relu(dense(config.dense, name=f"dense{i}")(x))
            x = nn.Dropout(config.dropout, deterministic=not train)(x)
        return dense(config.num_classes, name="head")(x).astype(jnp.float32)  # [N, num_classes]

    def _stage(self, x: jax.Array, *, size: int, channels: int, name: str) -> jax.Array:
        """`[N, H, W, C]` to `[N, H / 2, W / 2, channels]`; its layers belong to the VGG itself."""
        # Nothing normalizes in between: without this variance the signal fades on its way up.
        kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")
        conv = partial(nn.Conv, padding=1, dtype=self.dtype, kernel_init=kernel_init)
        for j in range(size):
            x = nn.relu(conv(channels, (3, 3), name=f"{name}_conv{j + 1}")(x))
        return nn.max_pool(x, (2, 2), strides=(2, 2))

    def _check_image(self, shape: tuple[int, ...]) -> None:
        smallest = self.config.smallest
        if len(shape) != 4 or min(shape[1:3]) < smallest:
            raise ModelError(
                f"this image cannot be halved {len(self.config.stage_sizes)} times by the VGG",
                expected=f"[N, H, W, C], H and W at least {smallest}",
                got=str(list(shape)),
                fix="enlarge the images, or use fewer stages",
            )
