"""Losses that a model may compute itself."""

import jax
import jax.numpy as jnp

from fastgpu.importers.onnx.operators.operator import one_of, operator


@operator("NegativeLogLikelihoodLoss")
def negative_log_likelihood(
    x: jax.Array,
    target: jax.Array,
    weight: jax.Array | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> jax.Array:
    """Minus the entries at the targets, weighted by class; classes are on axis 1."""
    one_of("reduction", reduction, ("none", "mean", "sum"))
    index = jnp.clip(target, 0, x.shape[1] - 1)
    loss = -jnp.squeeze(jnp.take_along_axis(x, jnp.expand_dims(index, 1), 1), 1)
    weights = jnp.ones(loss.shape, x.dtype) if weight is None else weight[index]
    if ignore_index is not None:
        weights = jnp.where(target == ignore_index, jnp.zeros_like(weights), weights)
    loss = jnp.where(weights == 0, jnp.zeros_like(loss), loss * weights)
    if reduction == "none":
        return loss
    return jnp.sum(loss) / (jnp.sum(weights) if reduction == "mean" else 1)


@operator("SoftmaxCrossEntropyLoss")
def softmax_cross_entropy(
    scores: jax.Array,
    labels: jax.Array,
    weights: jax.Array | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> tuple[jax.Array, jax.Array]:
    """The cross-entropy of unnormalized scores, and their log-softmax."""
    logits = jax.nn.log_softmax(scores, 1)
    loss = negative_log_likelihood(
        logits, labels, weights, ignore_index=ignore_index, reduction=reduction
    )
    return loss, logits
