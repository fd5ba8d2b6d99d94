"""Multi-layer perceptron: dense layers with an activation and dropout after each."""

from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from fastgpu.errors import ModelError

Activation = Literal["relu", "gelu", "silu", "tanh"]


@dataclass(frozen=True)
class MLPConfig:
    """Widths of the hidden layers, number of classes, activation, dropout rate.

    Raises `ModelError` for an activation that is not in the list.

    >>> MLPConfig(hidden=(512, 512), dropout=0.1)
    MLPConfig(hidden=(512, 512), num_classes=10, activation='relu', dropout=0.1)
    """

    hidden: tuple[int, ...] = (256, 256)
    num_classes: int = 10
    activation: Activation = "relu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.activation not in get_args(Activation):
            raise ModelError(
                f"the MLP has no activation {self.activation!r}",
                expected=f"one of {', '.join(get_args(Activation))}",
                got=repr(self.activation),
                fix="take one of these, or copy the module and change it",
            )

    @classmethod
    def tiny(cls, **overrides: Any) -> Self:
        """Two hidden layers of 16 units: for tests and first tries."""
        return cls(**{"hidden": (16, 16), "num_classes": 4, "dropout": 0.1} | overrides)


class MLP(nn.Module):
    """`[N, ...]` of any shape, flattened, to float32 logits `[N, num_classes]`.

    >>> model = MLP(MLPConfig.tiny())
    >>> variables = model.init(jax.random.key(0), jnp.ones((2, 8)))
    >>> model.apply(variables, jnp.ones((2, 8))).shape
    (2, 4)
    """

    config: MLPConfig = MLPConfig()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Class logits of `x`; `train=True` drops units and needs the rng "dropout"."""
        activation = getattr(nn, self.config.activation)
        x = x.reshape(x.shape[0], -1)  # [N, features]
        for i, width in enumerate(self.config.hidden):
            x = nn.Dense(width, dtype=self.dtype, name=f"dense{i + 1}")(x)  # [N, width]
            x = nn.Dropout(self.config.dropout, deterministic=not train)(activation(x))
        x = nn.Dense(self.config.num_classes, dtype=self.dtype, name="head")(x)
        return x.astype(jnp.float32)  # [N, num_classes]
