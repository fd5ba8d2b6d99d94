"""Images read between their pixels: Resize, GridSample, RoiAlign."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.importers.onnx.dtypes import checked_shape, is_float
from fastgpu.importers.onnx.operators.operator import axis_of, one_of, operator

_COORDINATES = (
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "tf_half_pixel_for_nn",
    "tf_crop_and_resize",
)


@operator("Upsample")
def upsample_by_attribute(
    x: jax.Array, *, scales: Sequence[float], mode: str = "nearest"
) -> jax.Array:
    """Opsets up to 8: the scales are an attribute."""
    return upsample(x, np.asarray(scales), mode=mode)


@operator("Upsample", since=9, static=("scales",))
def upsample(x: jax.Array, scales: np.ndarray, *, mode: str = "nearest") -> jax.Array:
    """Larger by a factor an axis."""
    return resize_without_roi(x, scales, mode=mode)


@operator("Resize", static=("scales",))
def resize_without_roi(x: jax.Array, scales: np.ndarray, *, mode: str = "nearest") -> jax.Array:
    """Opset 10: corner against corner, nearest pixels by floor."""
    return resize(
        x,
        None,
        scales,
        mode=mode,
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


@operator("Resize", since=11, static=("roi", "scales", "sizes"))
def resize(
    x: jax.Array,
    roi: np.ndarray | None = None,
    scales: np.ndarray | None = None,
    sizes: np.ndarray | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> jax.Array:
    """Another size by nearest, linear or cubic interpolation, one axis after the other."""
    one_of("mode", mode, ("nearest", "linear", "cubic"))
    one_of("coordinate_transformation_mode", coordinate_transformation_mode, _COORDINATES)
    chosen = range(x.ndim) if axes is None else [axis_of(axis, x.ndim) for axis in axes]
    factors, lengths = _factors(x, scales, sizes, list(chosen), keep_aspect_ratio_policy)
    checked_shape(
        [dict(zip(chosen, lengths, strict=True)).get(a, n) for a, n in enumerate(x.shape)], "Resize"
    )
    crop = coordinate_transformation_mode == "tf_crop_and_resize"
    y = x
    outside: list[tuple[int, np.ndarray]] = []
    for i, (axis, factor, length) in enumerate(zip(chosen, factors, lengths, strict=True)):
        part = (
            (float(roi[i]), float(roi[len(lengths) + i]))
            if crop and roi is not None
            else (0.0, 1.0)
        )
        if factor == 1 and length == x.shape[axis] and part == (0.0, 1.0):
            continue
        at = _places(coordinate_transformation_mode, x.shape[axis], length, factor, part)
        if mode == "nearest":
            y = jnp.take(y, _nearest(at, nearest_mode, x.shape[axis]), axis)
        else:
            shrink = min(factor, 1.0) if antialias else 1.0
            table = _weights(at, x.shape[axis], mode, cubic_coeff_a, shrink, bool(exclude_outside))
            wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
            weights = jnp.asarray(table, wide.dtype)
            y = jnp.moveaxis(jnp.tensordot(wide, weights, ((axis,), (1,))), -1, axis)
        if crop:
            outside.append((axis, (at < 0) | (at > x.shape[axis] - 1)))
    for axis, beyond in outside:
        shape = [1] * x.ndim
        shape[axis] = -1
        y = jnp.where(beyond.reshape(shape), jnp.asarray(extrapolation_value, y.dtype), y)
    if not is_float(x.dtype) and is_float(y.dtype):
        limits = jnp.iinfo(x.dtype)
        y = jnp.clip(jnp.round(y), limits.min, limits.max)
    return y.astype(x.dtype)


def _factors(
    x: jax.Array,
    scales: np.ndarray | None,
    sizes: np.ndarray | None,
    axes: Sequence[int],
    policy: str,
) -> tuple[list[float], list[int]]:
    """The factor and the new length of each axis."""
    old = [x.shape[axis] for axis in axes]
    if scales is not None and scales.size:
        factors = [float(factor) for factor in scales]
        return factors, [math.floor(n * f) for n, f in zip(old, factors, strict=True)]
    if sizes is None:
        raise ValueError("neither scales nor sizes")
    lengths = [int(size) for size in sizes]
    factors = [size / n for size, n in zip(lengths, old, strict=True)]
    if policy == "stretch":
        return factors, lengths
    one_of("keep_aspect_ratio_policy", policy, ("stretch", "not_larger", "not_smaller"))
    factor = min(factors) if policy == "not_larger" else max(factors)
    return [factor] * len(old), [int(factor * n + 0.5) for n in old]


def _places(how: str, old: int, new: int, factor: float, part: tuple[float, float]) -> np.ndarray:
    """Where on the old axis each new element lies."""
    i = np.arange(new, dtype=np.float64)
    length = factor * old
    if how == "align_corners":
        return np.zeros(new) if length == 1 else i * (old - 1) / (length - 1)
    if how == "asymmetric":
        return i / factor
    if how == "tf_half_pixel_for_nn":
        return (i + 0.5) / factor
    if how == "tf_crop_and_resize":
        start, end = part
        if length == 1 or new == 1:
            return np.full(new, (start + end) * (old - 1) / 2)
        return start * (old - 1) + i * (end - start) * (old - 1) / (new - 1)
    if how == "pytorch_half_pixel" and new == 1:
        return np.full(new, 0.0)
    at = (i + 0.5) / factor - 0.5
    if how == "half_pixel_symmetric":
        at = at + old / 2 * (1 - new / length)
    return at


def _nearest(at: np.ndarray, how: str, size: int) -> np.ndarray:
    rounded = {
        "round_prefer_floor": lambda v: np.ceil(v - 0.5),
        "round_prefer_ceil": lambda v: np.floor(v + 0.5),
        "floor": np.floor,
        "ceil": np.ceil,
    }
    one_of("nearest_mode", how, tuple(rounded))
    return np.clip(rounded[how](at), 0, size - 1).astype(np.int32)


def _weights(
    at: np.ndarray, size: int, mode: str, a: float, shrink: float, inside_only: bool
) -> np.ndarray:
    """A matrix (new, old): what each old element adds to each new one."""
    reach = math.ceil((1 if mode == "linear" else 2) / shrink)
    taps = np.floor(at).astype(np.int64)[:, None] + np.arange(1 - reach, reach + 1)
    distance = (at[:, None] - taps) * shrink
    value = np.clip(1 - np.abs(distance), 0, None) if mode == "linear" else _cubic(distance, a)
    if inside_only:
        value = np.where((taps < 0) | (taps >= size), 0, value)
    if inside_only or shrink < 1:
        value = value / value.sum(1, keepdims=True)
    table = np.zeros((len(at), size))
    np.add.at(table, (np.arange(len(at))[:, None], np.clip(taps, 0, size - 1)), value)
    return table


def _cubic(distance: Any, a: float, xp: Any = np) -> Any:
    """Keys's cubic kernel (https://ieeexplore.ieee.org/document/1163711)."""
    d = xp.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return xp.where(d <= 1, near, xp.where(d < 2, far, 0))


def sample(image: jax.Array, at: jax.Array, mode: str, padding: str) -> jax.Array:
    """Read an image (channels, spatial...) at fractional places (..., axis); gives (channels, ...).

    `mode` is "linear", "cubic" or "nearest"; beyond the image lie zeros or its edge.
    """
    sizes = image.shape[1:]
    rank = len(sizes)
    low = jnp.round(at) if mode == "nearest" else jnp.floor(at)
    offsets = {"nearest": (0,), "linear": (0, 1), "cubic": (-1, 0, 1, 2)}[mode]
    total = jnp.zeros((), image.dtype)
    for corner in itertools.product(offsets, repeat=rank):
        places, weight, valid = [], jnp.ones(at.shape[:-1], at.dtype), True
        for axis, offset in enumerate(corner):
            place = low[..., axis] + offset
            distance = at[..., axis] - place
            if mode == "linear":
                weight = weight * (1 - jnp.abs(distance))
            elif mode == "cubic":
                weight = weight * _cubic(distance, -0.75, jnp)
            if padding == "reflection":
                place = _reflected(place, sizes[axis])
            valid = valid & (place >= 0) & (place <= sizes[axis] - 1)
            places.append(jnp.clip(place, 0, sizes[axis] - 1).astype(jnp.int32))
        read = image[(slice(None), *places)]
        if padding == "zeros":
            read = jnp.where(valid, read, jnp.zeros_like(read))
        total = total + read * weight.astype(image.dtype)
    return total


def _reflected(at: jax.Array, size: int, edge: float = 0.0) -> jax.Array:
    """Mirrored at both ends: at the first and last pixel, or `edge` beyond them."""
    low, span = -edge, size - 1 + 2 * edge
    if span <= 0:
        return jnp.zeros_like(at)
    moved = jnp.mod(at - low, 2 * span)
    return jnp.minimum(moved, 2 * span - moved) + low


@operator("AffineGrid", static=("size",))
def affine_grid(theta: jax.Array, size: np.ndarray, *, align_corners: int = 0) -> jax.Array:
    """Where an affine map sends each pixel of an image of a size, from -1 to 1, last axis first."""
    shape = checked_shape(size, "AffineGrid")[2:]
    axes = []
    for length in reversed(shape):
        i = np.arange(length, dtype=np.float64)
        ends = 2 * i / max(length - 1, 1) - 1 if length > 1 else np.zeros(1)
        axes.append(ends if align_corners else (2 * i + 1) / length - 1)
    places = np.meshgrid(*reversed(axes), indexing="ij")
    ones = np.ones(shape)
    base = jnp.asarray(np.stack([*reversed(places), ones], -1), theta.dtype)
    return jnp.einsum("...i,nji->n...j", base, theta)


@operator("GridSample")
def grid_sample(
    x: jax.Array,
    grid: jax.Array,
    *,
    align_corners: int = 0,
    mode: str = "linear",
    padding_mode: str = "zeros",
) -> jax.Array:
    """Images read at places given from -1 to 1, the last axis first."""
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    one_of("mode", mode, ("linear", "nearest", "cubic"))
    one_of("padding_mode", padding_mode, ("zeros", "border", "reflection"))
    sizes = jnp.asarray(x.shape[2:], grid.dtype)
    at = jnp.flip(grid, -1)
    at = (at + 1) / 2 * (sizes - 1) if align_corners else ((at + 1) * sizes - 1) / 2
    edge = 0.0 if align_corners else 0.5
    if mode == "nearest":
        at = jnp.round(at)
    axes = []
    for axis, size in enumerate(x.shape[2:]):
        place = at[..., axis]
        if padding_mode == "border" and mode != "cubic":
            place = jnp.clip(place, 0, size - 1)
        elif padding_mode == "reflection" and mode != "cubic":
            place = jnp.clip(_reflected(place, size, edge), 0, size - 1)
        axes.append(place)
    at = jnp.stack(axes, -1)
    if mode == "cubic" and padding_mode == "reflection":
        return jax.vmap(lambda image, where: _cubic_reflected(image, where, edge))(x, at)
    return jax.vmap(lambda image, where: sample(image, where, mode, padding_mode))(x, at)


def _cubic_reflected(image: jax.Array, at: jax.Array, edge: float) -> jax.Array:
    """Cubic reading where each of the sixteen pixels is reflected by itself."""
    total = jnp.zeros((), image.dtype)
    low = jnp.floor(at)
    for corner in itertools.product((-1, 0, 1, 2), repeat=image.ndim - 1):
        places, weight = [], jnp.ones(at.shape[:-1], at.dtype)
        for axis, offset in enumerate(corner):
            place = low[..., axis] + offset
            weight = weight * _cubic(at[..., axis] - place, -0.75, jnp)
            size = image.shape[1 + axis]
            mirrored = jnp.clip(_reflected(place, size, edge), 0, size - 1)
            places.append(mirrored.astype(jnp.int32))
        total = total + image[(slice(None), *places)] * weight.astype(image.dtype)
    return total


@operator("RoiAlign")
def roi_align_unshifted(
    x: jax.Array,
    rois: jax.Array,
    batch_indices: jax.Array,
    *,
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> jax.Array:
    """Opsets up to 15: places are not moved by half a pixel."""
    return roi_align(
        x,
        rois,
        batch_indices,
        coordinate_transformation_mode="output_half_pixel",
        mode=mode,
        output_height=output_height,
        output_width=output_width,
        sampling_ratio=sampling_ratio,
        spatial_scale=spatial_scale,
    )


@operator("RoiAlign", since=16)
def roi_align(
    x: jax.Array,
    rois: jax.Array,
    batch_indices: jax.Array,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> jax.Array:
    """Regions of images as grids of bins, each the mean or maximum of a few readings."""
    one_of("mode", mode, ("avg", "max"))
    half = coordinate_transformation_mode == "half_pixel"
    if sampling_ratio <= 0:
        raise ValueError("sampling_ratio=0 takes as many readings as a region's values say")
    n = sampling_ratio
    shape = (output_height, output_width)
    boxes = rois * spatial_scale - (0.5 if half else 0.0)
    start, end = boxes[:, 1::-1], boxes[:, 3:1:-1]  # (y, x)
    size = end - start if half else jnp.maximum(end - start, 1.0)
    ys, xs = (
        start[:, i, None] + (jnp.arange(shape[i] * n) + 0.5) / n * size[:, i, None] / shape[i]
        for i in range(2)
    )
    at = jnp.stack(jnp.broadcast_arrays(ys[:, :, None], xs[:, None, :]), -1)
    sizes = jnp.asarray(x.shape[2:], at.dtype)
    inside = jnp.all((at >= -1) & (at <= sizes), -1)
    at = jnp.clip(at, 0, sizes - 1)
    reader = _corners if mode == "max" else _read
    return jax.vmap(lambda b, a, ok: reader(x[b], a, ok, shape, n))(batch_indices, at, inside)


def _read(
    image: jax.Array, at: jax.Array, inside: jax.Array, shape: tuple[int, int], n: int
) -> jax.Array:
    values = jnp.where(inside, sample(image, at, "linear", "border"), 0)
    return values.reshape(-1, shape[0], n, shape[1], n).mean((2, 4))


def _corners(
    image: jax.Array, at: jax.Array, inside: jax.Array, shape: tuple[int, int], n: int
) -> jax.Array:
    """The largest weighted corner of any reading, which is what ONNX defines as the maximum."""
    low = jnp.floor(at)
    best = None
    for corner in itertools.product((0, 1), repeat=2):
        place = low + jnp.asarray(corner, at.dtype)
        weight = jnp.prod(1 - jnp.abs(at - place), -1)
        y, x = (
            jnp.clip(place[..., i], 0, image.shape[1 + i] - 1).astype(jnp.int32) for i in (0, 1)
        )
        value = jnp.where(inside, image[:, y, x] * weight, 0)
        best = value if best is None else jnp.maximum(best, value)
    assert best is not None
    return best.reshape(-1, shape[0], n, shape[1], n).max((2, 4))
