"""The linen module that runs the graph of an ONNX model."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fastgpu.errors import BatchError, FastGPUError, WeightsError
from fastgpu.importers.onnx.dtypes import as_jax, in_use, is_float, is_integer
from fastgpu.importers.onnx.evaluate import Evaluation
from fastgpu.importers.onnx.graph import Graph, Input, Slot


class OnnxModel(nn.Module):
    """An ONNX model as a linen module.

    `module.apply(variables, *inputs)` takes the inputs in the file's order and gives the outputs in
    the file's order: one array, or a tuple of several. With `train=True` dropout drops (pass
    `rngs={"dropout": key}`) and batch normalizations use the batch's statistics (pass
    `mutable=["batch_stats"]`). There is no `init`: an ONNX file has values, no initializers.

    Trained arrays are in "params", moving statistics in "batch_stats", other large arrays in
    "constants", under the names of the file, split at dots and slashes.
    """

    graph: Graph
    inputs: tuple[Input, ...]

    @property
    def input_specs(self) -> tuple[Any, ...]:
        """The declared inputs in order: name, shape (None for any size), dtype in JAX."""
        return tuple(_Spec(each) for each in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of the outputs, in order."""
        return self.graph.outputs

    @nn.compact
    def __call__(self, *inputs: Any, train: bool = False) -> Any:
        """Run the model on a batch; see the class."""
        assert self.scope is not None
        if self.is_initializing():
            raise FastGPUError(
                "an imported ONNX model has no init",
                expected="module.apply(imported.variables, ...)",
                fix="use the variables that from_onnx returned",
            )
        arrays = _checked(self.inputs, inputs)
        slots = {slot for graph in self.graph.everything() for slot in graph.slots.values()}
        keys: list[jax.Array] = []

        def draw() -> jax.Array:
            if not keys:
                # not inside a loop's trace, where Flax's scopes may not be used
                raise FastGPUError(
                    "the model draws random numbers",
                    expected='a key in the "dropout" stream',
                    fix="module.apply(variables, x, train=..., rngs={'dropout': key})",
                )
            return keys[0]

        if self.has_rng("dropout"):
            keys.append(self.make_rng("dropout"))
        evaluation = Evaluation({slot: self._value(slot) for slot in slots}, train, draw)
        outputs = [_result(value) for value in evaluation.run(self.graph, arrays, {})]
        self._store(evaluation.updates)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _value(self, slot: Slot) -> jax.Array:
        value: Any = self.variables.get(slot.collection, {})
        for name in slot.path:
            if name not in value:
                raise WeightsError(
                    f"variables[{slot.collection!r}] has no {'/'.join(slot.path)!r}",
                    fix="pass the variables that from_onnx returned",
                )
            value = value[name]
        return jnp.asarray(value)

    def _store(self, updates: Mapping[Slot, jax.Array]) -> None:
        assert self.scope is not None
        if not self.scope.is_mutable_collection("batch_stats"):
            return
        tree = _copied(self.variables.get("batch_stats", {}))
        for slot, value in updates.items():
            scope = tree
            for name in slot.path[:-1]:
                scope = scope[name]
            scope[slot.path[-1]] = value
        for name in {slot.path[0] for slot in updates}:
            self.scope.put_variable("batch_stats", name, tree[name])


class _Spec:
    """An input as exporters ask for it: sizes without names, a dtype that JAX has."""

    def __init__(self, declared: Input) -> None:
        self.name = declared.name
        self.shape = tuple(n if isinstance(n, int) else None for n in declared.sizes or ())
        self.dtype = str(in_use(declared.dtype, jnp))


def _copied(tree: Any) -> Any:
    return {k: _copied(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _result(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_result, value))
    return value if value is None else as_jax(value, "an output")


def _checked(declared: tuple[Input, ...], inputs: tuple[Any, ...]) -> list[Any]:
    """The inputs as JAX arrays of the declared types, their shapes judged."""
    if len(inputs) != len(declared):
        raise BatchError(
            "the model has other inputs",
            expected=f"{len(declared)}: {', '.join(each.name for each in declared)}",
            got=f"{len(inputs)}",
        )
    sizes: dict[str, int] = {}
    return [_one(each, value, sizes) for each, value in zip(declared, inputs, strict=True)]


def _one(declared: Input, value: Any, sizes: dict[str, int]) -> Any:
    if declared.sequence:
        if not isinstance(value, tuple | list | None):
            raise BatchError(f"input {declared.name!r}", expected="a list of arrays")
        return value if value is None else tuple(_typed(declared, part) for part in value)
    if value is None:
        return None
    array = _typed(declared, value)
    if declared.sizes is None:
        return array
    fits = len(declared.sizes) == array.ndim
    for expected, got in zip(declared.sizes, array.shape, strict=False):
        if isinstance(expected, str):
            expected = sizes.setdefault(expected, got)
        fits = fits and expected in (None, got)
    if not fits:
        shape = ["any" if n is None else sizes.get(n, n) if isinstance(n, str) else n
                 for n in declared.sizes]  # fmt: skip
        raise BatchError(
            f"input {declared.name!r} has another shape than the model was exported for",
            expected=str(shape).replace("'", ""),
            got=str(list(array.shape)),
            fix="export it with dynamic axes; or, if nothing in the model depends on the old "
            f"sizes: from_onnx(..., shapes={{{declared.name!r}: (None, ...)}})",
        )
    return array


def _typed(declared: Input, value: Any) -> jax.Array:
    array = as_jax(value, f"input {declared.name!r}")
    kinds = (is_float, is_integer, lambda dtype: dtype == np.bool_)
    wanted = in_use(declared.dtype, jnp)
    if array.dtype != wanted and not any(k(array.dtype) and k(wanted) for k in kinds):
        raise BatchError(
            f"input {declared.name!r} has another type",
            expected=str(wanted),
            got=str(array.dtype),
            fix=f"cast it: x.astype({str(wanted)!r})",
        )
    return array.astype(wanted)
