"""Matrix products over few terms with a large result, as sums of outer products.

The weight gradient of a wide layer contracts the batch alone: 16 examples give a matrix of millions
of elements, each a sum of 16 products. As a matrix product it is written to memory and read by the
optimizer. A sum of outer products is elementwise arithmetic, which XLA fuses into the optimizer's
own pass over the parameters: the gradient is never in memory (`benchmarks/lowerings.py`).
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu.ir.lowered import Chooser, Site

# With more terms, the arithmetic takes longer than the passes over memory that it saves.
_MOST_TERMS = 32
# A result that fits into the caches is not worth it.
_FEWEST_ELEMENTS = 1 << 22


def choose(site: Site) -> Callable[..., jax.Array] | None:
    """Code for a product of few terms with a large result, or with such a derivative."""
    (contracted, _), (batch, _) = site["dimension_numbers"]
    lhs, rhs = site.in_avals
    if batch or not all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in (lhs, rhs)):
        return None
    if not all(isinstance(size, int) and size > 0 for size in (*lhs.shape, *rhs.shape)):
        return None
    terms = math.prod(lhs.shape[d] for d in contracted)
    rows, columns = lhs.size // terms, rhs.size // terms
    if _pays(terms, rows, columns):
        return partial(_sum_of_outer_products, site)
    # The product itself is good as it is: it is claimed so that its derivatives come here, too.
    if _pays(rows, terms, columns) or _pays(columns, terms, rows):
        return partial(site.primitive.bind, **dict(site.params))
    return None


def _pays(terms: int, rows: int, columns: int) -> bool:
    large = rows * columns >= _FEWEST_ELEMENTS
    # Beside the result, what is multiplied must be small.
    return large and terms <= _MOST_TERMS and 4 * terms < min(rows, columns)


def _sum_of_outer_products(site: Site, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    (left, right), _ = site["dimension_numbers"]
    (out,) = site.out_avals
    lhs_free = [d for d in range(lhs.ndim) if d not in left]
    rhs_free = [d for d in range(rhs.ndim) if d not in right]
    # 16-bit terms are added up in 32 bits, as in a matrix product.
    dtype = jnp.promote_types(out.dtype, jnp.float32)
    rows = lax.transpose(lhs, (*left, *lhs_free)).reshape(-1, *(lhs.shape[d] for d in lhs_free))
    columns = lax.transpose(rhs, (*right, *rhs_free)).reshape(-1, *(rhs.shape[d] for d in rhs_free))
    rows_at, columns_at = tuple(range(len(lhs_free))), tuple(range(len(lhs_free), out.ndim))
    total = None
    for row, column in zip(rows.astype(dtype), columns.astype(dtype), strict=True):
        product = lax.broadcast_in_dim(row, out.shape, rows_at) * lax.broadcast_in_dim(
            column, out.shape, columns_at
        )
        total = product if total is None else total + product
    assert total is not None
    return total.astype(out.dtype)


CHOOSER = Chooser("outer_products", ("dot_general",), choose)
