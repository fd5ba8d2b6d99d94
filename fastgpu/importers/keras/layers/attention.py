"""Attention layers, with Keras's masks and its names of parts."""

import math
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import nn

from fastgpu.importers.keras.layers.core import masked_softmax
from fastgpu.importers.keras.layers.initializers import (
    GLOROT_UNIFORM,
    ONES,
    ZEROS,
    Initializer,
)
from fastgpu.importers.keras.layers.layer import ANY, Layer, LayerState
from fastgpu.importers.keras.layers.merging import mask_list
from fastgpu.importers.keras.layers.regularization import drop


@dataclass(frozen=True, kw_only=True)
class Attention(Layer):
    """Attention (Luong et al., arXiv:1508.04025) of [query, value] or [query, value, key]."""

    use_scale: bool = False
    score_mode: str = "dot"
    dropout: float = 0.0
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {"seed": ANY, "causal": (False,)}
    supports_masking: ClassVar[bool] = True

    def output_mask(self, masks: tuple[Any, ...], *inputs: Any) -> Any:
        """That of the query."""
        return mask_list(masks, inputs)[0]

    def call(
        self,
        state: LayerState,
        inputs: Any,
        *,
        train: bool,
        mask: Any = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> Any:
        """Queries (batch, Tq, d), values (batch, Tv, d) to (batch, Tq, d)."""
        query, value = inputs[0], inputs[1]
        key = inputs[2] if len(inputs) > 2 else value
        query_mask, value_mask = mask_list(state.masks, (inputs,))[:2]
        scores = self.scores(state, query, key)
        keep = None if value_mask is None else value_mask[:, None, :]
        if use_causal_mask:
            causal = causal_mask(query.shape[1], key.shape[1])
            keep = causal if keep is None else keep & causal
        if keep is not None:
            lowest = 65504.0 if scores.dtype == jnp.float16 else 1e9
            scores = jnp.where(keep, scores, scores - lowest)
        weights = nn.softmax(scores, axis=-1)
        if train and self.dropout > 0:
            weights = drop(state, weights, self.dropout, weights.shape)
        output = weights @ value
        if query_mask is not None:
            output = jnp.where(query_mask[..., None], output, 0)
        return (output, weights) if return_attention_scores else output

    def scores(self, state: LayerState, query: jax.Array, key: jax.Array) -> jax.Array:
        """How well every query fits every key."""
        scale = state.weight("scale", (), ONES) if self.use_scale else None
        if self.score_mode == "concat":
            weight = state.weight("concat_score_weight", (), ONES)
            both = query[..., :, None, :] + key[..., None, :, :]
            both = both if scale is None else scale * both
            return weight * jnp.sum(jnp.tanh(both), axis=-1)
        scores = query @ jnp.swapaxes(key, -2, -1)
        return scores if scale is None else scores * scale


@dataclass(frozen=True, kw_only=True)
class AdditiveAttention(Attention):
    """AdditiveAttention (Bahdanau et al., arXiv:1409.0473)."""

    use_scale: bool = True

    def scores(self, state: LayerState, query: jax.Array, key: jax.Array) -> jax.Array:
        """A learned weight per feature of tanh(query + key)."""
        both = jnp.tanh(query[..., :, None, :] + key[..., None, :, :])
        if self.use_scale:
            both = state.weight("scale", (query.shape[-1],), GLOROT_UNIFORM) * both
        return jnp.sum(both, axis=-1)


@dataclass(frozen=True, kw_only=True)
class _HeadedAttention(Layer):
    """What MultiHeadAttention and GroupedQueryAttention share."""

    dropout: float = 0.0
    use_bias: bool = True
    use_gate: bool = False
    sliding_window: int | None = None
    kernel_initializer: Initializer = GLOROT_UNIFORM
    bias_initializer: Initializer = ZEROS
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {"seed": ANY, "flash_attention": ANY}
    supports_masking: ClassVar[bool] = True

    def project(
        self, state: LayerState, part: str, x: jax.Array, heads: int, width: int
    ) -> jax.Array:
        """(..., d) to (..., heads, width), by the kernel and bias of a part."""
        child = state.child(part)
        kernel = child.weight("kernel", (x.shape[-1], heads, width), self.kernel_initializer)
        y = jnp.einsum("...d,dhk->...hk", x, kernel)
        if self.use_bias:
            y = y + child.weight("bias", (heads, width), self.bias_initializer)
        return y

    def combine(self, state: LayerState, part: str, x: jax.Array, shape: Any) -> jax.Array:
        """(..., heads, width) to (..., *shape)."""
        child = state.child(part)
        kernel = child.weight("kernel", (*x.shape[-2:], *shape), self.kernel_initializer)
        y = jnp.tensordot(x, kernel, 2)
        return y + child.weight("bias", shape, self.bias_initializer) if self.use_bias else y

    def keep(
        self,
        query: jax.Array,
        value: jax.Array,
        masks: tuple[Any, Any, Any],
        given: Any,
        causal: bool,
    ) -> Any:
        """Which pairs of query and key count, (batch or 1, T, S), or None for all."""
        query_mask, value_mask, key_mask = masks
        steps, sources = query.shape[1], value.shape[1]
        found = [] if given is None else [given.astype(bool)]
        if query_mask is not None:
            found.append(query_mask[..., None].astype(bool))
        for mask in (value_mask, key_mask):
            if mask is not None:
                found.append(mask[..., None, :].astype(bool))
        if causal:
            found.append(causal_mask(steps, sources))
        if self.sliding_window is not None:
            distance = jnp.arange(steps)[:, None] - jnp.arange(sources)[None]
            found.append((jnp.abs(distance) < self.sliding_window)[None])
        merged = None
        for mask in found:
            merged = mask if merged is None else merged & mask
        return merged


@dataclass(frozen=True, kw_only=True)
class MultiHeadAttention(_HeadedAttention):
    """MultiHeadAttention (Vaswani et al., arXiv:1706.03762) over one axis or several."""

    num_heads: int
    key_dim: int
    value_dim: int | None = None
    output_shape: int | tuple[int, ...] | None = None
    attention_axes: int | tuple[int, ...] | None = None
    shifted: bool = False
    clears_masks: ClassVar[bool] = True
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_HeadedAttention.fixed,
        **{f"{name}_shape": ANY for name in ("query", "key", "value")},
        "softmax_robust_masking": (False,),
    }

    @classmethod
    def complete(cls, config: Mapping[str, Any], keras_2: bool) -> Mapping[str, Any]:
        """Keras 2 shifts masked scores instead of replacing them."""
        return {**config, "shifted": keras_2}

    def call(
        self,
        state: LayerState,
        query: jax.Array,
        value: jax.Array,
        key: jax.Array | None = None,
        *,
        train: bool,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> Any:
        """(batch, ..., d) to the same, with the scores (batch, ..., heads, T, S) if asked for."""
        key = value if key is None else key
        found = [*state.masks, None, None, None][:3]
        masks = (
            found[0],
            found[1] if value_mask is None else value_mask,
            found[2] if key_mask is None else key_mask,
        )
        keep = self.keep(query, value, masks, attention_mask, use_causal_mask)
        heads, width = self.num_heads, self.value_dim or self.key_dim
        q = self.project(state, "query_dense", query, heads, self.key_dim)
        k = self.project(state, "key_dense", key, heads, self.key_dim)
        gate = None
        if self.use_gate:
            gate = nn.sigmoid(self.project(state, "gate_dense", query, heads, width))
        v = self.project(state, "value_dense", value, heads, width)
        axes = self._axes(query.ndim)
        keep = _at_rank(keep, len(axes), q.ndim - 1 + len(axes))
        scores = None
        if self.dropout > 0 or return_attention_scores or q.ndim != 4 or self.shifted:
            output, scores = self._explicit(state, q, k, v, keep, axes, train)
        else:
            scale = 1 / math.sqrt(self.key_dim)
            output = fused_attention(q, k, v, keep, scale)
        output = output if gate is None else output * gate
        shape = self.output_shape or query.shape[-1]
        shape = (shape,) if isinstance(shape, int) else shape
        output = self.combine(state, "output_dense", output, shape)
        return (output, scores) if return_attention_scores else output

    def _axes(self, rank: int) -> tuple[int, ...]:
        axes = self.attention_axes
        if axes is None:
            return tuple(range(1, rank - 1))
        return tuple(axis % rank for axis in ((axes,) if isinstance(axes, int) else axes))

    def _explicit(
        self,
        state: LayerState,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        keep: Any,
        axes: tuple[int, ...],
        train: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """Attention by einsum over `axes`; all other axes but the last count as batch."""
        letters = iter(string.ascii_letters)
        target = [next(letters) for _ in range(q.ndim)]
        source = [next(letters) if i in axes else name for i, name in enumerate(target)]
        batch = [name for i, name in enumerate(target[:-1]) if i not in axes]
        pairs = "".join([*batch, *(target[i] for i in axes), *(source[i] for i in axes)])
        t, s = "".join(target), "".join(source)
        scores = jnp.einsum(f"{s},{t}->{pairs}", k, q * (1 / math.sqrt(self.key_dim)))
        over = tuple(range(scores.ndim - len(axes), scores.ndim))
        if self.shifted and keep is not None:
            lowest = -65504.0 if scores.dtype == jnp.float16 else -1e9
            scores, keep = scores + jnp.where(keep, 0, lowest).astype(scores.dtype), None
        weights = masked_softmax(scores, keep, over if len(over) > 1 else -1)
        dropped = weights
        if train and self.dropout > 0:
            dropped = drop(state, weights, self.dropout, weights.shape)
        return jnp.einsum(f"{pairs},{s}->{t}", dropped, v), weights


@dataclass(frozen=True, kw_only=True)
class GroupedQueryAttention(_HeadedAttention):
    """GroupedQueryAttention (Ainslie et al., arXiv:2305.13245): groups of queries share keys."""

    head_dim: int
    num_query_heads: int
    num_key_value_heads: int

    def call(
        self,
        state: LayerState,
        query: jax.Array,
        value: jax.Array,
        key: jax.Array | None = None,
        *,
        train: bool,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> Any:
        """(batch, T, d) to the same, with the scores (batch, heads, T, S) if asked for."""
        key = value if key is None else key
        given = (query_mask, value_mask, key_mask)
        found = [*state.masks, None, None, None][:3]
        masks = tuple(
            auto if mask is None else mask for auto, mask in zip(found, given, strict=True)
        )
        keep = self.keep(query, value, masks, attention_mask, use_causal_mask)
        heads, groups = self.num_query_heads, self.num_key_value_heads
        gate = None
        q = self.project(state, "query_dense", query, heads, self.head_dim)
        k = self.project(state, "key_dense", key, groups, self.head_dim)
        if self.use_gate:
            gate = nn.sigmoid(self.project(state, "gate_dense", query, heads, self.head_dim))
        v = self.project(state, "value_dense", value, groups, self.head_dim)
        k, v = (jnp.repeat(x, heads // groups, axis=2) for x in (k, v))
        scores = None
        scale = 1 / math.sqrt(self.head_dim)
        keep = _at_rank(keep, 1, 4)
        if self.dropout > 0 or return_attention_scores:
            scores = jnp.einsum("bqhd,bkhd->bhqk", q * scale, k)
            scores = masked_softmax(scores, keep)
            weights = scores
            if train and self.dropout > 0:
                weights = drop(state, scores, self.dropout, scores.shape)
            output = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        else:
            output = fused_attention(q, k, v, keep, scale)
        output = output if gate is None else output * gate
        output = self.combine(state, "output_dense", output, (query.shape[-1],))
        return (output, scores) if return_attention_scores else output


def fused_attention(q: jax.Array, k: jax.Array, v: jax.Array, keep: Any, scale: float) -> jax.Array:
    """`jax.nn.dot_product_attention`, which Keras uses too where nobody asks for the scores.

    Unlike a masked softmax it gives a query whose keys are all masked their mean.
    """
    if v.shape[-1] == k.shape[-1]:
        return nn.dot_product_attention(q, k, v, mask=keep, scale=scale)
    # cuDNN's form wants one width: zeros at the end of the narrower change nothing.
    width = max(v.shape[-1], k.shape[-1])
    padded = [_widened(x, width) for x in (q, k, v)]
    return nn.dot_product_attention(*padded, mask=keep, scale=scale)[..., : v.shape[-1]]


def causal_mask(steps: int, sources: int) -> jax.Array:
    """(1, steps, sources): every query sees the keys up to its own position.

    >>> causal_mask(2, 2).tolist()
    [[[True, False], [True, True]]]
    """
    return jnp.tril(jnp.ones((1, steps, sources), bool))


def _widened(x: jax.Array, width: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def _at_rank(mask: Any, axes: int, rank: int) -> Any:
    """Give a mask (batch, T..., S...) the axes of the heads and of what else counts as batch."""
    if mask is None:
        return None
    for _ in range(rank - mask.ndim):
        mask = jnp.expand_dims(mask, -2 * axes - 1)
    return mask
