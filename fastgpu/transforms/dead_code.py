"""Drop equations whose results nobody reads."""

from fastgpu.ir.compat import ClosedJaxpr, dce


def remove_dead_code(closed: ClosedJaxpr) -> ClosedJaxpr:
    """Keep what the outputs and the effects need; inputs stay, so callers need not change.

    >>> import jax, jax.numpy as jnp
    >>> closed = jax.make_jaxpr(lambda x: (jnp.sin(x), x + 1)[1])(1.0)
    >>> print(remove_dead_code(closed))
    { lambda ; a:f32[]. let b:f32[] = add a 1.0:f32[] in (b,) }
    """
    return dce(closed)
