"""Keras activation functions by name, with the numbers that Keras 3 gives."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import nn


def _hard_sigmoid_of_keras_2(x: jax.Array) -> jax.Array:
    return jnp.clip(0.2 * x + 0.5, 0.0, 1.0)


def _soft_shrink(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0.5, x - 0.5, jnp.where(x < -0.5, x + 0.5, jnp.zeros_like(x)))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "celu": nn.celu,
    "elu": nn.elu,
    "exponential": jnp.exp,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "glu": nn.glu,
    "hard_shrink": lambda x: jnp.where(jnp.abs(x) > 0.5, x, jnp.zeros_like(x)),
    "hard_sigmoid": nn.hard_sigmoid,
    "hard_sigmoid (Keras 2)": _hard_sigmoid_of_keras_2,
    "hard_silu": nn.hard_silu,
    "hard_swish": nn.hard_silu,
    "hard_tanh": nn.hard_tanh,
    "leaky_relu": lambda x: nn.leaky_relu(x, 0.2),
    "linear": lambda x: x,
    "log_sigmoid": nn.log_sigmoid,
    "log_softmax": nn.log_softmax,
    "mish": nn.mish,
    "relu": nn.relu,
    "relu6": nn.relu6,
    "selu": nn.selu,
    "sigmoid": nn.sigmoid,
    "silu": nn.silu,
    "soft_shrink": _soft_shrink,
    "softmax": nn.softmax,
    "softplus": nn.softplus,
    "softsign": nn.soft_sign,
    "sparse_plus": nn.sparse_plus,
    "sparse_sigmoid": nn.sparse_sigmoid,
    "squareplus": nn.squareplus,
    "swish": nn.silu,
    "tanh": jnp.tanh,
    "tanh_shrink": lambda x: x - jnp.tanh(x),
}


@dataclass(frozen=True)
class Activation:
    """An activation by its Keras name, or a function given in `custom_objects`.

    >>> float(Activation("relu")(jnp.float32(-1)))
    0.0
    """

    name: str = "linear"
    function: Callable[[jax.Array], jax.Array] | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply it, elementwise except for softmax, log_softmax and glu (last axis)."""
        return (self.function or ACTIVATIONS[self.name])(x)


LINEAR = Activation()
