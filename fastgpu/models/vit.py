"""Vision transformer (Dosovitskiy et al., 2020, arXiv:2010.11929): an image as a row of patches."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from fastgpu.errors import ModelError
from fastgpu.models.transformer import TransformerBlock, check_heads


@dataclass(frozen=True)
class ViTConfig:
    """Size of image and patch in pixels, and the shape of the encoder.

    Raises `ModelError` when patches do not tile the image, or heads do not share the width.

    >>> ViTConfig.b16(num_classes=10).tokens
    197
    >>> ViTConfig(image_size=100)
    Traceback (most recent call last):
    ...
    fastgpu.errors.ModelError: patches of 16 pixels do not tile an image of 100
    """

    image_size: int = 224
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    num_classes: int = 1000
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads)
        if self.image_size % self.patch:
            raise ModelError(
                f"patches of {self.patch} pixels do not tile an image of {self.image_size}",
                expected="an image_size that is a multiple of patch",
                got=f"image_size={self.image_size}, patch={self.patch}",
                fix=f"take image_size={-(-self.image_size // self.patch) * self.patch}",
            )

    @property
    def tokens(self) -> int:
        """Length of the sequence: one token a patch, and the class token."""
        return (self.image_size // self.patch) ** 2 + 1

    @classmethod
    def ti16(cls, **overrides: Any) -> Self:
        """ViT-Ti/16, 5,717,416 parameters."""
        return cls(**{"width": 192, "heads": 3, "mlp_width": 768} | overrides)

    @classmethod
    def s16(cls, **overrides: Any) -> Self:
        """ViT-S/16, 22,050,664 parameters."""
        return cls(**{"width": 384, "heads": 6, "mlp_width": 1536} | overrides)

    @classmethod
    def b16(cls, **overrides: Any) -> Self:
        """ViT-B/16, 86,567,656 parameters."""
        return cls(**overrides)

    @classmethod
    def tiny(cls, **overrides: Any) -> Self:
        """Two blocks of width 16 over 8-pixel patches: for tests and first tries."""
        image = {"image_size": 16, "patch": 8, "num_classes": 4, "dropout": 0.1}
        encoder = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 32}
        return cls(**image | encoder | overrides)


class ViT(nn.Module):
    """Images `[N, image_size, image_size, C]` to float32 logits `[N, num_classes]`.

    Raises `ModelError` for an image of another size: position embeddings belong to one size.

    >>> model = ViT(ViTConfig.tiny())
    >>> x = jnp.ones((2, 16, 16, 3))
    >>> jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0].shape
    (2, 4)
    """

    config: ViTConfig = ViTConfig.b16()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Class logits of `x`; `train=True` drops units and needs the rng "dropout"."""
        config = self.config
        self._check_image(x.shape)
        x = nn.Conv(
            config.width,
            (config.patch, config.patch),
            strides=config.patch,
            padding=0,
            dtype=self.dtype,
            name="patch_conv",
        )(x)  # [N, image_size / patch, image_size / patch, width]
        n, _, _, c = x.shape
        class_token = self.param("class_token", nn.initializers.zeros, (1, 1, c))
        position = self.param("position", nn.initializers.normal(0.02), (1, config.tokens, c))
        class_tokens = jnp.broadcast_to(class_token.astype(x.dtype), (n, 1, c))
        x = jnp.concatenate([class_tokens, x.reshape(n, -1, c)], axis=1)  # [N, tokens, width]
        x = x + position.astype(x.dtype)
        x = nn.Dropout(config.dropout, deterministic=not train)(x)
        for i in range(config.depth):
            x = TransformerBlock(
                heads=config.heads,
                mlp_width=config.mlp_width,
                causal=False,
                activation=partial(nn.gelu, approximate=False),
                epsilon=1e-6,
                dropout=config.dropout,
                dtype=self.dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                output_init=nn.initializers.xavier_uniform(),
                name=f"block{i + 1}",
            )(x, train=train)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        x = nn.Dense(config.num_classes, dtype=self.dtype, name="head")(x[:, 0])  # class token
        return x.astype(jnp.float32)  # [N, num_classes]

    def _check_image(self, shape: tuple[int, ...]) -> None:
        size = self.config.image_size
        if len(shape) != 4 or shape[1:3] != (size, size):
            raise ModelError(
                "this image does not fit the position embeddings of the ViT",
                expected=f"[N, {size}, {size}, C]",
                got=str(list(shape)),
                fix=f"resize the images to {size} by {size}, or set image_size in the config",
            )
