"""A float32 value on its way through a program in mixed precision, and which equations cast it."""

from typing import Any

import numpy as np
from jax import lax

from fastgpu.ir.compat import JaxprEqn, ShapedArray
from fastgpu.transforms.precision.kinds import PRODUCTS, Kind

# What products ask for whose author asked for nothing.
_NO_WISH = (None, lax.Precision.DEFAULT, (lax.Precision.DEFAULT, lax.Precision.DEFAULT))


class Value:
    """An array on its way, and what it is made of: `None` if it is not the pass's business."""

    def __init__(self, array: Any, kind: Kind | None) -> None:
        self.array, self.kind = array, kind
        # In the other dtype, once for all that read it: their cotangents add up before they are
        # rounded, or after.
        self.other: Any = None

    def wide(self) -> Any:
        """The value in its own dtype."""
        if self.kind is not Kind.LOW:
            return self.array
        if self.other is None:
            self.other = lax.convert_element_type(self.array, np.float32)
        return self.other

    def low(self, dtype: np.dtype) -> Any:
        """The value in the low dtype."""
        if self.kind is Kind.LOW:
            return self.array
        if isinstance(self.array, np.generic):
            return self.array.astype(dtype)
        if self.kind in (Kind.DATA, Kind.SPREAD, Kind.CONSTANT):
            # Once for each use: gradients of parameters are then added up in float32.
            return lax.convert_element_type(self.array, dtype)
        if self.other is None:
            self.other = lax.convert_element_type(self.array, dtype)
        return self.other

    def is_exact_in(self, dtype: np.dtype) -> bool:
        """Whether this is no literal, or one that the low dtype has."""
        if not isinstance(self.array, np.generic):
            return True
        return self.array == self.array.astype(dtype).astype(np.float32) or np.isnan(self.array)


def is_wide(aval: Any) -> bool:
    """Whether this is the type of a float32 array."""
    return isinstance(aval, ShapedArray) and aval.dtype == np.float32


def is_plain_product(eqn: JaxprEqn) -> bool:
    """A product of float32 arrays whose author asked for no `precision`."""
    if eqn.primitive.name not in PRODUCTS or eqn.params["precision"] not in _NO_WISH:
        return False
    if eqn.params["preferred_element_type"] not in (None, np.float32):
        return False
    return all(is_wide(v.aval) for v in (*eqn.invars[:2], *eqn.outvars))
