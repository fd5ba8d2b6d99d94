"""GoogLeNet, or Inception v1 (Szegedy et al., 2014, arXiv:1409.4842): kernel sizes side by side.

Layer for layer as torchvision's, which differs from the paper: batch norm follows each convolution,
the "5×5" branch has a 3×3 kernel (pytorch/vision issue 906), and the last max-pool is 2×2. Only the
main head is here: the auxiliary heads take no part in inference.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from fastgpu.errors import ModelError


class Branches(NamedTuple):
    """Output channels inside of one Inception block, in the order of the paper's table 1."""

    one: int
    three_reduce: int
    three: int
    five_reduce: int
    five: int
    pool: int


@dataclass(frozen=True)
class GoogLeNetConfig:
    """Channels of both stem convolutions; the blocks of each stage, which a max-pool precedes.

    >>> GoogLeNetConfig(num_classes=10).smallest
    15
    """

    stem: tuple[int, int] = (64, 192)
    stages: tuple[tuple[Branches, ...], ...] = (
        (
            Branches(64, 96, 128, 16, 32, 32),
            Branches(128, 128, 192, 32, 96, 64),
        ),
        (
            Branches(192, 96, 208, 16, 48, 64),
            Branches(160, 112, 224, 24, 64, 64),
            Branches(128, 128, 256, 24, 64, 64),
            Branches(112, 144, 288, 32, 64, 64),
            Branches(256, 160, 320, 32, 128, 128),
        ),
        (
            Branches(256, 160, 320, 32, 128, 128),
            Branches(384, 192, 384, 48, 128, 128),
        ),
    )
    num_classes: int = 1000
    dropout: float = 0.2

    @property
    def smallest(self) -> int:
        """The least height and width in pixels that leave something to the last pool."""
        return 2 ** (len(self.stages) + 1) - 1

    @classmethod
    def tiny(cls, **overrides: Any) -> Self:
        """One block after the stem: for tests and first tries."""
        small = {"stem": (4, 8), "stages": ((Branches(4, 4, 8, 2, 4, 4),),), "num_classes": 4}
        return cls(**small | overrides)


class ConvNorm(nn.Module):
    """Convolution, batch norm, relu: `[N, H, W, C]` to `[N, H / stride, W / stride, channels]`."""

    channels: int
    size: int
    dtype: DTypeLike
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """The features of `x` under a kernel of `size` by `size`."""
        x = nn.Conv(
            self.channels,
            (self.size, self.size),
            strides=self.stride,
            padding=self.size // 2,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal"),
            name="conv",
        )(x)
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-3,
            dtype=self.dtype,
            name="norm",
        )(x)
        return nn.relu(x)


class Inception(nn.Module):
    """Four branches, joined: `[N, H, W, C]` to `[N, H, W, one + three + five + pool]`."""

    branches: Branches
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """The features of `x` at every scale; 1×1 convolutions keep the wide ones affordable."""
        channels = self.branches
        conv = partial(ConvNorm, dtype=self.dtype)
        one = conv(channels.one, 1, name="one")(x, train=train)
        three = conv(channels.three_reduce, 1, name="three_reduce")(x, train=train)
        three = conv(channels.three, 3, name="three")(three, train=train)
        five = conv(channels.five_reduce, 1, name="five_reduce")(x, train=train)
        five = conv(channels.five, 3, name="five")(five, train=train)
        pool = nn.max_pool(x, (3, 3), padding="SAME")
        pool = conv(channels.pool, 1, name="pool")(pool, train=train)
        return jnp.concatenate([one, three, five, pool], axis=-1)


class GoogLeNet(nn.Module):
    """Images `[N, H, W, C]` to float32 logits `[N, num_classes]`: 6,624,904 parameters by default.

    Raises `ModelError` for an image below `config.smallest`.

    >>> model = GoogLeNet(GoogLeNetConfig.tiny())
    >>> x = jnp.ones((2, 24, 24, 3))
    >>> jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0].shape
    (2, 4)
    """

    config: GoogLeNetConfig = GoogLeNetConfig()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Class logits of `x`; `train=True` needs the rng "dropout" and updates "batch_stats"."""
        config = self.config
        self._check_image(x.shape)
        conv = partial(ConvNorm, dtype=self.dtype)
        narrow, wide = config.stem

        x = conv(narrow, 7, stride=2, name="stem1")(x, train=train)  # [N, H / 2, W / 2, narrow]
        x = _halved(x, window=3)
        x = conv(narrow, 1, name="stem2")(x, train=train)
        x = conv(wide, 3, name="stem3")(x, train=train)  # [N, H / 4, W / 4, wide]
        for i, stage in enumerate(config.stages):
            x = _halved(x, window=2 if i == len(config.stages) - 1 else 3)
            for j, branches in enumerate(stage):
                x = Inception(branches, self.dtype, name=f"stage{i + 1}_block{j + 1}")(
                    x, train=train
                )  # [N, H / 2**(i + 3), W / 2**(i + 3), C]
        x = x.mean(axis=(1, 2))  # [N, C]
        x = nn.Dropout(config.dropout, deterministic=not train)(x)
        x = nn.Dense(config.num_classes, dtype=self.dtype, name="head")(x)
        return x.astype(jnp.float32)  # [N, num_classes]

    def _check_image(self, shape: tuple[int, ...]) -> None:
        smallest = self.config.smallest
        if len(shape) != 4 or min(shape[1:3]) < smallest:
            raise ModelError(
                "this image is too small for the max-pools of the GoogLeNet",
                expected=f"[N, H, W, C], H and W at least {smallest}",
                got=str(list(shape)),
                fix="enlarge the images, or use fewer stages",
            )


def _halved(x: jax.Array, window: int) -> jax.Array:
    """Max-pool of stride 2 that pads at the end only, and only where pixels would be left over."""
    padding: Any = [(0, -(size - window) % 2) for size in x.shape[1:3]]  # flax annotates str
    return nn.max_pool(x, (window, window), strides=(2, 2), padding=padding)
