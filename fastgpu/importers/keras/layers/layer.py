"""What a layer rule is: its options as dataclass fields, and one method that computes.

To add a Keras layer, write a frozen dataclass whose fields carry the names of the Keras options,
ask `state` for the weights in the order in which Keras saves them, and enter it in the table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import jax

from fastgpu.importers.keras.dtypes import Policy
from fastgpu.importers.keras.layers.initializers import ZEROS, Initializer

if TYPE_CHECKING:
    from fastgpu.importers.keras.layers.placed import Placed

Path = tuple[str, ...]
ANY: tuple[Any, ...] = ("any value",)
# LoRA's two factors are merged into the kernel of a file.
MERGED: dict[str, tuple[Any, ...]] = {"lora_rank": ANY, "lora_alpha": ANY}


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
    """The weights, the masks and the randomness of one layer while it is called.

    `frozen` is Keras's `trainable=False`: weights then live in the "non_trainable" collection.
    `masks` has the Keras mask of every positional argument: None, a boolean array, or a list or
    dict of these where the argument is one.
    """

    variables: Variables
    path: Path
    policy: Policy
    frozen: bool
    masks: tuple[Any, ...] = ()

    @property
    def mask(self) -> Any:
        """The mask of the first argument."""
        return self.masks[0] if self.masks else None

    def child(self, name: str) -> "LayerState":
        """The state of a part of this layer, whose weights lie below it under `name`."""
        return replace(self, path=(*self.path, name), masks=())

    def call(
        self,
        placed: "Placed",
        *inputs: Any,
        train: bool,
        masks: tuple[Any, ...] = (),
        **kwargs: Any,
    ) -> Any:
        """Call a layer that this one wraps; returns its outputs without their masks."""
        return placed.call(self.variables, inputs, masks, kwargs, train)[0]

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

    def memory(self, name: str, shape: tuple[int, ...], dtype: str) -> jax.Array:
        """What a stateful layer remembers from call to call, in "rnn_state"; zero at first."""
        return self._get("rnn_state", name, shape, ZEROS, dtype)

    def remember(self, name: str, value: jax.Array) -> None:
        """Replace what is remembered, if the caller made "rnn_state" mutable."""
        self.variables.put("rnn_state", self.path, name, value)

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
    `penalties`: options that only add to the loss, which are reported as ignored.
    `renamed`: older names of options.
    `nested`: options that are layers themselves, each with the attribute under which Keras saves
    its weights; the field holds a `Placed`, or a tuple of them.
    `saved_twice`: how many of the layer's own weights a `.keras` file repeats from a nested layer.
    `mixes_batch`: whether in training an output depends on other examples of the batch.
    `clears_masks`: whether in Keras 3 a call takes the masks off the tensors it is given.
    `supports_masking`: whether the mask of the first argument becomes that of the outputs.
    """

    autocast: ClassVar[bool] = True
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {}
    penalties: ClassVar[tuple[str, ...]] = ()
    renamed: ClassVar[dict[str, str]] = {}
    nested: ClassVar[dict[str, str]] = {}
    saved_twice: ClassVar[int] = 0
    mixes_batch: ClassVar[bool] = False
    clears_masks: ClassVar[bool] = False
    supports_masking: ClassVar[bool] = False

    @classmethod
    def complete(cls, config: Mapping[str, Any], keras_2: bool) -> Mapping[str, Any]:
        """The config with what older versions of Keras left out or wrote differently."""
        return config

    def output_mask(self, masks: tuple[Any, ...], *inputs: Any) -> Any:
        """The mask of the outputs: None, one, or a list of one per output."""
        return masks[0] if self.supports_masking and masks else None

    def call(self, state: LayerState, *inputs: Any, train: bool) -> Any:
        """Compute the outputs from the inputs of one call."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Function(Layer):
    """A layer replaced by a function from `custom_objects`; it has no weights."""

    function: Callable[..., Any]
    autocast: ClassVar[bool] = False

    def call(self, state: LayerState, *inputs: Any, train: bool, **kwargs: Any) -> Any:
        """Call the user's function on what the layer is called with."""
        return self.function(*inputs, **kwargs)


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
