"""U-Net (Ronneberger et al., 2015, arXiv:1505.04597): down, up, and a skip across at every scale.

Convolutions are padded and batch-normalized, so that the output has the size of the input.
"""

from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from fastgpu.errors import ModelError


@dataclass(frozen=True)
class UNetConfig:
    """Channels at each scale, from full resolution down; classes per pixel; dropout at the bottom.

    >>> UNetConfig(num_classes=21).multiple
    16
    """

    channels: tuple[int, ...] = (64, 128, 256, 512, 1024)
    num_classes: int = 2
    dropout: float = 0.0

    @property
    def multiple(self) -> int:
        """What height and width must be multiples of: each scale but the first halves them."""
        return 2 ** (len(self.channels) - 1)

    @classmethod
    def tiny(cls, **overrides: Any) -> Self:
        """Three scales of 4, 8 and 8 channels: for tests and first tries."""
        return cls(**{"channels": (4, 8, 8), "num_classes": 3, "dropout": 0.1} | overrides)


class DoubleConv(nn.Module):
    """Twice 3×3 convolution, batch norm, relu: `[N, H, W, C]` to `[N, H, W, channels]`."""

    channels: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """The features of `x` at its own scale."""
        for i in (1, 2):
            x = nn.Conv(self.channels, (3, 3), use_bias=False, dtype=self.dtype, name=f"conv{i}")(x)
            x = nn.BatchNorm(
                use_running_average=not train, momentum=0.9, dtype=self.dtype, name=f"norm{i}"
            )(x)
            x = nn.relu(x)
        return x


class UNet(nn.Module):
    """Images `[N, H, W, C]` to float32 logits `[N, H, W, num_classes]` of every pixel.

    Raises `ModelError` when H or W is no multiple of `config.multiple`: a skip would not meet its
    upsampled partner.

    >>> model = UNet(UNetConfig.tiny())
    >>> x = jnp.ones((2, 16, 16, 1))
    >>> jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0].shape
    (2, 16, 16, 3)
    """

    config: UNetConfig = UNetConfig()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Pixel logits of `x`; `train=True` needs the rng "dropout" and updates "batch_stats"."""
        config = self.config
        self._check_image(x.shape)
        *scales, bottom = config.channels

        skips: list[jax.Array] = []
        for i, channels in enumerate(scales):
            x = DoubleConv(channels, self.dtype, name=f"down{i + 1}")(x, train=train)
            skips.append(x)  # [N, H / 2**i, W / 2**i, channels]
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = DoubleConv(bottom, self.dtype, name="bottom")(x, train=train)
        x = nn.Dropout(config.dropout, deterministic=not train)(x)
        for i, channels in reversed(list(enumerate(scales))):
            x = nn.ConvTranspose(
                channels, (2, 2), strides=(2, 2), dtype=self.dtype, name=f"up{i + 1}_conv"
            )(x)
            x = jnp.concatenate([skips[i], x], axis=-1)  # [N, H / 2**i, W / 2**i, 2 * channels]
            x = DoubleConv(channels, self.dtype, name=f"up{i + 1}")(x, train=train)
        x = nn.Conv(config.num_classes, (1, 1), dtype=self.dtype, name="head")(x)
        return x.astype(jnp.float32)  # [N, H, W, num_classes]

    def _check_image(self, shape: tuple[int, ...]) -> None:
        multiple = self.config.multiple
        if len(shape) != 4 or shape[1] % multiple or shape[2] % multiple:
            padded = [-(-size // multiple) * multiple for size in shape[1:3]]
            raise ModelError(
                f"this image cannot be halved {len(self.config.channels) - 1} times by the U-Net",
                expected=f"[N, H, W, C], H and W multiples of {multiple}",
                got=str(list(shape)),
                fix=f"pad the images to {' by '.join(map(str, padded))}, or use fewer scales",
            )
