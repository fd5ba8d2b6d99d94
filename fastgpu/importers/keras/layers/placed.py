"""A layer in its place in a model, and what happens around every call of one."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from fastgpu.importers.keras.dtypes import Policy
from fastgpu.importers.keras.layers.layer import Layer, LayerState, Path, Variables


@dataclass(frozen=True)
class Masked:
    """A value on its way through a graph, with its Keras mask; one leaf of a nested structure."""

    value: Any
    mask: Any = None


class Model(Protocol):
    """What a nested model offers; see `Graph`."""

    @property
    def layers(self) -> "tuple[Placed, ...]":
        """The layers of the model."""
        ...

    def run(self, variables: Variables, inputs: Sequence[Any], train: bool) -> Any:
        """The nested structure of `Masked` outputs for one of `Masked` inputs."""
        ...


@dataclass(frozen=True)
class Placed:
    """A layer or a nested model in its place.

    `path` is where its weights live; a layer object that occurs in several models has one path.
    """

    name: str
    class_name: str
    path: Path
    layer: "Layer | Model"
    policy: Policy
    frozen: bool

    @property
    def mixes_batch(self) -> bool:
        """Whether an output of a training call depends on other examples of the batch."""
        if isinstance(self.layer, Layer):
            return self.layer.mixes_batch or any(child.mixes_batch for child in self.children())
        return any(child.mixes_batch for child in self.layer.layers)

    def children(self) -> "list[Placed]":
        """The layers that this one wraps, without those of a nested model."""
        if not isinstance(self.layer, Layer):
            return []
        found: list[Placed] = []
        for option in self.layer.nested:
            value = getattr(self.layer, option)
            found += value if isinstance(value, tuple) else [] if value is None else [value]
        return found

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], Any]:
        """Move arguments given by name to their positions, where they keep their masks."""
        bound, rest = list(args), dict(kwargs)
        if isinstance(self.layer, Layer):
            known = list(inspect.signature(self.layer.call).parameters.values())[1:]
            for parameter in known[len(bound) :]:
                if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
                    break
                if parameter.name not in rest:
                    break
                bound.append(rest.pop(parameter.name))
        return bound, rest

    def call(
        self,
        variables: Variables,
        inputs: Sequence[Any],
        masks: Sequence[Any],
        kwargs: Mapping[str, Any],
        train: bool,
    ) -> tuple[Any, Any]:
        """The outputs of one call and their masks, as `keras.layers.Layer.__call__` gives them.

        `masks` has the mask of each input; a `mask` among `kwargs` replaces that of the first.
        """
        if not isinstance(self.layer, Layer):
            masks = masks if kwargs.get("mask") is None else [kwargs["mask"]]
            masked = [
                with_masks(value, mask)
                for value, mask in zip(inputs, _padded(masks, len(inputs)), strict=True)
            ]
            outputs = self.layer.run(variables, masked, train)
            return values_of(outputs), masks_of(outputs)
        if self.layer.autocast:
            dtype = jnp.dtype(self.policy.compute_dtype)
            inputs, kwargs = jax.tree.map(lambda x: _autocast(x, dtype), (inputs, dict(kwargs)))
        masks = tuple(_padded(masks, len(inputs)))
        if kwargs.get("mask") is not None:
            masks = (kwargs["mask"], *masks[1:])
        state = LayerState(variables, self.path, self.policy, self.frozen, masks)
        outputs = self.layer.call(state, *inputs, train=train, **kwargs)
        return outputs, self.layer.output_mask(masks, *inputs)


def values_of(nested: Any) -> Any:
    """A nested structure of `Masked` without the masks; other leaves stay."""
    return jax.tree.map(lambda leaf: leaf.value if isinstance(leaf, Masked) else leaf, nested)


def masks_of(nested: Any) -> Any:
    """The masks of a nested structure of `Masked`, None for other leaves."""
    return jax.tree.map(lambda leaf: leaf.mask if isinstance(leaf, Masked) else None, nested)


def with_masks(values: Any, masks: Any) -> Any:
    """A nested structure of `Masked`; masks go by order, as Keras attaches them."""
    leaves, tree = jax.tree.flatten(values)
    found = jax.tree.leaves(masks, is_leaf=lambda mask: mask is None)
    found += [None] * (len(leaves) - len(found))
    pairs = [Masked(value, mask) for value, mask in zip(leaves, found, strict=False)]
    return jax.tree.unflatten(tree, pairs)


def _padded(masks: Sequence[Any], count: int) -> list[Any]:
    return [*masks, *[None] * (count - len(masks))]


def _autocast(x: Any, dtype: Any) -> Any:
    """Keras casts floating inputs to the layer's compute dtype and leaves integers alone."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating):
        return x.astype(dtype)
    return x
