"""Llama (Touvron et al., 2023, arXiv:2302.13971): a decoder with rotary positions and gated MLPs.

RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467), rotary embeddings (Su et al., 2021,
arXiv:2104.09864), SwiGLU (Shazeer, 2020, arXiv:2002.05202), grouped-query attention (Ainslie et
al., 2023, arXiv:2305.13245), no biases, no dropout. Llama 3's stretching of the rotary wavelengths
beyond 8192 tokens is left out: it belongs to weights that were trained with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from fastgpu.errors import ModelError
from fastgpu.models.transformer import check_heads, check_tokens


@dataclass(frozen=True)
class LlamaConfig:
    """Size of the vocabulary, longest sequence (`context`), and the shape of the decoder.

    `heads / kv_heads` heads share one key and value; `theta` sets the longest wavelength of the
    rotary embedding. `scan_layers` compiles one block and runs it `depth` times: the same
    function, of the parameters of all blocks stacked in "blocks" on a new first axis.

    Raises `ModelError` when heads do not share the width or the keys, or have an odd width.

    >>> LlamaConfig.llama_1b(context=8192).head_width
    64
    >>> LlamaConfig(heads=32, kv_heads=12)
    Traceback (most recent call last):
    ...
    fastgpu.errors.ModelError: heads=32 cannot share kv_heads=12
    """

    vocab_size: int = 128256
    context: int = 131072
    width: int = 2048
    depth: int = 16
    heads: int = 32
    kv_heads: int = 8
    mlp_width: int = 8192
    theta: float = 500_000.0
    scan_layers: bool = False

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads)
        if self.heads % self.kv_heads:
            raise ModelError(
                f"heads={self.heads} cannot share kv_heads={self.kv_heads}",
                expected="heads that are a multiple of kv_heads",
                got=f"{self.heads} = {self.heads // self.kv_heads} * {self.kv_heads}"
                f" + {self.heads % self.kv_heads}",
                fix=f"take kv_heads={self.heads}, or another divisor of it",
            )
        if self.head_width % 2:
            raise ModelError(
                "the rotary embedding turns pairs of units, and a head has an odd number of them",
                expected="an even width / heads",
                got=f"width={self.width}, heads={self.heads}, {self.head_width} units a head",
                fix=f"take width={self.width + self.heads}",
            )

    @property
    def head_width(self) -> int:
        """Units of one head."""
        return self.width // self.heads

    @classmethod
    def llama_1b(cls, **overrides: Any) -> Self:
        """The shape of Llama 3.2 1B, 1,235,814,400 parameters."""
        return cls(**overrides)

    @classmethod
    def tiny(cls, **overrides: Any) -> Self:
        """Two blocks of width 16, two heads to a key, 32 tokens: for tests and first tries."""
        small: dict[str, Any] = {"vocab_size": 32, "context": 16, "width": 16, "depth": 2}
        small |= {"heads": 4, "kv_heads": 2, "mlp_width": 32}
        return cls(**small | overrides)


class GroupedQueryAttention(nn.Module):
    """Every token gathers from those before it: `[N, T, C]` to `[N, T, C]`."""

    heads: int
    kv_heads: int
    dtype: DTypeLike
    kernel_init: Callable[..., Any]
    output_init: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array) -> jax.Array:
        """The attended values of `x`, projected; `angles` are `[T, C / heads / 2]`, in radians."""
        n, t, c = x.shape
        head_width = c // self.heads
        qkv = nn.Dense(
            (self.heads + 2 * self.kv_heads) * head_width,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            name="qkv",
        )(x).reshape(n, t, -1, head_width)  # [N, T, heads + 2 * kv_heads, C / heads]
        query, key, value = jnp.split(qkv, [self.heads, self.heads + self.kv_heads], axis=2)
        y = jax.nn.dot_product_attention(
            _rotated(query, angles), _rotated(key, angles), value, is_causal=True
        )
        return nn.Dense(
            c, use_bias=False, dtype=self.dtype, kernel_init=self.output_init, name="output"
        )(y.reshape(n, t, c))


def _rotated(x: jax.Array, angles: jax.Array) -> jax.Array:
    """`x` `[N, T, heads, D]`, its unit i and unit i + D / 2 turned by `angles[:, i]`, in float32.

    The pairs are Hugging Face's; Meta's own weights pair neighbours instead.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]  # [T, 1, D / 2]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class LlamaBlock(nn.Module):
    """Attention, then a gated MLP of `mlp_width` units, each added to its input: `[N, T, C]`."""

    heads: int
    kv_heads: int
    mlp_width: int
    dtype: DTypeLike
    kernel_init: Callable[..., Any]
    output_init: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array) -> jax.Array:
        """The tokens after one block."""
        y = nn.RMSNorm(epsilon=1e-5, dtype=self.dtype, name="attention_norm")(x)
        x = x + GroupedQueryAttention(
            heads=self.heads,
            kv_heads=self.kv_heads,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            output_init=self.output_init,
            name="attention",
        )(y, angles)

        y = nn.RMSNorm(epsilon=1e-5, dtype=self.dtype, name="mlp_norm")(x)
        gate, y = (
            nn.Dense(
                self.mlp_width,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=self.kernel_init,
                name=name,
            )(y)
            for name in ("mlp_gate", "mlp_in")
        )  # each [N, T, mlp_width]
        return x + nn.Dense(
            x.shape[-1],
            use_bias=False,
            dtype=self.dtype,
            kernel_init=self.output_init,
            name="mlp_out",
        )(nn.silu(gate) * y)


class Llama(nn.Module):
    """Token ids `[N, T]` to float32 logits `[N, T, vocab_size]` of each next token.

    Raises `ModelError` for ids that are not whole numbers and for `T` beyond the context.

    >>> model = Llama(LlamaConfig.tiny())
    >>> tokens = jnp.zeros((2, 16), jnp.int32)
    >>> jax.eval_shape(model.init_with_output, jax.random.key(0), tokens)[0].shape
    (2, 16, 32)
    """

    config: LlamaConfig = LlamaConfig.llama_1b()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Next-token logits of `x`, the same whether `train` or not: nothing is dropped."""
        config = self.config
        check_tokens(x, config.context, reader="Llama")
        kernel_init = nn.initializers.normal(0.02)
        embed = nn.Embed(
            config.vocab_size,
            config.width,
            dtype=self.dtype,
            embedding_init=kernel_init,
            name="token",
        )
        angles = self._angles(x.shape[1])
        x = embed(x)  # [N, T, width]
        if config.scan_layers:
            x = nn.scan(
                lambda block, x: (block(x, angles), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=config.depth,
            )(self._block("blocks"), x)[0]
        else:
            for i in range(config.depth):
                x = self._block(f"block{i + 1}")(x, angles)
        x = nn.RMSNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x)
        return embed.attend(x).astype(jnp.float32)  # [N, T, vocab_size]

    def _block(self, name: str) -> LlamaBlock:
        config = self.config
        return LlamaBlock(
            heads=config.heads,
            kv_heads=config.kv_heads,
            mlp_width=config.mlp_width,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.02),
            # Each block adds twice to the residual stream: shrink, so that its variance stays put.
            output_init=nn.initializers.normal(0.02 / (2 * config.depth) ** 0.5),
            name=name,
        )

    def _angles(self, length: int) -> jax.Array:
        """How far each pair of units turns at each position, radians `[T, head_width / 2]`."""
        pairs = jnp.arange(0, self.config.head_width, 2, dtype=jnp.float32)
        frequencies = self.config.theta ** (-pairs / self.config.head_width)
        return jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies
