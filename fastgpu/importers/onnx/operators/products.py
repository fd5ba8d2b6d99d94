"""Products of matrices, and what else is linear algebra."""

import jax
import jax.numpy as jnp

from fastgpu.importers.onnx.operators.operator import operator


@operator("MatMul")
def matrix_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """numpy's matmul."""
    return jnp.matmul(a, b)


@operator("Gemm")
def gemm(
    a: jax.Array,
    b: jax.Array,
    c: jax.Array | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    broadcast: int = 0,
) -> jax.Array:
    """alpha A B + beta C, with either matrix transposed."""
    y = jnp.matmul(a.T if transA else a, b.T if transB else b)
    y = y if alpha == 1 else (y * alpha).astype(a.dtype)
    if c is None or beta == 0:
        return y
    return y + (c if beta == 1 else (c * beta).astype(c.dtype))


@operator("MatMulInteger")
def integer_matrix_product(
    a: jax.Array,
    b: jax.Array,
    a_zero_point: jax.Array | None = None,
    b_zero_point: jax.Array | None = None,
) -> jax.Array:
    """A product of 8-bit matrices, added up in 32 bits."""
    a, b = a.astype(jnp.int32), b.astype(jnp.int32)
    if a_zero_point is not None:
        # one number, or one for each row
        zero = a_zero_point.astype(jnp.int32)
        a = a - (zero[..., None] if zero.ndim == 1 and zero.size > 1 else zero)
    if b_zero_point is not None:
        b = b - b_zero_point.astype(jnp.int32)
    return jnp.matmul(a, b)


@operator("Det")
def determinant(x: jax.Array) -> jax.Array:
    """The determinants of square matrices."""
    return jnp.linalg.det(x)
