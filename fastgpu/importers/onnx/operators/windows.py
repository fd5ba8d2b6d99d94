"""The arithmetic of windows that slide over spatial axes: padding, output sizes, patches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.importers.onnx.operators.operator import one_of

AUTO_PADS = ("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")


@dataclass(frozen=True)
class Windows:
    """Windows over spatial axes, one number an axis; `pads` are (before, after).

    `extra` is what rounding the output size up adds behind the padding.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    extra: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """Padding with what rounding up adds."""
        return tuple((a, b + extra) for (a, b), extra in zip(self.pads, self.extra, strict=True))

    def patches(self, x: jax.Array, fill: Any) -> jax.Array:
        """The elements of every window, as a last axis."""
        rank = len(self.kernel)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - rank) + list(self.padding), constant_values=fill)
        return x[(..., *self.places())].reshape(*x.shape[: x.ndim - rank], *self.outputs, -1)

    def places(self) -> tuple[np.ndarray, ...]:
        """Where in the padded input each element of each window lies, an array an axis."""
        rank = len(self.kernel)
        found = []
        for axis in range(rank):
            starts = np.arange(self.outputs[axis]) * self.strides[axis]
            offsets = np.arange(self.kernel[axis]) * self.dilations[axis]
            shape = [1] * (2 * rank)
            shape[axis], shape[rank + axis] = len(starts), len(offsets)
            found.append((starts[:, None] + offsets).reshape(shape))
        return tuple(found)

    def counts(self, include_padding: bool, sizes: Sequence[int]) -> np.ndarray:
        """How many elements of each window count; what rounding up adds never does."""
        total = np.ones((1,) * len(sizes), np.float32)
        for axis, size in enumerate(sizes):
            before, after = self.pads[axis]
            counted = np.zeros(before + size + after + self.extra[axis], np.float32)
            counted[before : before + size] = 1
            if include_padding:
                counted[: before + size + after] = 1
            starts = np.arange(self.outputs[axis]) * self.strides[axis]
            offsets = np.arange(self.kernel[axis]) * self.dilations[axis]
            shape = [1] * len(sizes)
            shape[axis] = -1
            total = total * counted[starts[:, None] + offsets].sum(1).reshape(shape)
        return total


def windows(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int] | None,
    dilations: Sequence[int] | None,
    pads: Sequence[int] | None,
    auto_pad: str,
    ceil_mode: int = 0,
) -> Windows:
    """Windows over spatial axes of these sizes, from ONNX's attributes.

    >>> windows([5], [2], [2], None, None, "NOTSET", ceil_mode=1).outputs
    (3,)
    """
    one_of("auto_pad", auto_pad, AUTO_PADS)
    rank = len(sizes)
    strides, dilations = per_axis(strides, rank, 1), per_axis(dilations, rank, 1)
    both = per_axis(pads, 2 * rank, 0)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    padding, extra, outputs = [], [], []
    for axis, (size, span, stride) in enumerate(zip(sizes, spans, strides, strict=True)):
        before, after = both[axis], both[rank + axis]
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            total = max((math.ceil(size / stride) - 1) * stride + span - size, 0)
            less, more = total // 2, total - total // 2
            before, after = (less, more) if auto_pad == "SAME_UPPER" else (more, less)
        elif auto_pad == "VALID":
            before = after = 0
        steps = (size + before + after - span) / stride
        count = (math.ceil(steps) if ceil_mode else math.floor(steps)) + 1
        if ceil_mode and (count - 1) * stride >= size + before:
            count -= 1  # a window that would start in the padding behind
        if count < 0:
            raise ValueError(f"a window of {span} over {size + before + after} elements")
        padding.append((before, after))
        extra.append(max((count - 1) * stride + span - size - before - after, 0))
        outputs.append(count)
    return Windows(tuple(kernel), strides, dilations, tuple(padding), tuple(extra), tuple(outputs))


def per_axis(values: Sequence[int] | None, count: int, default: int) -> tuple[int, ...]:
    """One value an axis, or the default for each."""
    found = (default,) * count if values is None else tuple(int(value) for value in values)
    if len(found) != count:
        raise ValueError(f"{list(found)} (expected {count} numbers)")
    return found
