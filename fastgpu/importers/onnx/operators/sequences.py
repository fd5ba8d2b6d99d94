"""Sequences, as tuples of arrays whose length is known; and optional values, None if absent."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from fastgpu.importers.onnx.dtypes import as_jax
from fastgpu.importers.onnx.operators.operator import axis_of, operator
from fastgpu.importers.onnx.operators.shapes import split_array


def _position(position: Any, length: int, extra: int = 0) -> int:
    index = int(position.item())
    if not -length <= index < length + extra:
        raise ValueError(f"position {index} of a sequence of {length}")
    return index % length if index < 0 else index


@operator("SequenceConstruct", as_is=True)
def construct(*inputs: Any) -> Any:
    """A sequence of arrays."""
    return (tuple(inputs),)


@operator("SequenceEmpty", as_is=True)
def empty(*, dtype: int = 1) -> Any:
    """A sequence of nothing."""
    return ((),)


@operator("SequenceAt", static=("position",), as_is=True)
def at(sequence: Any, position: np.ndarray) -> Any:
    """The array at a position."""
    return sequence[_position(position, len(sequence))]


@operator("SequenceLength", as_is=True)
def length(sequence: Any) -> Any:
    """The number of arrays; always known."""
    return np.array(len(sequence), np.int64)


@operator("SequenceInsert", static=("position",), as_is=True)
def insert(sequence: Any, value: Any, position: np.ndarray | None = None) -> Any:
    """With an array put in at a position, or at the end."""
    count = len(sequence)
    place = count if position is None else _position(position, count, 1)
    return ((*sequence[:place], value, *sequence[place:]),)


@operator("SequenceErase", static=("position",), as_is=True)
def erase(sequence: Any, position: np.ndarray | None = None) -> Any:
    """Without the array at a position, or the last one."""
    count = len(sequence)
    place = count - 1 if position is None else _position(position, count)
    return ((*sequence[:place], *sequence[place + 1 :]),)


@operator("ConcatFromSequence", as_is=True)
def concatenate(sequence: Any, *, axis: int, new_axis: int = 0) -> Any:
    """One array of all, along an axis or along a new one."""
    arrays = [as_jax(value, "ConcatFromSequence") for value in sequence]
    if new_axis:
        return jnp.stack(arrays, axis_of(axis, arrays[0].ndim + 1))
    return jnp.concatenate(arrays, axis_of(axis, arrays[0].ndim))


@operator("SplitToSequence", static=("split",), as_is=True)
def split_to_sequence(
    x: Any, split: np.ndarray | None = None, *, axis: int = 0, keepdims: int = 1
) -> Any:
    """Parts of an array: of sizes, of one size, or one by one."""
    x = as_jax(x, "SplitToSequence")
    along = axis_of(axis, x.ndim)
    size = x.shape[along]
    if split is None:
        parts = split_array(x, [1] * size, None, along, size, jnp)
        return (tuple(parts if keepdims else (jnp.squeeze(part, along) for part in parts)),)
    if split.ndim == 0:
        each = int(split.item())
        split = np.array([min(each, size - start) for start in range(0, size, each)])
    return (split_array(x, split, None, along, len(split), jnp),)


@operator("SequenceMap", as_is=True)
def sequence_map(first: Any, *more: Any, body: Any, call: Any) -> Any:
    """A graph applied to every array of one or more sequences."""
    columns: list[list[Any]] = [[] for _ in body.outputs]
    for i, value in enumerate(first):
        rest = [other[i] if isinstance(other, tuple) else other for other in more]
        for column, output in zip(
            columns, call.run(body, [value, *rest], iteration=i), strict=True
        ):
            column.append(output)
    return tuple(tuple(column) for column in columns)


@operator("Optional", as_is=True)
def optional(value: Any = None, *, type: Any = None) -> Any:
    """A value, or its absence."""
    return (value,)


@operator("OptionalHasElement", as_is=True)
def has_element(value: Any = None) -> Any:
    """Whether there is a value; always known."""
    return np.array(value is not None)


@operator("OptionalGetElement", as_is=True)
def get_element(value: Any) -> Any:
    """The value that is there."""
    if value is None:
        raise ValueError("the optional value is absent")
    return (value,)
