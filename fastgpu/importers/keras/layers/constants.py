"""Constants in the calls of a graph, in a form that can be hashed."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Constant:
    """An array that a layer or operation is called with; one leaf of a nested structure."""

    data: bytes
    dtype: str
    shape: tuple[int, ...]

    def value(self) -> jax.Array:
        """The array itself."""
        return jnp.asarray(np.frombuffer(self.data, jnp.dtype(self.dtype)).reshape(self.shape))


@dataclass(frozen=True)
class Slice:
    """A Python slice, or with the step "..." an ellipsis."""

    start: Any
    stop: Any
    step: Any

    def value(self) -> Any:
        """What stands between the brackets."""
        return Ellipsis if self.step == "..." else slice(self.start, self.stop, self.step)


def constant(value: Any, dtype: str | None) -> Constant:
    """Freeze nested lists of numbers; floats without a dtype are float32, integers int32.

    >>> constant([[1.0, 2.0]], None).value()
    Array([[1., 2.]], dtype=float32)
    """
    array = np.asarray(value)
    if dtype is None:
        dtype = {"f": "float32", "i": "int32"}.get(array.dtype.kind, str(array.dtype))
    array = array.astype(jnp.dtype(dtype))
    return Constant(array.tobytes(), str(array.dtype), array.shape)
