"""GPT-2 (Radford et al., 2019): a decoder-only transformer with tied embeddings.

Dropout acts on embeddings and residual branches. GPT-2 also drops attention weights; that would
keep `jax.nn.dot_product_attention` from a fused kernel, and later models left it out.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from fastgpu.models.transformer import TransformerBlock, check_heads, check_tokens


@dataclass(frozen=True)
class GPTConfig:
    """Size of the vocabulary, longest sequence (`context`), and the shape of the decoder.

    Raises `ModelError` when heads do not share the width.

    >>> GPTConfig.medium(context=512).width
    1024
    """

    vocab_size: int = 50257
    context: int = 1024
    width: int = 768
    depth: int = 12
    heads: int = 12
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads)

    @classmethod
    def small(cls, **overrides: Any) -> Self:
        """GPT-2 small, 124,439,808 parameters."""
        return cls(**overrides)

    @classmethod
    def medium(cls, **overrides: Any) -> Self:
        """GPT-2 medium, 354,823,168 parameters."""
        return cls(**{"width": 1024, "depth": 24, "heads": 16} | overrides)

    @classmethod
    def large(cls, **overrides: Any) -> Self:
        """GPT-2 large, 774,030,080 parameters."""
        return cls(**{"width": 1280, "depth": 36, "heads": 20} | overrides)

    @classmethod
    def xl(cls, **overrides: Any) -> Self:
        """GPT-2 XL, 1,557,611,200 parameters."""
        return cls(**{"width": 1600, "depth": 48, "heads": 25} | overrides)

    @classmethod
    def tiny(cls, **overrides: Any) -> Self:
        """Two blocks of width 16, 32 tokens: for tests and first tries."""
        decoder = {"context": 16, "width": 16, "depth": 2, "heads": 2}
        return cls(**{"vocab_size": 32} | decoder | overrides)


class GPT(nn.Module):
    """Token ids `[N, T]` to float32 logits `[N, T, vocab_size]` of each next token.

    Raises `ModelError` for ids that are not whole numbers and for `T` beyond the context.

    >>> model = GPT(GPTConfig.tiny())
    >>> tokens = jnp.zeros((2, 16), jnp.int32)
    >>> jax.eval_shape(model.init_with_output, jax.random.key(0), tokens)[0].shape
    (2, 16, 32)
    """

    config: GPTConfig = GPTConfig.small()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Next-token logits of `x`; `train=True` drops units and needs the rng "dropout"."""
        config = self.config
        check_tokens(x, config.context, reader="GPT")
        kernel_init = nn.initializers.normal(0.02)
        # Each block adds twice to the residual stream: shrink, so that its variance stays put.
        output_init = nn.initializers.normal(0.02 / (2 * config.depth) ** 0.5)

        embed = nn.Embed(
            config.vocab_size,
            config.width,
            dtype=self.dtype,
            embedding_init=kernel_init,
            name="token",
        )
        position = self.param("position", kernel_init, (config.context, config.width))
        x = embed(x) + position[: x.shape[1]].astype(self.dtype)  # [N, T, width]
        x = nn.Dropout(config.dropout, deterministic=not train)(x)
        for i in range(config.depth):
            x = TransformerBlock(
                heads=config.heads,
                mlp_width=4 * config.width,
                causal=True,
                activation=partial(nn.gelu, approximate=True),
                epsilon=1e-5,
                dropout=config.dropout,
                dtype=self.dtype,
                kernel_init=kernel_init,
                output_init=output_init,
                name=f"block{i + 1}",
            )(x, train=train)
        x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x)
        return embed.attend(x).astype(jnp.float32)  # [N, T, vocab_size]
