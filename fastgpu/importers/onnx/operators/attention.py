"""Attention and rotary positions, which ONNX has as operators since opset 23."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.importers.onnx.dtypes import ELEMENT_TYPES, in_use
from fastgpu.importers.onnx.operators.operator import one_of, operator


def _heads(x: jax.Array, heads: int | None) -> jax.Array:
    """(batch, heads, time, features) from it, or from (batch, time, heads * features)."""
    if x.ndim == 4:
        return x
    if not heads:
        raise ValueError("three-dimensional inputs without a number of heads")
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).swapaxes(1, 2)


@operator("Attention")
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    past_key: jax.Array | None = None,
    past_value: jax.Array | None = None,
    lengths: jax.Array | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
) -> tuple[Any, ...]:
    """Softmax attention with grouped heads, masks and caches; a row without any key gives zero."""
    one_of("qk_matmul_output_mode", qk_matmul_output_mode, (0, 1, 2, 3))
    flat = query.ndim == 3
    q, k, v = _heads(query, q_num_heads), _heads(key, kv_num_heads), _heads(value, kv_num_heads)
    if past_key is not None and past_value is not None:
        k, v = jnp.concatenate((past_key, k), 2), jnp.concatenate((past_value, v), 2)
    present = (k, v)
    groups = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, groups, 1), jnp.repeat(v, groups, 1)
    factor = np.sqrt(1 / np.sqrt(q.shape[3]) if scale is None else scale)
    factor = jnp.asarray(factor, q.dtype)
    scores = jnp.einsum("bhqd,bhkd->bhqk", q * factor, k * factor)
    raw = scores
    if softcap > 0:
        scores = jnp.tanh(scores / softcap) * softcap
    capped = scores
    if past_key is not None:
        before: Any = past_key.shape[2]
    else:
        before = 0 if lengths is None else (lengths.reshape(-1, 1, 1, 1) - q.shape[2])
    window = (left_window_size, 0 if is_causal else right_window_size)
    if is_causal and right_window_size >= 0:
        window = (left_window_size, min(0, right_window_size))
    bias = _bias(mask, lengths, window, before, q.shape[2], k.shape[2], q.dtype)
    scores = scores + bias
    masked = scores
    if softmax_precision is not None:
        scores = scores.astype(in_use(ELEMENT_TYPES[softmax_precision], jnp))
    weights = _softmax(scores, bias).astype(q.dtype)
    y = jnp.einsum("bhqk,bhkd->bhqd", weights, v)
    if flat:
        y = y.swapaxes(1, 2).reshape(y.shape[0], y.shape[2], -1)
    return y, *present, (raw, capped, masked, weights)[qk_matmul_output_mode]


def _bias(
    mask: jax.Array | None,
    lengths: jax.Array | None,
    window: tuple[int, int],
    before: Any,
    queries: int,
    keys: int,
    dtype: Any,
) -> jax.Array:
    """What is added to the scores: 0 or a float mask where a key may be seen, else -inf."""
    at = jnp.arange(queries)[:, None] + before
    key = jnp.arange(keys)
    seen = jnp.ones((queries, keys), bool)
    if window[0] >= 0:
        seen = seen & (key >= at - window[0])
    if window[1] >= 0:
        seen = seen & (key <= at + window[1])
    if lengths is not None:
        seen = seen & (key < lengths.reshape(-1, 1, 1, 1))
    added: Any = 0
    if mask is not None:
        missing = [(0, 0)] * (mask.ndim - 1) + [(0, keys - mask.shape[-1])]
        hidden = False if mask.dtype == bool else -np.inf
        mask = jnp.pad(mask, missing, constant_values=hidden)
        if mask.dtype == bool:
            seen = seen & mask
        else:
            added = mask
    return jnp.where(seen, jnp.asarray(added, dtype), jnp.asarray(-np.inf, dtype))


def _softmax(scores: jax.Array, bias: jax.Array) -> jax.Array:
    """A softmax whose rows are zero where nothing may be seen, in gradients too."""
    empty = jnp.all(jnp.isneginf(bias), -1, keepdims=True)
    weights = jax.nn.softmax(jnp.where(empty, jnp.zeros_like(scores), scores), -1)
    return jnp.where(empty, jnp.zeros_like(weights), weights)


@operator("RotaryEmbedding")
def rotary_embedding(
    x: jax.Array,
    cos_cache: jax.Array,
    sin_cache: jax.Array,
    position_ids: jax.Array | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> jax.Array:
    """Pairs of features turned by an angle that grows with the position."""
    heads = _heads(x, num_heads).swapaxes(1, 2)
    turned = rotary_embedding_dim or heads.shape[-1]
    part, rest = heads[..., :turned], heads[..., turned:]
    if position_ids is not None:
        cos_cache, sin_cache = cos_cache[position_ids], sin_cache[position_ids]
    cos, sin = cos_cache[:, :, None], sin_cache[:, :, None]
    if cos.shape[-1] != turned // 2:
        raise ValueError(f"angles for {cos.shape[-1]} pairs of {turned} features")
    a, b = (part[..., ::2], part[..., 1::2]) if interleaved else jnp.split(part, 2, -1)
    pair = (cos * a - sin * b, sin * a + cos * b)
    new = jnp.stack(pair, -1).reshape(part.shape) if interleaved else jnp.concatenate(pair, -1)
    y = jnp.concatenate((new, rest), -1)
    return y.reshape(x.shape) if x.ndim == 3 else y.swapaxes(1, 2)
