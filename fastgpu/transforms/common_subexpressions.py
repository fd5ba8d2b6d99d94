"""Compute equal values once.

Two equations are equal when primitive, settings and inputs are. What has an effect, calls back into
Python, or is there to keep two values apart (a barrier) is never merged. Drawing from the same
random key twice gives the same numbers, so that is merged as well; other keys are other inputs.
"""

from typing import Any

import numpy as np

from fastgpu.ir.compat import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, map_sub_jaxprs, sub_jaxprs

_KEPT_APART = frozenset(
    ("optimization_barrier", "rng_uniform", "pure_callback", "io_callback", "debug_callback")
)


def merge_common_subexpressions(closed: ClosedJaxpr) -> ClosedJaxpr:
    """Merge equal equations, in nested programs too (each on its own).

    >>> import jax, jax.numpy as jnp
    >>> closed = jax.make_jaxpr(lambda x: jnp.sin(x) * jnp.sin(x))(1.0)
    >>> print(merge_common_subexpressions(closed))
    { lambda ; a:f32[]. let b:f32[] = sin a; c:f32[] = mul b b in (c,) }
    """
    return ClosedJaxpr(_merge(closed.jaxpr), closed.consts)


def _merge(jaxpr: Jaxpr) -> Jaxpr:
    same: dict[Var, Var] = {}
    seen: dict[Any, list[Var]] = {}
    eqns = []
    for eqn in jaxpr.eqns:
        eqn = eqn.replace(invars=[_resolve(atom, same) for atom in eqn.invars])
        if sub_jaxprs(eqn):
            eqns.append(eqn.replace(params=map_sub_jaxprs(eqn, merge_common_subexpressions)))
            continue
        key = _key(eqn)
        if key is not None and key in seen:
            same.update(zip(eqn.outvars, seen[key], strict=True))
            continue
        if key is not None:
            seen[key] = eqn.outvars
        eqns.append(eqn)
    outvars = [_resolve(atom, same) for atom in jaxpr.outvars]
    return jaxpr.replace(eqns=eqns, outvars=outvars)


def _resolve(atom: Any, same: dict[Var, Var]) -> Any:
    return atom if isinstance(atom, Literal) else same.get(atom, atom)


def _key(eqn: JaxprEqn) -> Any | None:
    """What makes two equations equal; `None` when this one must stay."""
    if eqn.effects or eqn.primitive.name in _KEPT_APART:
        return None
    inputs = tuple(_literal_key(a) if isinstance(a, Literal) else a for a in eqn.invars)
    key = (eqn.primitive, inputs, tuple(sorted(eqn.params.items())), eqn.ctx)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _literal_key(literal: Literal) -> Any:
    value = np.asarray(literal.val)
    weak = getattr(literal.aval, "weak_type", False)
    return str(value.dtype), value.shape, value.tobytes(), weak
