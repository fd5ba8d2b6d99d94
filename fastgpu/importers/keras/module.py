"""The linen module that runs the graph of a Keras model."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import Scope

from fastgpu.errors import WeightsError
from fastgpu.importers.keras.graph import Graph, Input
from fastgpu.importers.keras.layers.initializers import Initializer
from fastgpu.importers.keras.layers.layer import Path
from fastgpu.importers.keras.layers.placed import masks_of, values_of


class KerasModel(nn.Module):
    """A Keras model as a linen module.

    `module.apply(variables, *inputs)` gives what `model(inputs)` gives in Keras: inputs in Keras's
    order, outputs in Keras's structure. `train=True` is Keras's `training=True`: pass
    `mutable=["batch_stats"]` and `rngs={"dropout": key}`, as for any linen module.
    `module.init(key, *inputs)` draws fresh weights from the model's own Keras initializers
    (Glorot uniform where a custom one has no equal).

    Scopes are named after the Keras layers: `variables["params"]["conv1"]["kernel"]`; nested models
    nest dicts. Trainable weights are in "params", moving statistics in "batch_stats", and what
    Keras would not train in "non_trainable". What stateful recurrent layers carry from batch to
    batch is in "rnn_state", zero at first: it advances where that collection is mutable.
    """

    graph: Graph

    @property
    def input_specs(self) -> tuple[Input, ...]:
        """The declared inputs in order: name, shape (None for any size, the batch first), dtype."""
        return self.graph.inputs

    @nn.compact
    def __call__(self, *inputs: Any, train: bool = False) -> Any:
        """Run the model on a batch; see the class."""
        return self.with_masks(*inputs, train=train)[0]

    @nn.compact
    def with_masks(self, *inputs: Any, train: bool = False) -> tuple[Any, Any]:
        """The outputs, and in the same structure their Keras masks: boolean arrays, or None.

        Keras's `fit` multiplies the weight of every position in a loss by the mask of its output:
        `outputs, masks = module.apply(variables, x, method="with_masks")`.
        """
        assert self.scope is not None
        found = self.graph.run(ScopeVariables(self.scope, train), inputs, train)
        return values_of(found), masks_of(found)


class ScopeVariables:
    """The variables of the layers, in one Flax scope per layer.

    Layers get scopes, not submodules: a layer may have any name, also one that is an attribute of
    `nn.Module`, such as "dropout" or "variables".
    """

    def __init__(self, root: Scope, train: bool) -> None:
        self.root, self.train = root, train
        self.scopes: dict[Path, Scope] = {(): root}

    def get(
        self,
        collection: str,
        path: Path,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        initializer: Initializer,
    ) -> jax.Array:
        """The value of a variable; during `init` a new one is drawn."""
        scope = self._scope(path)
        if not scope.has_variable(collection, name):
            if not (scope.is_mutable_collection(collection) and scope.has_rng("params")):
                raise WeightsError(
                    f"variables[{collection!r}] has no {'/'.join((*path, name))!r}",
                    expected=f"{dtype}{list(shape)}",
                    fix="pass the variables that from_keras returned, or those of module.init",
                )
            value = initializer(scope.make_rng("params"), shape, dtype)
            scope.put_variable(collection, name, value)
        return jnp.asarray(scope.get_variable(collection, name))

    def put(self, collection: str, path: Path, name: str, value: jax.Array) -> None:
        """Store a new value.

        A graph may hold a layer in the training phase for good; its statistics then stay as they
        are in a call that does not train.
        """
        scope = self._scope(path)
        must = self.train and collection != "rnn_state"
        if must or scope.is_mutable_collection(collection):
            scope.put_variable(collection, name, value)

    def key(self, path: Path) -> jax.Array:
        """A fresh key of the "dropout" stream."""
        return self._scope(path).make_rng("dropout")

    def _scope(self, path: Path) -> Scope:
        if path not in self.scopes:
            self.scopes[path] = self._scope(path[:-1]).push(path[-1])
        return self.scopes[path]
