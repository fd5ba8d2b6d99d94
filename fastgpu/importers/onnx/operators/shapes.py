"""Operators that change shapes, or make arrays from shapes; known values stay numpy."""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.errors import UnsupportedLayerError
from fastgpu.importers.onnx.dtypes import (
    ELEMENT_TYPES,
    checked_shape,
    in_use,
    is_float,
    is_symbolic,
    known_sizes,
    sizes_in,
)
from fastgpu.importers.onnx.operators.operator import axes_of, axis_of, one_of, operator

# An end of a slice that only says "all".
_BEYOND = 1 << 31
# What is known while tracing becomes part of the program; larger arrays are computed in it.
_SMALL = 1 << 16


def _made_by(xp: ModuleType, shape: tuple[Any, ...]) -> ModuleType:
    fixed = all(isinstance(size, int) for size in shape)
    return xp if fixed and math.prod(shape) <= _SMALL else jnp


@operator("Shape")
def shape(x: Any, *, start: int = 0, end: int | None = None, xp: ModuleType) -> np.ndarray:
    """The shape, or a part of it; always known."""
    return known_sizes(x.shape[slice(start, end)])


@operator("Size")
def size(x: Any, *, xp: ModuleType) -> np.ndarray:
    """The number of elements; always known."""
    return known_sizes((math.prod(x.shape),)).reshape(())


@operator("Reshape", static=("shape",))
def reshape(x: Any, shape: np.ndarray, *, allowzero: int = 0, xp: ModuleType) -> Any:
    """Another shape; 0 stands for the size that is there, -1 for what is left."""
    sizes = list(sizes_in(shape))
    if not allowzero:
        kept = [isinstance(size, int) and size == 0 for size in sizes]
        sizes = [x.shape[i] if kept[i] else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


@operator("Flatten")
def flatten(x: Any, *, axis: int = 1, xp: ModuleType) -> Any:
    """A matrix: the axes before `axis`, and those from it on."""
    axis = axis if axis == x.ndim else axis_of(axis, x.ndim)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Squeeze")
def squeeze_by_attribute(x: Any, *, axes: Sequence[int] | None = None, xp: ModuleType) -> Any:
    """Opsets up to 12: the axes are an attribute."""
    return xp.squeeze(x, None if axes is None else axes_of(axes, x.ndim))


@operator("Squeeze", since=13, static=("axes",))
def squeeze(x: Any, axes: np.ndarray | None = None, *, xp: ModuleType) -> Any:
    """Without axes of size 1: those named, or all."""
    return xp.squeeze(x, None if axes is None else axes_of(axes, x.ndim))


@operator("Unsqueeze")
def unsqueeze_by_attribute(x: Any, *, axes: Sequence[int], xp: ModuleType) -> Any:
    """Opsets up to 12: the axes are an attribute."""
    return xp.expand_dims(x, axes_of(axes, x.ndim + len(axes)))


@operator("Unsqueeze", since=13, static=("axes",))
def unsqueeze(x: Any, axes: np.ndarray, *, xp: ModuleType) -> Any:
    """With new axes of size 1, at these places of the result."""
    return xp.expand_dims(x, axes_of(axes.reshape(-1), x.ndim + axes.size))


@operator("Transpose")
def transpose(x: Any, *, perm: Sequence[int] | None = None, xp: ModuleType) -> Any:
    """The axes in another order; reversed if none is given."""
    return xp.transpose(x, perm)


@operator("Concat")
def concatenate(*inputs: Any, axis: int, xp: ModuleType) -> Any:
    """Arrays one after another along an axis."""
    return xp.concatenate(inputs, axis_of(axis, inputs[0].ndim))


@operator("Split")
def split_by_attribute(
    x: Any, *, axis: int = 0, split: Sequence[int] | None = None, xp: ModuleType, call: Any
) -> Any:
    """Opsets up to 12: the sizes are an attribute."""
    return split_array(x, split, None, axis, len(call.outputs), xp)


@operator("Split", since=13, static=("split",))
def split(
    x: Any,
    split: np.ndarray | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    xp: ModuleType,
    call: Any,
) -> Any:
    """Parts of an array along an axis, of the sizes in `split` or equal ones."""
    return split_array(x, split, num_outputs, axis, len(call.outputs), xp)


def split_array(
    x: Any, split: Any, parts: int | None, axis: int, outputs: int, xp: ModuleType
) -> tuple[Any, ...]:
    """Parts of the given sizes, or as many equal ones with a smaller last one."""
    axis = axis_of(axis, x.ndim)
    length = x.shape[axis]
    if split is None:
        parts = parts or outputs
        each = math.ceil(length / parts)
        split = [min(each, max(length - each * i, 0)) for i in range(parts)]
    sizes = [int(size) for size in split]
    if sum(sizes) != length or min(sizes, default=0) < 0:
        raise ValueError(f"sizes {sizes} of an axis of {length}")
    return tuple(xp.split(x, np.cumsum(sizes)[:-1], axis))


@operator("Slice")
def slice_by_attributes(
    x: Any,
    *,
    starts: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int] | None = None,
    xp: ModuleType,
) -> Any:
    """Opsets up to 9: all of it is attributes."""
    return slice_array(x, starts, ends, axes, None)


@operator("Slice", since=10, static=("starts", "ends", "axes", "steps"))
def slice_(
    x: Any,
    starts: np.ndarray,
    ends: np.ndarray,
    axes: np.ndarray | None = None,
    steps: np.ndarray | None = None,
    *,
    xp: ModuleType,
) -> Any:
    """A part of an array, along every axis from a start to an end by a step."""
    return slice_array(x, starts, ends, axes, steps)


def slice_array(x: Any, starts: Any, ends: Any, axes: Any, steps: Any) -> Any:
    """Python's slices, except that ends beyond the array may be any 64-bit number."""
    axes = range(len(starts)) if axes is None else [axis_of(int(a), x.ndim) for a in axes]
    steps = [1] * len(starts) if steps is None else steps
    slices = [slice(None)] * x.ndim
    starts, ends, steps = map(sizes_in, (starts, ends, steps))
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        # a negative step ends before the first element at any end below -length
        before_first = step < 0 and end < -x.shape[axis]
        beyond = isinstance(end, int) and end > _BEYOND
        slices[axis] = slice(start, None if before_first or beyond else end, step)
    return x[tuple(slices)]


@operator("Expand", static=("shape",))
def expand(x: Any, shape: np.ndarray, *, xp: ModuleType) -> Any:
    """Broadcast against a shape."""
    wanted = checked_shape(shape, "Expand")
    rank = max(x.ndim, len(wanted))
    pairs = zip(*((1,) * (rank - len(s)) + tuple(s) for s in (x.shape, wanted)), strict=True)
    target = tuple(old if new == 1 else new for old, new in pairs)
    return _made_by(xp, checked_shape(target, "Expand")).broadcast_to(x, target)


@operator("Tile", static=("repeats",))
def tile(x: Any, repeats: np.ndarray, *, xp: ModuleType) -> Any:
    """An array repeated along every axis."""
    counts = sizes_in(repeats)
    sizes = checked_shape(
        np.array([n * r for n, r in zip(x.shape, counts, strict=True)], object), "Tile"
    )
    return _made_by(xp, sizes).tile(x, counts)


@operator("ConstantOfShape", static=("shape",))
def constant_of_shape(shape: np.ndarray, *, value: np.ndarray | None = None, xp: ModuleType) -> Any:
    """An array of one value."""
    sizes = checked_shape(shape, "ConstantOfShape")
    value = np.zeros(1, np.float32) if value is None else value
    xp = _made_by(xp, sizes)
    return xp.full(sizes, value.reshape(()), in_use(value.dtype, xp))


@operator("Range", static=("start", "limit", "delta"))
def range_(
    start: np.ndarray, limit: np.ndarray, delta: np.ndarray, *, stash_type: int = 1, xp: ModuleType
) -> Any:
    """Numbers from start to limit by delta."""
    if is_symbolic(start) or is_symbolic(limit):
        if is_symbolic(start) or delta.item() != 1:
            raise UnsupportedLayerError("Range over symbolic sizes", expected="a delta of 1")
        return jnp.arange(limit.item() - start.item()) + start.item()
    a, b, step = (value.astype(np.float64).item() for value in (start, limit, delta))
    (count,) = checked_shape([max(math.ceil((b - a) / step), 0)], "Range")
    xp = _made_by(xp, (count,))
    wide = in_use(np.float64 if is_float(start.dtype) else np.int64, xp)
    steps = xp.arange(count, dtype=wide) * delta.astype(wide)
    return (steps + start.astype(wide)).astype(in_use(start.dtype, xp))


@operator("EyeLike")
def eye_like(x: Any, *, dtype: int | None = None, k: int = 0, xp: ModuleType) -> Any:
    """Ones on a diagonal, in the shape of a matrix."""
    kind = x.dtype if dtype is None else ELEMENT_TYPES[dtype]
    return xp.eye(*x.shape, k=k, dtype=in_use(kind, xp))


@operator("Trilu", static=("k",))
def triangle(x: Any, k: np.ndarray | None = None, *, upper: int = 1, xp: ModuleType) -> Any:
    """A triangle of the last two axes; the rest is zero."""
    return (xp.triu if upper else xp.tril)(x, 0 if k is None else k.item())


@operator("Pad")
def pad_by_attributes(
    x: Any, *, pads: Sequence[int], mode: str = "constant", value: float = 0.0, xp: ModuleType
) -> Any:
    """Opsets up to 10: all of it is attributes."""
    return pad_array(x, pads, mode, value, None, xp)


@operator("Pad", since=11, static=("pads", "axes"))
def pad(
    x: Any,
    pads: np.ndarray,
    value: Any = None,
    axes: np.ndarray | None = None,
    *,
    mode: str = "constant",
    xp: ModuleType,
) -> Any:
    """Padded, or cut where a pad is negative."""
    return pad_array(x, pads, mode, 0 if value is None else value.reshape(()), axes, xp)


def pad_array(x: Any, pads: Any, mode: str, value: Any, axes: Any, xp: ModuleType) -> Any:
    """numpy's padding on chosen axes, after negative pads have cut."""
    one_of("mode", mode, ("constant", "edge", "reflect", "wrap"))
    axes = range(x.ndim) if axes is None else [axis_of(int(axis), x.ndim) for axis in axes]
    width = [(0, 0)] * x.ndim
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        width[axis] = (int(before), int(after))
    checked_shape(
        [n + max(a, 0) + max(b, 0) for n, (a, b) in zip(x.shape, width, strict=True)], "Pad"
    )
    cuts = [
        slice(max(-before, 0), n - max(-after, 0))
        for n, (before, after) in zip(x.shape, width, strict=True)
    ]
    x, width = x[tuple(cuts)], [(max(a, 0), max(b, 0)) for a, b in width]
    if mode == "constant":
        return xp.pad(x, width, constant_values=xp.asarray(value).astype(x.dtype))
    return xp.pad(x, width, mode=mode)


@operator("CenterCropPad", static=("shape",))
def center_crop_pad(
    x: Any, shape: np.ndarray, *, axes: Sequence[int] | None = None, xp: ModuleType
) -> Any:
    """Cut or padded to a size around the middle."""
    axes = range(x.ndim) if axes is None else [axis_of(axis, x.ndim) for axis in axes]
    for axis, size in zip(axes, checked_shape(shape, "CenterCropPad"), strict=True):
        extra = size - x.shape[axis]
        if extra < 0:
            start = -extra // 2
            x = xp.moveaxis(xp.moveaxis(x, axis, 0)[start : start + size], 0, axis)
        width = [(0, 0)] * x.ndim
        width[axis] = (max(extra, 0) // 2, max(extra, 0) - max(extra, 0) // 2)
        x = xp.pad(x, width)
    return x


@operator("DepthToSpace")
def depth_to_space(x: jax.Array, *, blocksize: int, mode: str = "DCR") -> jax.Array:
    """Channels moved into blocks of positions."""
    one_of("mode", mode, ("DCR", "CRD"))
    n, c, h, w = x.shape
    b = blocksize
    if mode == "DCR":
        x = x.reshape(n, b, b, c // (b * b), h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, c // (b * b), b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // (b * b), h * b, w * b)


@operator("SpaceToDepth")
def space_to_depth(x: jax.Array, *, blocksize: int, mode: str = "DCR") -> jax.Array:
    """Blocks of positions moved into channels."""
    one_of("mode", mode, ("DCR", "CRD"))
    n, c, h, w = x.shape
    b = blocksize
    x = x.reshape(n, c, h // b, b, w // b, b)
    x = x.transpose((0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4))
    return x.reshape(n, c * b * b, h // b, w // b)
