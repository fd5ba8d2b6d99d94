"""Residual networks (He et al., 2015, arXiv:1512.03385), in the "v1.5" form.

In v1.5 a bottleneck that shrinks the image strides in its 3×3 convolution, not in the first 1×1.
Padding is explicit, as in torchvision: "SAME" would pad a strided convolution on one side only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike


@dataclass(frozen=True)
class ResNetConfig:
    """Blocks in each stage, their kind, channels of the first stage (each next one doubles them).

    >>> ResNetConfig.resnet50(num_classes=10)
    ResNetConfig(stage_sizes=(3, 4, 6, 3), bottleneck=True, width=64, num_classes=10)
    """

    stage_sizes: tuple[int, ...]
    bottleneck: bool
    width: int = 64
    num_classes: int = 1000

    @classmethod
    def resnet18(cls, **overrides: Any) -> Self:
        """Basic blocks, 11,689,512 parameters."""
        return cls(**{"stage_sizes": (2, 2, 2, 2), "bottleneck": False} | overrides)

    @classmethod
    def resnet50(cls, **overrides: Any) -> Self:
        """Bottleneck blocks, 25,557,032 parameters."""
        return cls(**{"stage_sizes": (3, 4, 6, 3), "bottleneck": True} | overrides)

    @classmethod
    def tiny(cls, **overrides: Any) -> Self:
        """Three bottlenecks, with and without projected shortcuts: for tests and first tries."""
        small = {"stage_sizes": (2, 1), "bottleneck": True, "width": 4, "num_classes": 4}
        return cls(**small | overrides)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut: `[N, H, W, C]` to `[N, H / s, W / s, channels]`."""

    channels: int
    stride: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` plus what the block adds to it."""
        y = self.conv(self.channels, (3, 3), strides=self.stride, padding=1, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.conv(self.channels, (3, 3), padding=1, name="conv2")(y)
        y = self.norm(name="norm2")(y)
        return nn.relu(y + _shortcut(self, x, y.shape))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 beside a shortcut: `[N, H, W, C]` to `[N, H / s, W / s, 4 * channels]`."""

    channels: int
    stride: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` plus what the block adds to it."""
        y = self.conv(self.channels, (1, 1), name="conv1")(x)  # [N, H, W, channels]
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.conv(self.channels, (3, 3), strides=self.stride, padding=1, name="conv2")(y)
        y = nn.relu(self.norm(name="norm2")(y))  # [N, H / s, W / s, channels]
        y = self.conv(self.expansion * self.channels, (1, 1), name="conv3")(y)
        y = self.norm(name="norm3")(y)  # [N, H / s, W / s, 4 * channels]
        return nn.relu(y + _shortcut(self, x, y.shape))


def _shortcut(block: BasicBlock | Bottleneck, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`x` itself, or a 1×1 projection of it where the block changes its shape."""
    if x.shape == shape:
        return x
    x = block.conv(shape[-1], (1, 1), strides=block.stride, name="shortcut_conv")(x)
    return block.norm(name="shortcut_norm")(x)


class ResNet(nn.Module):
    """Images `[N, H, W, C]` to float32 logits `[N, num_classes]`.

    >>> model = ResNet(ResNetConfig.tiny())
    >>> x = jnp.ones((2, 16, 16, 3))
    >>> jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0].shape
    (2, 4)
    """

    config: ResNetConfig = ResNetConfig.resnet50()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Class logits of `x`; `train=True` normalizes by the batch, updating "batch_stats"."""
        config = self.config
        kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")
        conv = partial(
            nn.Conv, use_bias=False, padding=0, dtype=self.dtype, kernel_init=kernel_init
        )
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
        )
        block = Bottleneck if config.bottleneck else BasicBlock
        pool_padding: Any = ((1, 1), (1, 1))  # flax takes pairs, though its annotation says str

        x = conv(config.width, (7, 7), strides=2, padding=3, name="stem_conv")(x)
        x = nn.relu(norm(name="stem_norm")(x))  # [N, H / 2, W / 2, width]
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=pool_padding)  # [N, H / 4, ...]
        for i, blocks in enumerate(config.stage_sizes):
            for j in range(blocks):
                x = block(
                    channels=config.width * 2**i,
                    stride=2 if i > 0 and j == 0 else 1,
                    conv=conv,
                    norm=norm,
                    name=f"stage{i + 1}_block{j + 1}",
                )(x)  # [N, H / 2**(i + 2), W / 2**(i + 2), expansion * channels]
        x = x.mean(axis=(1, 2))  # [N, C]
        x = nn.Dense(config.num_classes, dtype=self.dtype, name="head")(x)
        return x.astype(jnp.float32)  # [N, num_classes]
