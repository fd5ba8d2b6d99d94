"""A small convolutional network: convolution, relu, max-pool, and a dense head (LeCun, 1998)."""

from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike


@dataclass(frozen=True)
class ConvNetConfig:
    """Channels of each convolution (every one halves height and width), then the dense head.

    >>> ConvNetConfig(channels=(16, 32))
    ConvNetConfig(channels=(16, 32), dense=128, num_classes=10, dropout=0.25)
    """

    channels: tuple[int, ...] = (32, 64)
    dense: int = 128
    num_classes: int = 10
    dropout: float = 0.25

    @classmethod
    def tiny(cls, **overrides: Any) -> Self:
        """Two convolutions of 4 and 8 channels: for tests and first tries."""
        return cls(**{"channels": (4, 8), "dense": 16, "num_classes": 4} | overrides)


class ConvNet(nn.Module):
    """Images `[N, H, W, C]` to float32 logits `[N, num_classes]`.

    >>> model = ConvNet(ConvNetConfig.tiny())
    >>> variables = model.init(jax.random.key(0), jnp.ones((2, 8, 8, 1)))
    >>> model.apply(variables, jnp.ones((2, 8, 8, 1))).shape
    (2, 4)
    """

    config: ConvNetConfig = ConvNetConfig()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Class logits of `x`; `train=True` drops units and needs the rng "dropout"."""
        for i, channels in enumerate(self.config.channels):
            x = nn.Conv(channels, (3, 3), dtype=self.dtype, name=f"conv{i + 1}")(x)
            x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))  # [N, H / 2, W / 2, channels]
        x = x.reshape(x.shape[0], -1)  # [N, H * W * C]
        x = nn.relu(nn.Dense(self.config.dense, dtype=self.dtype, name="dense")(x))
        x = nn.Dropout(self.config.dropout, deterministic=not train)(x)
        x = nn.Dense(self.config.num_classes, dtype=self.dtype, name="head")(x)
        return x.astype(jnp.float32)  # [N, num_classes]
