"""One view of `conv_general_dilated` for the rules: channels last, whatever the layout was.

`lhs` becomes [batch, *spatial, features], `rhs` [*window, in_features, out_features], the output
[batch, *out_spatial, out_features]. A transpose that changes nothing disappears at trace time.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu.ir.lowered import Site


@dataclass(frozen=True)
class Convolution:
    """A convolution's sizes and settings, in the order of its spatial dimensions."""

    batch: int
    in_features: int
    rhs_in_features: int
    out_features: int
    in_spatial: tuple[int, ...]
    window: tuple[int, ...]
    out_spatial: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    feature_groups: int
    batch_groups: int
    specs: Any
    out_dtype: Any

    @classmethod
    def of(cls, site: Site) -> "Convolution | None":
        """The convolution at `site`; `None` for what no rule handles: integers, symbolic sizes."""
        lhs, rhs = site.in_avals
        (out,) = site.out_avals
        specs = site["dimension_numbers"]
        sizes = (*lhs.shape, *rhs.shape, *out.shape)
        floating = all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in (lhs, rhs, out))
        if not floating or not all(isinstance(size, int) and size > 0 for size in sizes):
            return None

        def pick(shape: tuple[int, ...], spec: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(shape[axis] for axis in spec)

        batch, in_features, *in_spatial = pick(lhs.shape, specs.lhs_spec)
        out_features, rhs_in_features, *window = pick(rhs.shape, specs.rhs_spec)
        _, _, *out_spatial = pick(out.shape, specs.out_spec)
        return cls(
            batch,
            in_features,
            rhs_in_features,
            out_features,
            tuple(in_spatial),
            tuple(window),
            tuple(out_spatial),
            site["window_strides"],
            site["padding"],
            site["lhs_dilation"],
            site["rhs_dilation"],
            site["feature_group_count"],
            site["batch_group_count"],
            specs,
            out.dtype,
        )

    def lhs_last(self, lhs: jax.Array) -> jax.Array:
        """`lhs` as [batch, *spatial, features]."""
        batch, features, *spatial = self.specs.lhs_spec
        return lax.transpose(lhs, (batch, *spatial, features))

    def rhs_last(self, rhs: jax.Array) -> jax.Array:
        """`rhs` as [*window, in_features, out_features]."""
        out_features, in_features, *window = self.specs.rhs_spec
        return lax.transpose(rhs, (*window, in_features, out_features))

    def from_last(self, out: jax.Array) -> jax.Array:
        """[batch, *spatial, features] in the output's own layout and dtype."""
        batch, features, *spatial = self.specs.out_spec
        places = (batch, *spatial, features)
        out = lax.transpose(out, tuple(places.index(axis) for axis in range(len(places))))
        return out.astype(self.out_dtype)

    def padded(self, lhs: jax.Array) -> jax.Array:
        """`lhs` (channels last) with its padding and dilation written out."""
        config = [
            (low, high, dilation - 1)
            for (low, high), dilation in zip(self.padding, self.lhs_dilation, strict=True)
        ]
        if all(entry == (0, 0, 0) for entry in config):
            return lhs
        return lax.pad(lhs, jnp.zeros((), lhs.dtype), [(0, 0, 0), *config, (0, 0, 0)])

    def element_of_windows(self, lhs: jax.Array, tap: tuple[int, ...]) -> jax.Array:
        """Of padded `lhs` [batch, *spatial, features], the element at `tap` of every window."""
        start = [i * d for i, d in zip(tap, self.rhs_dilation, strict=True)]
        return _strided(lhs, start, self.out_spatial, self.strides)

    def window_at(self, lhs: jax.Array, position: tuple[int, ...]) -> jax.Array:
        """Of padded `lhs` [batch, *spatial, features], the window of the output at `position`."""
        start = [i * stride for i, stride in zip(position, self.strides, strict=True)]
        return _strided(lhs, start, self.window, self.rhs_dilation)


def _strided(
    lhs: jax.Array, start: list[int], sizes: tuple[int, ...], strides: tuple[int, ...]
) -> jax.Array:
    stop = [i + (n - 1) * s + 1 for i, n, s in zip(start, sizes, strides, strict=True)]
    batch, *_, features = lhs.shape
    return lax.slice(lhs, (0, *start, 0), (batch, *stop, features), (1, *strides, 1))


def accumulation_dtype(*dtypes: Any) -> Any:
    """Sums of 16-bit products are kept in float32, as the compiler's own convolutions do."""
    widest = jnp.result_type(*dtypes)
    return jnp.float32 if jnp.finfo(widest).bits < 32 else widest
