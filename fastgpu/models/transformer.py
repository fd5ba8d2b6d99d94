"""The pre-norm transformer block that ViT and GPT stack, and what a decoder checks.

Attention Is All You Need (Vaswani et al., 2017, arXiv:1706.03762), with the layer norms before
attention and MLP (Xiong et al., 2020, arXiv:2002.04745).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from fastgpu.errors import ModelError


def check_heads(width: int, heads: int) -> None:
    """Raise `ModelError` unless `heads` attention heads share `width` evenly."""
    if width % heads:
        raise ModelError(
            f"width={width} cannot be shared by heads={heads}",
            expected="a width that is a multiple of the number of heads",
            got=f"{width} = {width // heads} * {heads} + {width % heads}",
            fix=f"take width={width // heads * heads or heads}, or another number of heads",
        )


def check_tokens(x: jax.Array, context: int, reader: str) -> None:
    """Raise `ModelError` unless `x` is `[N, T]` whole numbers with `T` up to `context`."""
    if x.ndim != 2 or x.shape[1] > context or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ModelError(
            f"these are not token ids that the {reader} can read",
            expected=f"whole numbers [N, T], T up to the context of {context}",
            got=f"{x.dtype} {list(x.shape)}",
            fix="cut the sequence, set a longer context in the config, or cast to int32",
        )


class SelfAttention(nn.Module):
    """Every token gathers from every other, or from those before it: `[N, T, C]` to `[N, T, C]`."""

    heads: int
    causal: bool
    dtype: DTypeLike
    kernel_init: Callable[..., Any]
    output_init: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The attended values of `x`, projected."""
        n, t, c = x.shape
        qkv = nn.Dense(3 * c, dtype=self.dtype, kernel_init=self.kernel_init, name="qkv")(x)
        query, key, value = qkv.reshape(n, t, 3, self.heads, c // self.heads).transpose(
            2, 0, 1, 3, 4
        )  # each [N, T, heads, C / heads]
        y = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal)
        y = y.reshape(n, t, c)
        return nn.Dense(c, dtype=self.dtype, kernel_init=self.output_init, name="output")(y)


class TransformerBlock(nn.Module):
    """Attention, then an MLP of `mlp_width` units, each added to its input: `[N, T, C]` in and out.

    `output_init` initializes the two kernels that write to the residual stream. Dropout acts on
    what is added to it.
    """

    heads: int
    mlp_width: int
    causal: bool
    activation: Callable[[jax.Array], jax.Array]
    epsilon: float
    dropout: float
    dtype: DTypeLike
    kernel_init: Callable[..., Any]
    output_init: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """The tokens after one block."""
        y = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="attention_norm")(x)
        y = SelfAttention(
            heads=self.heads,
            causal=self.causal,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            output_init=self.output_init,
            name="attention",
        )(y)
        x = x + nn.Dropout(self.dropout, deterministic=not train)(y)

        y = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="mlp_norm")(x)
        y = nn.Dense(self.mlp_width, dtype=self.dtype, kernel_init=self.kernel_init, name="mlp_in")(
            y
        )  # [N, T, mlp_width]
        y = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=self.output_init, name="mlp_out")(
            self.activation(y)
        )
        return x + nn.Dropout(self.dropout, deterministic=not train)(y)
