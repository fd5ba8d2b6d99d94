"""EinsumDense: a dense layer whose product is an einsum."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from fastgpu.importers.keras.layers.activations import LINEAR, Activation
from fastgpu.importers.keras.layers.initializers import GLOROT_UNIFORM, ZEROS, Initializer
from fastgpu.importers.keras.layers.layer import MERGED, Layer, LayerState


@dataclass(frozen=True, kw_only=True)
class EinsumDense(Layer):
    """EinsumDense; the equation may have an ellipsis at the left or at the right."""

    equation: str
    output_shape: int | tuple[int | None, ...]
    activation: Activation = LINEAR
    bias_axes: str | None = None
    kernel_initializer: Initializer = GLOROT_UNIFORM
    bias_initializer: Initializer = ZEROS
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {"quantization_config": (None,), **MERGED}

    def __post_init__(self) -> None:
        """Refuse equations that Keras does not define."""
        self._parts()

    def _parts(self) -> tuple[str, str, str]:
        equation = self.equation.replace("...", "")
        found = re.fullmatch("([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)", equation)
        if found is None:
            raise ValueError(f"equation={self.equation!r} (expected [X],[Y]->[Z])")
        return found[1], found[2], found[3]

    def sizes(self, x: jax.Array) -> dict[str, int]:
        """The size of every letter of the equation."""
        left, _, right = self._parts()
        shape = x.shape[-len(left) :] if self.equation.startswith("...") else x.shape
        sizes = dict(zip(left, shape, strict=False))
        given = self.output_shape
        given = (given,) if isinstance(given, int) else given
        # The batch is not given, nor is it a letter of an equation with an ellipsis at the left.
        letters = right if self.equation.startswith("...") else right[1:]
        pairs = zip(reversed(letters), reversed(given), strict=False)
        return sizes | {name: size for name, size in pairs if size is not None}

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> jax.Array:
        """The kernel has the shape that the equation gives it."""
        _, middle, right = self._parts()
        sizes = self.sizes(x)
        shape = tuple(sizes[name] for name in middle)
        y = jnp.einsum(self.equation, x, state.weight("kernel", shape, self.kernel_initializer))
        if self.bias_axes:
            first = min(right.index(name) for name in self.bias_axes)
            bias = tuple(sizes[name] if name in self.bias_axes else 1 for name in right[first:])
            trailing = 0 if self.equation.startswith("...") else y.ndim - len(right)
            bias = (*bias, *[1] * trailing)
            y = y + state.weight("bias", bias, self.bias_initializer)
        return self.activation(y)
