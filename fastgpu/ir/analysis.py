"""What a jaxpr reads, keeps alive, and how many bytes that is."""

import math
from collections import Counter
from collections.abc import Iterator

from fastgpu.ir.compat import (
    AbstractValue,
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Var,
    on_host,
    sub_jaxprs,
)


def walk(jaxpr: ClosedJaxpr | Jaxpr) -> Iterator[JaxprEqn]:
    """Every equation in order, each followed by those of the programs it runs.

    >>> import jax
    >>> closed = jax.make_jaxpr(lambda x: jax.lax.cond(x > 0, jax.numpy.sin, jax.numpy.cos, x))(1.0)
    >>> [eqn.primitive.name for eqn in walk(closed)]
    ['gt', 'convert_element_type', 'cond', 'cos', 'sin']
    """
    for eqn in (jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr).eqns:
        yield eqn
        for sub in sub_jaxprs(eqn):
            yield from walk(sub)


def aval_bytes(aval: AbstractValue) -> int:
    """Bytes of one value of this type; 0 for tokens. A random key counts as its two words.

    >>> import jax, jax.numpy as jnp
    >>> aval_bytes(jax.eval_shape(lambda: jnp.zeros((3, 5), jnp.bfloat16)))
    30
    """
    shape, dtype = getattr(aval, "shape", None), getattr(aval, "dtype", None)
    if shape is None or dtype is None:
        return 0
    return math.prod(shape) * dtype.itemsize


def device_bytes(aval: AbstractValue) -> int:
    """`aval_bytes`, and 0 for a value in the host's memory."""
    return 0 if on_host(aval) else aval_bytes(aval)


def uses(jaxpr: Jaxpr) -> Counter[Var]:
    """How many equations (and outputs of the jaxpr) read each variable.

    >>> import jax
    >>> jaxpr = jax.make_jaxpr(lambda x: x * x + x)(1.0).jaxpr
    >>> [uses(jaxpr)[v] for v in jaxpr.invars]
    [3]
    """
    read = [v for eqn in jaxpr.eqns for v in eqn.invars] + list(jaxpr.outvars)
    return Counter(v for v in read if isinstance(v, Var))


def last_use(jaxpr: Jaxpr) -> dict[Var, int]:
    """The index of the last equation that reads each variable; `len(eqns)` for the outputs.

    >>> import jax
    >>> jaxpr = jax.make_jaxpr(lambda x: (x * x, x + 1))(1.0).jaxpr
    >>> [last_use(jaxpr)[v] for v in (*jaxpr.invars, *jaxpr.outvars)]
    [1, 2, 2]
    """
    last = {
        v: index for index, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if isinstance(v, Var)
    }
    last.update((v, len(jaxpr.eqns)) for v in jaxpr.outvars if isinstance(v, Var))
    return last
