"""Layers that combine a list of arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu.importers.keras.layers.layer import Layer, LayerState


@dataclass(frozen=True, kw_only=True)
class _Merge(Layer):
    """Elementwise merge of a list; inputs of lower rank get axes after the batch."""

    def call(self, state: LayerState, inputs: Sequence[jax.Array], *, train: bool) -> jax.Array:
        """Merge arrays that broadcast against each other."""
        rank = max(x.ndim for x in inputs)
        return self.merge(
            [
                x.reshape(x.shape[0], *[1] * (rank - x.ndim), *x.shape[1:]) if x.ndim < rank else x
                for x in inputs
            ]
        )

    def output_mask(self, masks: tuple[Any, ...], *inputs: Any) -> Any:
        """Kept is what any input keeps; nothing is masked if one input has no mask."""
        found = mask_list(masks, inputs)
        return None if any(mask is None for mask in found) else reduce(jnp.logical_or, found)

    def merge(self, inputs: list[jax.Array]) -> jax.Array:
        """Combine arrays of equal rank."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Add(_Merge):
    """Add."""

    def merge(self, inputs: list[jax.Array]) -> jax.Array:
        """The sum."""
        return reduce(jnp.add, inputs)


@dataclass(frozen=True, kw_only=True)
class Subtract(_Merge):
    """Subtract, of exactly two."""

    def merge(self, inputs: list[jax.Array]) -> jax.Array:
        """The difference."""
        first, second = inputs
        return first - second


@dataclass(frozen=True, kw_only=True)
class Multiply(_Merge):
    """Multiply."""

    def merge(self, inputs: list[jax.Array]) -> jax.Array:
        """The product."""
        return reduce(jnp.multiply, inputs)


@dataclass(frozen=True, kw_only=True)
class Average(_Merge):
    """Average."""

    def merge(self, inputs: list[jax.Array]) -> jax.Array:
        """The mean."""
        return reduce(jnp.add, inputs) / len(inputs)


@dataclass(frozen=True, kw_only=True)
class Maximum(_Merge):
    """Maximum."""

    def merge(self, inputs: list[jax.Array]) -> jax.Array:
        """The elementwise maximum."""
        return reduce(jnp.maximum, inputs)


@dataclass(frozen=True, kw_only=True)
class Minimum(_Merge):
    """Minimum."""

    def merge(self, inputs: list[jax.Array]) -> jax.Array:
        """The elementwise minimum."""
        return reduce(jnp.minimum, inputs)


@dataclass(frozen=True, kw_only=True)
class Concatenate(Layer):
    """Concatenate along one axis."""

    axis: int = -1

    def output_mask(self, masks: tuple[Any, ...], *inputs: Any) -> Any:
        """The masks as wide as their inputs, joined; a step is kept if anything in it is."""
        found = mask_list(masks, inputs)
        if all(mask is None for mask in found):
            return None
        wide = []
        for x, mask in zip(inputs[0], found, strict=True):
            if mask is None:
                wide.append(jnp.ones(x.shape, bool))
            else:
                wide.append(
                    jnp.broadcast_to(mask[..., None], x.shape) if mask.ndim < x.ndim else mask
                )
        return jnp.any(jnp.concatenate(wide, self.axis), axis=-1)

    def call(self, state: LayerState, inputs: Sequence[jax.Array], *, train: bool) -> jax.Array:
        """Join the arrays."""
        return jnp.concatenate(inputs, self.axis)


@dataclass(frozen=True, kw_only=True)
class Dot(Layer):
    """Dot: for every example the product of two arrays over one axis of each."""

    axes: int | tuple[int, int]
    normalize: bool = False

    def call(self, state: LayerState, inputs: Sequence[jax.Array], *, train: bool) -> jax.Array:
        """(batch, rest of the first, rest of the second); numbers become vectors of one."""
        x, y = inputs
        axes = (self.axes, self.axes) if isinstance(self.axes, int) else self.axes
        a, b = axes[0] % x.ndim, axes[1] % y.ndim
        if self.normalize:
            x, y = _unit(x, a), _unit(y, b)
        product = lax.dot_general(x, y, (((a,), (b,)), ((0,), (0,))))
        return product[:, None] if product.ndim == 1 else product


def _unit(x: jax.Array, axis: int) -> jax.Array:
    power = jnp.sum(jnp.square(x), axis, keepdims=True)
    return x * lax.rsqrt(jnp.maximum(power, 1e-12))


def mask_list(masks: tuple[Any, ...], inputs: tuple[Any, ...]) -> list[Any]:
    """The mask of every array in the list that is the first input."""
    found = masks[0] if masks and isinstance(masks[0], list | tuple) else [None] * len(inputs[0])
    return list(found)
