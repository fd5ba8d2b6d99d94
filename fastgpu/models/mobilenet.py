"""MobileNetV2 (Sandler et al., 2018, arXiv:1801.04381): inverted residuals, depthwise convolutions.

A block widens its input with a 1×1 convolution, filters each channel alone with a 3×3 one, and
narrows it with a linear 1×1. Layer for layer as in torchvision.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike


class Stage(NamedTuple):
    """`blocks` inverted residuals of `channels` outputs; the first of them has the `stride`."""

    expansion: int
    channels: int
    blocks: int
    stride: int


@dataclass(frozen=True)
class MobileNetV2Config:
    """Stem channels, stages, channels before the head; every one multiplied by `multiplier`.

    >>> MobileNetV2Config(num_classes=10, multiplier=0.5).scaled(24)
    16
    """

    stem: int = 32
    stages: tuple[Stage, ...] = (
        Stage(1, 16, 1, 1),
        Stage(6, 24, 2, 2),
        Stage(6, 32, 3, 2),
        Stage(6, 64, 4, 2),
        Stage(6, 96, 3, 1),
        Stage(6, 160, 3, 2),
        Stage(6, 320, 1, 1),
    )
    last: int = 1280
    multiplier: float = 1.0
    num_classes: int = 1000
    dropout: float = 0.2

    @classmethod
    def tiny(cls, **overrides: Any) -> Self:
        """Three blocks, one of them residual: for tests and first tries."""
        stages = (Stage(1, 8, 1, 1), Stage(2, 8, 2, 2))
        return cls(**{"stem": 8, "stages": stages, "last": 16, "num_classes": 4} | overrides)

    def scaled(self, channels: int) -> int:
        """`channels * multiplier` as a multiple of 8, never more than 10 % below it."""
        wanted = channels * self.multiplier
        rounded = max(8, int(wanted + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * wanted else rounded


class InvertedResidual(nn.Module):
    """Widen, filter, narrow: `[N, H, W, C]` to `[N, H / stride, W / stride, channels]`."""

    channels: int
    expansion: int
    stride: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The block's output, plus `x` where the shapes agree."""
        hidden = x.shape[-1] * self.expansion
        y = x
        if self.expansion != 1:
            y = self.conv(hidden, (1, 1), name="expand_conv")(y)  # [N, H, W, hidden]
            y = nn.relu6(self.norm(name="expand_norm")(y))
        y = self.conv(
            hidden,
            (3, 3),
            strides=self.stride,
            padding=1,
            feature_group_count=hidden,
            name="depthwise_conv",
        )(y)  # [N, H / stride, W / stride, hidden]
        y = nn.relu6(self.norm(name="depthwise_norm")(y))
        y = self.conv(self.channels, (1, 1), name="project_conv")(y)
        y = self.norm(name="project_norm")(y)  # [N, H / stride, W / stride, channels]
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """Images `[N, H, W, C]` to float32 logits `[N, num_classes]`.

    >>> model = MobileNetV2(MobileNetV2Config.tiny())
    >>> x = jnp.ones((2, 16, 16, 3))
    >>> jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0].shape
    (2, 4)
    """

    config: MobileNetV2Config = MobileNetV2Config()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Class logits of `x`; `train=True` needs the rng "dropout" and updates "batch_stats"."""
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

        x = conv(config.scaled(config.stem), (3, 3), strides=2, padding=1, name="stem_conv")(x)
        x = nn.relu6(norm(name="stem_norm")(x))  # [N, H / 2, W / 2, stem]
        for i, stage in enumerate(config.stages):
            for j in range(stage.blocks):
                x = InvertedResidual(
                    channels=config.scaled(stage.channels),
                    expansion=stage.expansion,
                    stride=stage.stride if j == 0 else 1,
                    conv=conv,
                    norm=norm,
                    name=f"stage{i + 1}_block{j + 1}",
                )(x)
        # Thinner networks keep the full width here: they need the features (section 6.1).
        last = config.scaled(config.last) if config.multiplier > 1 else config.last
        x = nn.relu6(norm(name="last_norm")(conv(last, (1, 1), name="last_conv")(x)))
        x = x.mean(axis=(1, 2))  # [N, last]
        x = nn.Dropout(config.dropout, deterministic=not train)(x)
        x = nn.Dense(config.num_classes, dtype=self.dtype, name="head")(x)
        return x.astype(jnp.float32)  # [N, num_classes]
