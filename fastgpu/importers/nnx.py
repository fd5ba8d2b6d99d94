"""A live `flax.nnx` module as a linen module with variables, so that training code has one form.

    model object -> graph definition + state -> linen module + collections

The arrays move out of the object into plain dicts; each call puts them back into a fresh copy.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from fastgpu.errors import FastGPUError, UnsupportedLayerError, WeightsError
from fastgpu.importers.imported import Imported, ImportReport

_KEY, _COUNT = "(random key)", "(random count)"


@dataclass(frozen=True)
class Slot:
    """One array of an NNX model: the collection it goes to, and its path there."""

    collection: str
    path: tuple[str, ...]
    shape: tuple[int, ...]


class NNXModel(nn.Module):
    """A `flax.nnx` module behind linen's `apply`.

    `train=True` calls the model after `model.train()`, `train=False` after `model.eval()`. What the
    call changes is written to the collections that are mutable. Random streams of the model start
    anew from the "dropout" key of each call. There is no `init`: an NNX object is made with its
    values, which `from_nnx` returns.
    """

    graph: Any
    structure: Any
    slots: tuple[Slot, ...]

    @nn.compact
    def __call__(self, *inputs: Any, train: bool = False, **kwargs: Any) -> Any:
        """Call the model; `kwargs` go to it unchanged."""
        assert self.scope is not None
        if self.is_initializing():
            raise FastGPUError(
                "an imported NNX model has no init",
                expected="module.apply(imported.variables, ...)",
                fix="make a new NNX object and call from_nnx again",
            )
        leaves = [self._leaf(slot, train) for slot in self.slots]
        model = nnx.merge(self.graph, jax.tree.unflatten(self.structure, leaves))
        if train:
            model.train()
        else:
            model.eval()
        outputs = model(*inputs, **kwargs)
        self._write_back({slot.path: value for slot, value in _slots_and_values(model)})
        return outputs

    def _leaf(self, slot: Slot, train: bool) -> jax.Array:
        if slot.collection == _COUNT:
            return jnp.zeros(slot.shape, "uint32")
        if slot.collection == _KEY:
            # In evaluation nothing draws from the streams, so any key will do.
            drawn = train or self.has_rng("dropout")
            key = self.make_rng("dropout") if drawn else jax.random.key(0)
            return jax.random.split(key, slot.shape) if slot.shape else key
        value: Any = self.variables.get(slot.collection, {})
        for name in slot.path:
            if name not in value:
                raise WeightsError(
                    f"variables[{slot.collection!r}] has no {'/'.join(slot.path)!r}",
                    fix="pass the variables that from_nnx returned",
                )
            value = value[name]
        return value

    def _write_back(self, values: Mapping[tuple[str, ...], Any]) -> None:
        assert self.scope is not None
        changed = _nest(self.slots, values)
        for collection, names in changed.items():
            if self.scope.is_mutable_collection(collection):
                for name, value in names.items():
                    self.scope.put_variable(collection, name, value)


def from_nnx(model: nnx.Module) -> Imported:
    """Import a live `flax.nnx` module; the object itself is left as it is.

    Returns:
        `Imported(module, variables, report)` with `nnx.Param` in "params", `nnx.BatchStat` in
        "batch_stats" and every other variable in "nnx_state". Paths are those of the attributes,
        list indices as text. `module.apply(variables, *inputs, train=..., mutable=..., rngs=...)`
        works as for a linen module, and so do `supervised_loss` and `train_step`.

    Raises:
        UnsupportedLayerError: `model` is no NNX module, or a variable holds more than one array.

    >>> import numpy as np
    >>> imported = from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    >>> sorted(imported.variables["params"])
    ['bias', 'kernel']
    >>> imported.module.apply(imported.variables, np.ones((4, 3))).shape
    (4, 2)
    """
    if not isinstance(model, nnx.Module):
        raise UnsupportedLayerError(
            "from_nnx takes a live NNX module",
            expected="an instance of flax.nnx.Module",
            got=f"{type(model).__module__}.{type(model).__name__}",
            fix="use a linen module as it is, and from_keras for a Keras model",
        )
    graph, state = nnx.split(model)
    found = _slots_and_values(model)
    structure = jax.tree.structure(state)
    if structure.num_leaves != len(found):
        raise UnsupportedLayerError(
            f"{type(model).__name__} has a variable that holds more than one array",
            expected="one array in every nnx.Variable",
            fix="split it into several variables",
        )
    report = ImportReport(f"nnx {type(model).__name__}")
    for slot, value in found:
        name = "/".join(slot.path)
        if slot.collection in (_KEY, _COUNT):
            why = "random stream: it starts from rngs={'dropout': key} of each call"
            report.add("variable", name, "ignored", why)
        else:
            report.parameter_count += math.prod(slot.shape)
            shape = ",".join(map(str, slot.shape))
            report.add("variable", name, "mapped", f"{value.dtype}[{shape}] in {slot.collection}")
    slots = tuple(slot for slot, _ in found)
    variables = _nest(slots, {slot.path: value for slot, value in found})
    return Imported(NNXModel(graph, structure, slots), variables, report)


def _slots_and_values(model: nnx.Module) -> list[tuple[Slot, Any]]:
    """Every variable of a model in the order of its state's leaves."""
    return [
        (Slot(_collection(variable), tuple(map(str, path)), jnp.shape(value)), value)
        for path, variable in nnx.to_flat_state(nnx.state(model))
        for value in [variable.get_value()]
    ]


def _collection(variable: Any) -> str:
    kinds = (
        (nnx.Param, "params"),
        (nnx.BatchStat, "batch_stats"),
        (nnx.RngKey, _KEY),
        (nnx.RngCount, _COUNT),
    )
    return next((name for kind, name in kinds if isinstance(variable, kind)), "nnx_state")


def _nest(slots: tuple[Slot, ...], values: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Collections of nested dicts from values by path."""
    collections: dict[str, Any] = {}
    for slot in slots:
        if slot.collection not in (_KEY, _COUNT):
            scope = collections.setdefault(slot.collection, {})
            for name in slot.path[:-1]:
                scope = scope.setdefault(name, {})
            scope[slot.path[-1]] = values[slot.path]
    return collections
