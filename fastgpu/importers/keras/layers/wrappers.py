"""Layers that wrap another layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu.importers.keras.layers.initializers import Initializer
from fastgpu.importers.keras.layers.layer import Layer, LayerState, Path, Variables
from fastgpu.importers.keras.layers.placed import Placed

_TRUNCATED = Initializer("TruncatedNormal", (("stddev", 0.02),))


@dataclass(frozen=True, kw_only=True)
class Wrapper(Layer):
    """Wrapper: the layer it holds, and nothing else."""

    layer: Placed
    nested: ClassVar[dict[str, str]] = {"layer": "layer"}

    def call(self, state: LayerState, x: Any, *, train: bool) -> Any:
        """Call the layer."""
        return state.call(self.layer, x, train=train, masks=state.masks)


@dataclass(frozen=True, kw_only=True)
class Pipeline(Layer):
    """Pipeline: preprocessing layers one after the other."""

    layers: tuple[Placed, ...]
    nested: ClassVar[dict[str, str]] = {"layers": "pipeline_layers"}
    autocast: ClassVar[bool] = False

    def call(self, state: LayerState, x: Any, *, train: bool) -> Any:
        """Call the layers in turn."""
        for layer in self.layers:
            x = state.call(layer, x, train=train)
        return x


@dataclass(frozen=True, kw_only=True)
class TimeDistributed(Layer):
    """TimeDistributed: the same layer at every step.

    Steps become examples of one large batch, unless the layer mixes the examples of a batch in
    training: then it runs step by step, as in Keras, and moving statistics advance at every step.
    """

    layer: Placed
    nested: ClassVar[dict[str, str]] = {"layer": "layer"}
    supports_masking: ClassVar[bool] = True

    def call(self, state: LayerState, x: jax.Array, *, train: bool, mask: Any = None) -> Any:
        """(batch, time, ...) to (batch, time, ...)."""
        mask = state.mask
        batch, steps = x.shape[:2]
        if train and self.layer.mixes_batch:
            outputs = []
            for step in range(steps):
                masks = (None if mask is None else mask[:, step],)
                outputs.append(state.call(self.layer, x[:, step], train=train, masks=masks))
            return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *outputs)
        flat = x.reshape(batch * steps, *x.shape[2:])
        masks = (None if mask is None else mask.reshape(batch * steps, *mask.shape[2:]),)
        output = state.call(self.layer, flat, train=train, masks=masks)
        return jax.tree.map(lambda y: y.reshape(batch, steps, *y.shape[1:]), output)


@dataclass(frozen=True, kw_only=True)
class SpectralNormalization(Layer):
    """SpectralNormalization (Miyato et al., arXiv:1802.05957) of a layer's kernel.

    In training the layer computes with its kernel over the largest singular value, which a power
    iteration follows from batch to batch. As in Keras on JAX the kernel itself is not replaced.
    """

    layer: Placed
    power_iterations: int = 1
    nested: ClassVar[dict[str, str]] = {"layer": "layer"}
    saved_twice: ClassVar[int] = 1

    def call(self, state: LayerState, x: jax.Array, *, train: bool) -> Any:
        """Call the layer with the normalized kernel."""

        def normalized(kernel: jax.Array) -> jax.Array:
            start = state.statistic("vector_u", (1, kernel.shape[-1]), _TRUNCATED)
            if not train:
                return kernel
            u, sigma = self._largest(kernel.reshape(-1, kernel.shape[-1]), start)
            empty = jnp.all(kernel == 0)
            state.update_statistic("vector_u", jnp.where(empty, start, u))
            return jnp.where(empty, kernel, kernel / jnp.where(empty, 1, sigma[0, 0]))

        variables = _OtherKernel(state.variables, self.layer.path, normalized)
        return self.layer.call(variables, (x,), (), {}, train)[0].astype(x.dtype)

    def _largest(self, kernel: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The left vector and the singular value after some power iterations."""
        v = u
        for _ in range(self.power_iterations):
            v = _unit(u @ kernel.T)
            u = _unit(v @ kernel)
        u, v = lax.stop_gradient(u), lax.stop_gradient(v)
        return u, v @ kernel @ u.T


@dataclass(frozen=True)
class _OtherKernel:
    """Variables in which the kernel of one layer is seen through a function."""

    variables: Variables
    path: Path
    change: Callable[[jax.Array], jax.Array]

    def get(
        self,
        collection: str,
        path: Path,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        initializer: Initializer,
    ) -> jax.Array:
        value = self.variables.get(collection, path, name, shape, dtype, initializer)
        changed = path == self.path and name in ("kernel", "embeddings")
        return self.change(value) if changed else value

    def put(self, collection: str, path: Path, name: str, value: jax.Array) -> None:
        self.variables.put(collection, path, name, value)

    def key(self, path: Path) -> jax.Array:
        return self.variables.key(path)


def _unit(x: jax.Array) -> jax.Array:
    """x over its norm, as Keras guards it."""
    return x * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x)), 1e-12))
