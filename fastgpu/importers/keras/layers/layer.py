"""What a layer rule is: its options as dataclass fields, and one method that computes.

To add a Keras layer, write a frozen dataclass whose fields carry the names of the Keras options,
ask `state` for the weights in the order in which Keras saves them, and enter it in the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax

from fastgpu.importers.keras.dtypes import Policy
from fastgpu.importers.keras.layers.initializers import Initializer

Path = tuple[str, ...]
ANY: tuple[Any, ...] = ("any value",)


class Variables(Protocol):
    """Where the weights of all layers live: a Flax scope, or a list of what is declared."""

    def get(
        self,
        collection: str,
        path: Path,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        initializer: Initializer,
    ) -> jax.Array:
        """The value of one variable."""
        ...

    def put(self, collection: str, path: Path, name: str, value: jax.Array) -> None:
        """Replace the value of one variable."""
        ...

    def key(self, path: Path) -> jax.Array:
        """A fresh random key from the "dropout" stream."""
        ...


@dataclass(frozen=True)
class LayerState:
    """The weights and the randomness of one layer while it is called.

    `frozen` is Keras's `trainable=False`: weights then live in the "non_trainable" collection.
    """

    variables: Variables
    path: Path
    policy: Policy
    frozen: bool

    def weight(
        self, name: str, shape: tuple[int, ...], initializer: Initializer, *, autocast: bool = True
    ) -> jax.Array:
        """A trainable weight, cast to the compute dtype unless `autocast` is off."""
        collection = "non_trainable" if self.frozen else "params"
        value = self._get(collection, name, shape, initializer, self.policy.variable_dtype)
        return value.astype(self.policy.compute_dtype) if autocast else value

    def statistic(self, name: str, shape: tuple[int, ...], initializer: Initializer) -> jax.Array:
        """A moving statistic, kept in "batch_stats" in the variable dtype."""
        return self._get("batch_stats", name, shape, initializer, self.policy.variable_dtype)

    def update_statistic(self, name: str, value: jax.Array) -> None:
        """Replace a moving statistic."""
        value = value.astype(self.policy.variable_dtype)
        self.variables.put("batch_stats", self.path, name, value)

    def constant(
        self,
        name: str,
        shape: tuple[int, ...],
        initializer: Initializer,
        dtype: str | None = None,
    ) -> jax.Array:
        """A weight that no layer ever trains, kept in "non_trainable"."""
        dtype = dtype or self.policy.variable_dtype
        return self._get("non_trainable", name, shape, initializer, dtype)

    def key(self) -> jax.Array:
        """A fresh random key from the "dropout" stream."""
        return self.variables.key(self.path)

    def _get(
        self,
        collection: str,
        name: str,
        shape: tuple[int, ...],
        initializer: Initializer,
        dtype: str,
    ) -> jax.Array:
        return self.variables.get(collection, self.path, name, tuple(shape), dtype, initializer)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Base of every rule. Fields are Keras options; subclasses compute in `call`.

    `autocast`: whether Keras casts floating inputs to the layer's compute dtype.
    `fixed`: options that are no fields, with the values fastgpu has an equal of (`ANY` for options
    that never change what the layer computes).
    `renamed`: older names of options.
    """

    autocast: ClassVar[bool] = True
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {}
    renamed: ClassVar[dict[str, str]] = {}

    def call(self, state: LayerState, *inputs: Any, train: bool) -> Any:
        """Compute the outputs from the inputs of one call."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Function(Layer):
    """A layer replaced by a function from `custom_objects`; it has no weights."""

    function: Callable[..., Any]
    autocast: ClassVar[bool] = False

    def call(self, state: LayerState, *inputs: Any, train: bool) -> Any:
        """Call the user's function on the layer's inputs."""
        return self.function(*inputs)


def spatial_axes(data_format: str, ndim: int) -> tuple[int, ...]:
    """The axes of height, width, ... in an array of rank `ndim`.

    >>> spatial_axes("channels_last", 4), spatial_axes("channels_first", 4)
    ((1, 2), (2, 3))
    """
    return tuple(range(1, ndim - 1) if data_format == "channels_last" else range(2, ndim))


def channel_axis(data_format: str) -> int:
    """The axis of the channels.

    >>> channel_axis("channels_last")
    -1
    """
    return -1 if data_format == "channels_last" else 1


def positive_axis(axis: int, ndim: int) -> int:
    """An axis counted from the front. Raises `ValueError` if there is no such axis.

    >>> positive_axis(-1, 4)
    3
    """
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis {axis} of an array of rank {ndim}")
    return axis % ndim


def along_axis(vector: jax.Array, axis: int, ndim: int) -> jax.Array:
    """Reshape a vector so that it broadcasts along `axis` of an array of rank `ndim`.

    >>> import numpy as np
    >>> along_axis(np.zeros(3), 1, 4).shape
    (1, 3, 1, 1)
    """
    shape = [1] * ndim
    shape[axis] = vector.shape[0]
    return vector.reshape(shape)


def as_tuple(value: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    """A size per spatial axis; Keras allows one number for all.

    >>> as_tuple(2, 3)
    (2, 2, 2)
    """
    return (value,) * rank if isinstance(value, int) else tuple(value)


def one_of(option: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise `ValueError` naming the option if its value is none of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{option}={value!r} (expected one of {', '.join(map(repr, allowed))})")


DATA_FORMATS = ("channels_last", "channels_first")
