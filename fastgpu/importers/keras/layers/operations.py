"""`keras.ops` calls inside a functional graph: elementwise functions without options."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import nn

from fastgpu.importers.keras.layers.layer import Layer, LayerState


@dataclass(frozen=True, kw_only=True)
class Operation(Layer):
    """An elementwise function of arrays and numbers; it casts nothing and has no weights."""

    name: str
    autocast: ClassVar[bool] = False

    def call(self, state: LayerState, *inputs: Any, train: bool) -> Any:
        """Apply the function."""
        return OPERATIONS[self.name](*inputs)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "Absolute": jnp.abs,
    "Add": jnp.add,
    "Divide": jnp.true_divide,
    "Exp": jnp.exp,
    "Log": jnp.log,
    "Maximum": jnp.maximum,
    "Minimum": jnp.minimum,
    "Multiply": jnp.multiply,
    "Negative": jnp.negative,
    "Power": jnp.power,
    "Relu": nn.relu,
    "Relu6": nn.relu6,
    "Sigmoid": nn.sigmoid,
    "Silu": nn.silu,
    "Softplus": nn.softplus,
    "Sqrt": jnp.sqrt,
    "Square": jnp.square,
    "Subtract": jnp.subtract,
    "Tanh": jnp.tanh,
    "TrueDivide": jnp.true_divide,
}
