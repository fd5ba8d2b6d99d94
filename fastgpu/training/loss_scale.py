"""Dynamic loss scaling: what float16's five bits of exponent need.

Gradients below 6e-8 are zero in float16. So the loss is multiplied by a power of two before it is
differentiated, and gradients are divided by it again in float32 (Micikevicius et al. 2018,
arXiv:1710.03740). A step whose gradients overflow changes nothing but the scale, which is halved;
after 2000 steps without one it is doubled. All of it happens on the device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

# As in `torch.amp.GradScaler`.
_FIRST = 2.0**16
_STEPS_TO_DOUBLE = 2000
# Beyond it the scaled loss itself could overflow in float32.
_LARGEST = 2.0**100
_SMALLEST = 2.0**-100


class LossScale(struct.PyTreeNode):
    """The part of a `TrainState` that a step in "fp16-mixed" keeps.

    scale: float32 scalar, a power of two.
    good_steps: int32 scalar, the steps with finite gradients since it last changed.

    >>> LossScale.create()
    LossScale(scale=Array(65536., dtype=float32), good_steps=Array(0, dtype=int32))
    """

    scale: jax.Array
    good_steps: jax.Array

    @classmethod
    def create(cls) -> "LossScale":
        """The scale before the first step."""
        return cls(jnp.float32(_FIRST), jnp.int32(0))

    def after(self, finite: jax.Array) -> "LossScale":
        """The scale after a step whose gradients were `finite` (a bool scalar) or not.

        >>> LossScale.create().after(jnp.array(False))
        LossScale(scale=Array(32768., dtype=float32), good_steps=Array(0, dtype=int32))
        """
        doubles = finite & (self.good_steps + 1 >= _STEPS_TO_DOUBLE)
        factor = jnp.where(finite, jnp.where(doubles, 2.0, 1.0), 0.5)
        scale = jnp.clip(self.scale * factor, _SMALLEST, _LARGEST).astype(jnp.float32)
        return LossScale(scale, jnp.where(finite & ~doubles, self.good_steps + 1, 0))


def scaled(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """`loss_fn` times a scale: its `model_state` is a pair, of the model's and the scale.

    >>> def loss_fn(params, model_state, batch, rng):
    ...     return jnp.sum(params), (model_state, {})
    >>> loss, _ = scaled(loss_fn)(jnp.ones(3), ({}, jnp.float32(8)), None, None)
    >>> float(loss)
    24.0
    """

    def scaled_loss(params: Any, model_state: Any, batch: Any, rng: jax.Array) -> Any:
        own, scale = model_state
        loss, (own, metrics) = loss_fn(params, own, batch, rng)
        return loss * scale.astype(loss.dtype), ((own, scale), metrics)

    return scaled_loss


def unscaled(value_and_grad: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of a `scaled` loss, with loss and gradients divided by the scale again."""

    def value_and_grad_of_loss(params: Any, model_state: Any, batch: Any, rng: jax.Array) -> Any:
        (loss, rest), grads = value_and_grad(params, model_state, batch, rng)
        inverse = 1 / model_state[1]
        grads = jax.tree.map(lambda g: g * inverse.astype(g.dtype), grads)
        return (loss * inverse.astype(loss.dtype), rest), grads

    return value_and_grad_of_loss


def all_finite(grads: Any) -> jax.Array:
    """Whether every number in every leaf is finite: a bool scalar.

    >>> bool(all_finite({"w": jnp.array([1.0, jnp.inf])}))
    False
    """
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(grads)]))


def chosen(finite: jax.Array, after: Any, before: Any) -> Any:
    """`after` if `finite`, else `before`: trees of one structure."""
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
