"""Compute at trace time what does not depend on the inputs.

Only small results are kept (`MOST_BYTES` each), and nothing is expanded: a compiler generates a
broadcast or an iota faster than it loads one. Everything that folds is evaluated in one compiled
program.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.ir.analysis import aval_bytes
from fastgpu.ir.compat import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Tracer,
    Var,
    eval_jaxpr,
    map_sub_jaxprs,
    sub_jaxprs,
)

MOST_BYTES = 64 * 1024

_NOT_FOLDED = frozenset(
    (
        *("broadcast_in_dim", "iota", "optimization_barrier", "rng_uniform", "copy", "copy_p"),
        *("pure_callback", "io_callback", "debug_callback", "sharding_constraint", "device_put"),
    )
)


def fold_constants(closed: ClosedJaxpr) -> ClosedJaxpr:
    """Replace equations that depend on constants alone by their values.

    >>> import jax, jax.numpy as jnp
    >>> closed = jax.make_jaxpr(lambda x: x * jnp.sqrt(jnp.float32(4)))(jnp.ones(3))
    >>> print(fold_constants(closed))
    { lambda ; a:f32[3]. let b:f32[3] = mul a 2.0:f32[] in (b,) }
    """
    folded = _foldable(closed)
    values = _evaluate(closed, folded)
    skipped = {id(eqn) for eqn in folded}
    literals = {v: Literal(x, v.aval) for v, x in values.items() if isinstance(x, np.generic)}
    arrays = {v: x for v, x in values.items() if v not in literals}

    def resolve(atoms: Sequence[Any]) -> list[Any]:
        return [a if isinstance(a, Literal) else literals.get(a, a) for a in atoms]

    eqns = [
        eqn.replace(invars=resolve(eqn.invars), params=map_sub_jaxprs(eqn, fold_constants))
        for eqn in closed.jaxpr.eqns
        if id(eqn) not in skipped
    ]
    jaxpr = closed.jaxpr.replace(
        constvars=[*closed.jaxpr.constvars, *arrays],
        eqns=eqns,
        outvars=resolve(closed.jaxpr.outvars),
    )
    return ClosedJaxpr(jaxpr, [*closed.consts, *arrays.values()])


def _foldable(closed: ClosedJaxpr) -> list[JaxprEqn]:
    """The equations, in order, whose inputs are all constants that fold or are at hand."""
    known = {
        v
        for v, const in zip(closed.jaxpr.constvars, closed.consts, strict=True)
        if not isinstance(const, Tracer) and _is_small_array(v)
    }
    found = []
    for eqn in closed.jaxpr.eqns:
        if (
            not eqn.effects
            and not sub_jaxprs(eqn)
            and eqn.primitive.name not in _NOT_FOLDED
            and all(isinstance(a, Literal) or a in known for a in eqn.invars)
            and all(_is_small_array(v) for v in eqn.outvars)
        ):
            known.update(eqn.outvars)
            found.append(eqn)
    return found


def _is_small_array(v: Var) -> bool:
    dtype = getattr(v.aval, "dtype", None)
    if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):
        return False
    return aval_bytes(v.aval) <= MOST_BYTES


def _evaluate(closed: ClosedJaxpr, folded: list[JaxprEqn]) -> dict[Var, Any]:
    """The values that the rest of the program reads, scalars as numpy scalars (jaxpr literals)."""
    if not folded:
        return {}
    made = {v for eqn in folded for v in eqn.outvars}
    skipped = {id(eqn) for eqn in folded}
    readers = [eqn.invars for eqn in closed.jaxpr.eqns if id(eqn) not in skipped]
    read = {a for atoms in (*readers, closed.jaxpr.outvars) for a in atoms if isinstance(a, Var)}
    wanted = [v for eqn in folded for v in eqn.outvars if v in made & read]
    used = {a for eqn in folded for a in eqn.invars if isinstance(a, Var)} - made
    inputs = [v for v in closed.jaxpr.constvars if v in used]
    at_hand = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    program = Jaxpr((), inputs, wanted, folded, debug_info=_debug_info(closed, inputs, wanted))
    with jax.ensure_compile_time_eval():
        run = jax.jit(lambda *args: eval_jaxpr(program, (), *args))
        outputs = run(*(at_hand[v] for v in inputs))
    return {
        v: np.asarray(out)[()] if out.ndim == 0 else out
        for v, out in zip(wanted, outputs, strict=True)
    }


def _debug_info(closed: ClosedJaxpr, inputs: list[Var], outputs: list[Var]) -> Any:
    return closed.jaxpr.debug_info._replace(
        arg_names=("",) * len(inputs), result_paths=("",) * len(outputs)
    )
