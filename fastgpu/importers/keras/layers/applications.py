"""Layers that `keras.applications` defines for itself."""

from dataclasses import dataclass
from typing import Any

import jax

from fastgpu.importers.keras.layers.initializers import Initializer
from fastgpu.importers.keras.layers.layer import Layer, LayerState


@dataclass(frozen=True, kw_only=True)
class LayerScale(Layer):
    """LayerScale of ConvNeXt (arXiv:2103.17239): a learned factor per channel."""

    init_values: float
    projection_dim: int

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """x * gamma."""
        initial = Initializer("Constant", (("value", self.init_values),))
        return x * state.weight("gamma", (self.projection_dim,), initial)


@dataclass(frozen=True, kw_only=True)
class CustomScaleLayer(Layer):
    """CustomScaleLayer of InceptionResNetV2: a scaled residual."""

    scale: float

    def call(self, state: LayerState, inputs: Any, *, train: bool) -> jax.Array:
        """shortcut + scale * residual."""
        shortcut, residual = inputs
        return shortcut + residual * self.scale
