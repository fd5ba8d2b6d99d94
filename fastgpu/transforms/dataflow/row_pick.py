"""One element of each row, as the label's logit in a cross-entropy, by comparison.

The gradient of such a gather is a scatter into an array of zeros as large as what was gathered
from: for logits of 50,000 words three more passes over memory. The gradient of a masked sum is a
mask, which compilers fuse into whatever reads it. The sum has one term that is not zero: exact.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu.ir.compat import JaxprEqn


def rule(eqn: JaxprEqn) -> Callable[..., jax.Array] | None:
    """A masked sum for a gather of one floating element from each row; `None` for any other.

    >>> import jax, jax.numpy as jnp
    >>> take = lambda x, i: jnp.take_along_axis(x, i[:, None], axis=1)
    >>> x, i = jnp.ones((4, 9)), jnp.zeros(4, int)
    >>> eqns = jax.make_jaxpr(take)(x, i).jaxpr.eqns
    >>> from fastgpu.ir import walk
    >>> gathers = [e for e in walk(jax.make_jaxpr(take)(x, i)) if e.primitive.name == "gather"]
    >>> [rule(eqn) is not None for eqn in gathers]
    [True]
    """
    numbers = eqn.params["dimension_numbers"]
    aval, indices, out = (cast(Any, v.aval) for v in (*eqn.invars, *eqn.outvars))
    rows = tuple(d for d in range(aval.ndim) if d not in numbers.start_index_map)
    if not jnp.issubdtype(aval.dtype, jnp.floating) or len(numbers.start_index_map) != 1:
        return None
    if numbers.operand_batching_dims != rows or numbers.offset_dims:
        return None
    if numbers.collapsed_slice_dims != numbers.start_index_map:
        return None
    # One index for each row, in the order of the rows.
    if numbers.start_indices_batching_dims != tuple(range(len(rows))):
        return None
    if any(size != 1 for size in indices.shape[len(rows) :]):
        return None
    (axis,) = numbers.start_index_map
    mode, fill = eqn.params["mode"], eqn.params["fill_value"]

    def pick(operand: jax.Array, index: jax.Array) -> jax.Array:
        index = index.reshape([1 if d == axis else n for d, n in enumerate(aval.shape)])
        inside = (index >= 0) & (index < aval.shape[axis])
        if mode != lax.GatherScatterMode.FILL_OR_DROP:
            index = jnp.clip(index, 0, aval.shape[axis] - 1)
        places = lax.broadcasted_iota(index.dtype, aval.shape, axis)
        zero = jnp.zeros((), aval.dtype)
        picked = jnp.sum(jnp.where(places == index, operand, zero), axis=axis, keepdims=True)
        if mode == lax.GatherScatterMode.FILL_OR_DROP:
            missing = jnp.asarray(jnp.nan if fill is None else fill, aval.dtype)
            picked = jnp.where(inside, picked, missing)
        return picked.reshape(out.shape)

    return pick
