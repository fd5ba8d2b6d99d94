"""Metrics of predictions: one value per example, from outputs and labels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def accuracy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """1 where the largest output is the label's: integers [...], or one-hot [..., classes].

    >>> accuracy(jnp.array([[0.1, 0.9], [0.8, 0.2]]), jnp.array([1, 1]))
    Array([1., 0.], dtype=float32)
    """
    return (jnp.argmax(outputs, axis=-1) == _classes(outputs, labels)).astype(jnp.float32)


def top_5_accuracy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """1 where the label is among the five largest outputs; shapes as for `accuracy`."""
    _, best = jax.lax.top_k(outputs, min(5, outputs.shape[-1]))
    return jnp.any(best == _classes(outputs, labels)[..., None], axis=-1).astype(jnp.float32)


def binary_accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 where a logit is positive and its label over 0.5, or neither; elementwise."""
    return ((logits > 0) == (labels > 0.5)).astype(jnp.float32)


def binary_accuracy_of_probabilities(probabilities: jax.Array, labels: jax.Array) -> jax.Array:
    """As `binary_accuracy`, for outputs of a sigmoid."""
    return binary_accuracy(probabilities - 0.5, labels)


def _classes(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Integer labels [...] from integers [...], integers [..., 1], or one-hot [..., classes]."""
    if labels.shape == outputs.shape:
        return jnp.argmax(labels, axis=-1)
    return labels.reshape(outputs.shape[:-1])


def mean_absolute_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """abs(outputs - labels), elementwise."""
    return jnp.abs(outputs - labels)


METRICS: dict[str, Callable[[Any, Any], jax.Array]] = {
    "accuracy": accuracy,
    "top_5_accuracy": top_5_accuracy,
    "mean_absolute_error": mean_absolute_error,
}
