"""Where a residual can wait for the backward half besides the device's memory as it is.

In the host's memory, or packed into fewer bits. Both are put away during the forward half and
brought back for each segment of the backward half that reads them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from fastgpu.errors import ConfigurationError
from fastgpu.hardware import Device
from fastgpu.ir.analysis import aval_bytes
from fastgpu.ir.compat import Jaxpr, with_borders
from fastgpu.transforms.inline import inline_calls

# Below this a copy to the host is all latency.
_LEAST_HOST_BYTES = 1 << 20
_BLOCK = 128
_LEVELS = 255


@dataclass(frozen=True)
class Shelf:
    """`put(x)` gives the arrays that wait, `restore(*arrays)` gives x back, exactly if `exact`.

    `device_fraction` is the part of x's bytes that stays on the device, `host` whether the rest
    travels over the link to the host's memory.
    """

    name: str
    exact: bool
    host: bool
    put: Callable[[jax.Array], tuple[jax.Array, ...]] = field(repr=False)
    restore: Callable[..., jax.Array] = field(repr=False)
    takes: Callable[[Any], bool] = field(repr=False)

    def programs(self, aval: Any) -> tuple[Jaxpr, Jaxpr]:
        """`put` and `restore` for values of this shape and dtype, without calls."""
        return _programs(self, jax.ShapeDtypeStruct(aval.shape, aval.dtype))

    def device_bytes(self, aval: Any) -> int:
        """Bytes on the device while x waits."""
        if self.host:
            return 0
        return sum(aval_bytes(packed.aval) for packed in self.programs(aval)[0].outvars)


@cache
def _programs(shelf: Shelf, like: jax.ShapeDtypeStruct) -> tuple[Jaxpr, Jaxpr]:
    def there_and_back(x: jax.Array) -> tuple[Any, ...]:
        packed = shelf.put(x)
        return *packed, shelf.restore(like, *packed)

    # Traced as one, because what waits in the host's memory has a type of its own.
    whole = inline_calls(jax.make_jaxpr(there_and_back)(like)).jaxpr
    *packed, back = whole.outvars
    first = 1 + max(i for i, eqn in enumerate(whole.eqns) for v in eqn.outvars if v in packed)
    put = with_borders(whole, outvars=packed, eqns=whole.eqns[:first])
    restore = with_borders(whole, invars=packed, outvars=[back], eqns=whole.eqns[first:])
    return put, restore


def _to_host(x: jax.Array) -> tuple[jax.Array, ...]:
    return (jax.device_put(x, jax.memory.Space.Host),)


def _from_host(_: Any, waiting: jax.Array) -> jax.Array:
    return jax.device_put(waiting, jax.memory.Space.Device)


def _to_bfloat16(x: jax.Array) -> tuple[jax.Array, ...]:
    return (x.astype(jnp.bfloat16),)


def _from_bfloat16(like: Any, packed: jax.Array) -> jax.Array:
    return packed.astype(like.dtype)


def _blocks(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape with its last axis in blocks that share one scale."""
    *outer, last = shape
    block = math.gcd(last, _BLOCK)
    return (*outer, last // block, block)


def _to_int8(x: jax.Array) -> tuple[jax.Array, ...]:
    blocks = x.astype(jnp.float32).reshape(_blocks(x.shape))
    low, high = jnp.min(blocks, -1, keepdims=True), jnp.max(blocks, -1, keepdims=True)
    # A block of equal values has no range; any scale brings `low` back.
    scale = jnp.where(high > low, (high - low) / _LEVELS, 1.0)
    levels = jnp.clip(jnp.round((blocks - low) / scale), 0, _LEVELS).astype(jnp.uint8)
    return levels, low, scale


def _from_int8(like: Any, levels: jax.Array, low: jax.Array, scale: jax.Array) -> jax.Array:
    return (levels.astype(jnp.float32) * scale + low).astype(like.dtype).reshape(like.shape)


def _floating(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.floating)


HOST = Shelf(
    "offload", True, True, _to_host, _from_host, lambda aval: aval_bytes(aval) >= _LEAST_HOST_BYTES
)
BFLOAT16 = Shelf(
    "bfloat16",
    False,
    False,
    _to_bfloat16,
    _from_bfloat16,
    lambda aval: _floating(aval) and aval.dtype.itemsize > 2,
)
# Affine, 255 steps between the least and the largest of each block of a value's last axis.
INT8 = Shelf(
    "int8",
    False,
    False,
    _to_int8,
    _from_int8,
    lambda aval: _floating(aval) and aval.ndim > 0 and _blocks(aval.shape)[-1] >= 16,
)
_PACKED = {shelf.name: shelf for shelf in (BFLOAT16, INT8)}


def check_compress(compress: str | None) -> None:
    """Raise `ConfigurationError` for a `compress` that is not `None`, "bfloat16" or "int8"."""
    if compress is not None and compress not in _PACKED:
        raise ConfigurationError(
            f"residuals cannot be compressed as {compress!r}",
            expected=f"None, {' or '.join(map(repr, _PACKED))}",
            got=repr(compress),
        )


def shelves_for(device: Device, compress: str | None) -> tuple[Shelf, ...]:
    """The shelves that a plan for `device` may use; raises as `check_compress` does.

    >>> from fastgpu.hardware import device
    >>> [shelf.name for shelf in shelves_for(device("h100"), "int8")]
    ['offload', 'int8']
    """
    check_compress(compress)
    host = (HOST,) if device.host_link else ()
    return (*host, *((_PACKED[compress],) if compress else ()))
