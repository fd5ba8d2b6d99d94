"""The graph of a Keras model: which layer is called on what, and how to run it.

Graphs and everything in them are immutable and hashable, so a module that holds one can be a static
argument of `jax.jit`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fastgpu.errors import BatchError
from fastgpu.importers.keras.layers.constants import Constant, Slice
from fastgpu.importers.keras.layers.layer import Variables
from fastgpu.importers.keras.layers.placed import Masked, Placed, masks_of, values_of, with_masks


@dataclass(frozen=True)
class Tensor:
    """One output of one call of a layer; Keras calls this triple `keras_history`."""

    layer: str
    call: int
    index: int


@dataclass(frozen=True)
class Structure:
    """Nested lists, tuples and dicts of leaves, in a hashable form."""

    leaves: tuple[Any, ...]
    tree: Any

    @classmethod
    def of(cls, nested: Any) -> "Structure":
        """Take apart a nested structure."""
        leaves, tree = jax.tree.flatten(nested)
        return cls(tuple(leaves), tree)

    def relabel(self, layer: str) -> Any:
        """The nested structure with the outputs of `layer` as leaves, counted in order."""
        leaves = [Tensor(layer, 0, index) for index in range(len(self.leaves))]
        return jax.tree.unflatten(self.tree, leaves)

    def fill(self, values: dict[Tensor, Any]) -> Any:
        """Put it together again with a value in the place of every tensor."""
        return jax.tree.unflatten(self.tree, [_filled(leaf, values) for leaf in self.leaves])


def _filled(leaf: Any, values: dict[Tensor, Any]) -> Any:
    if isinstance(leaf, Tensor):
        return values[leaf]
    return leaf.value() if isinstance(leaf, Constant | Slice) else leaf


_NO_ARGUMENTS = Structure.of({})


@dataclass(frozen=True)
class Input:
    """An input of a model; None in `shape` stands for any size, the batch comes first.

    A nested Sequential need not say its shape: then `shape` is empty and nothing is checked.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class Call:
    """One call of a layer: a list of positional arguments and a dict of the others.

    `training` is a phase fixed in the graph, None to follow the caller. `clears_masks`: in Keras 3
    MultiHeadAttention takes the masks off the tensors it is called on, for all later calls too.
    """

    layer: str
    number: int
    inputs: Structure
    training: bool | None = None
    kwargs: Structure = _NO_ARGUMENTS
    clears_masks: bool = False


@dataclass(frozen=True, repr=False)
class Graph:
    """A Sequential or Functional model: layers in Keras's order, calls in an order that can run."""

    name: str
    inputs: tuple[Input, ...]
    input_structure: Structure
    layers: tuple[Placed, ...]
    calls: tuple[Call, ...]
    outputs: Structure

    def __repr__(self) -> str:
        return f"Graph({self.name!r}, {len(self.layers)} layers)"

    def run(self, variables: Variables, inputs: Sequence[Any], train: bool) -> Any:
        """Call the layers one after the other and return the outputs in Keras's structure.

        Inputs are arrays, or `Masked` where they come with a mask; outputs are `Masked`.
        """
        arrays = match_inputs(self, inputs)
        values: dict[Tensor, Any] = {
            Tensor(spec.name, 0, 0): Masked(_as_input(values_of(array), spec), masks_of(array))
            for spec, array in zip(self.inputs, arrays, strict=True)
        }
        placed = {layer.name: layer for layer in self.layers}
        for call in self.calls:
            layer = placed[call.layer]
            phase = train if call.training is None else call.training
            args, kwargs = layer.bind(call.inputs.fill(values), call.kwargs.fill(values))
            masks = [masks_of(arg) for arg in args]
            with jax.named_scope(layer.name):
                found = layer.call(variables, values_of(args), masks, values_of(kwargs), phase)
            for index, value in enumerate(jax.tree.leaves(with_masks(*found))):
                values[Tensor(call.layer, call.number, index)] = value
            for leaf in [*call.inputs.leaves, *call.kwargs.leaves] if call.clears_masks else []:
                if isinstance(leaf, Tensor):
                    values[leaf] = Masked(values[leaf].value)
        return self.outputs.fill(values)


def match_inputs(graph: Graph, args: Sequence[Any]) -> list[Any]:
    """The arrays of a call in the order of `graph.inputs`.

    `args` may be one array per input, or one list, tuple or dict as Keras accepts it; the keys of a
    dict are those of the model's input structure or the names of its input layers.
    """
    given = args[0] if len(args) == 1 and isinstance(args[0], list | tuple | dict) else list(args)
    if isinstance(given, dict):
        names = [spec.name for spec in graph.inputs]
        if jax.tree.structure(given) == graph.input_structure.tree:
            return jax.tree.leaves(given)
        if set(names) <= set(given):
            return [given[name] for name in names]
    leaves = jax.tree.leaves(given)
    if len(leaves) != len(graph.inputs):
        raise BatchError(
            f"model {graph.name!r} was called with other inputs than it declares",
            expected=", ".join(f"{spec.name} {_shown(spec.shape)}" for spec in graph.inputs),
            got=f"{len(leaves)} arrays in {jax.tree.structure(given)}",
            fix="pass one array per input, in this order, or a dict with these names",
        )
    return leaves


def _as_input(x: Any, spec: Input) -> jax.Array:
    """Cast to the declared dtype, add or drop a last axis of one as Keras does, check the shape."""
    x = jnp.asarray(x)
    if not spec.shape:
        return x
    given = x.shape
    if x.ndim == len(spec.shape) + 1 and x.shape[-1] == 1:
        x = x.squeeze(-1)
    elif x.ndim == len(spec.shape) - 1 and spec.shape[-1] == 1:
        x = x[..., None]
    sizes = zip(x.shape[1:], spec.shape[1:], strict=False)
    if x.ndim != len(spec.shape) or any(want is not None and size != want for size, want in sizes):
        raise BatchError(
            f"input {spec.name!r} has another shape than the model declares",
            expected=_shown(spec.shape),
            got=_shown(given),
            fix="reshape or resize the batch, or rebuild the Keras model for this shape",
        )
    return x.astype(jax.dtypes.canonicalize_dtype(spec.dtype))


def _shown(shape: Sequence[int | None]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"
