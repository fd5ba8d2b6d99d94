"""Gradients of a softmax ask its result, not the exponentials that it was divided from.

JAX differentiates y = e / sum(e) as it is written and keeps e, that is the scores that e is quickly
made of, beside the y that the next product reads. But e = y sum(e), and the sums are small: the
scores need not be kept at all. The gradient changes by one rounding of an element.
"""

from dataclasses import replace
from typing import Any

from jax import lax

from fastgpu.ir.compat import JaxprEqn, Literal, Var, with_borders
from fastgpu.ir.fusion import storage
from fastgpu.transforms.remat.joint import Changed, Joint, flat_program

_SAME = ("broadcast_in_dim", "reshape", "expand_dims", "transpose", "stop_gradient", "max")


def softmaxes_of_results(joint: Joint) -> Changed | None:
    """`joint` whose backward half reads y sum(e) where it read a softmax's e; `None` if nowhere.

    Only where y is in memory in any case, and where the largest score was taken off first, so that
    the sum is at least 1 and nothing overflows.

    >>> import jax, jax.numpy as jnp
    >>> from fastgpu.transforms.remat.joint import trace_joint
    >>> def attend(s, v):
    ...     e = jnp.exp(s - jax.lax.stop_gradient(s.max(-1, keepdims=True)))
    ...     return [jnp.sum((e / e.sum(-1, keepdims=True)) @ v)], []
    >>> joint = trace_joint(attend, [jnp.ones((4, 4)), jnp.ones((4, 2))], [])
    >>> made = {v: e.primitive.name for e in joint.forward.eqns for v in e.outvars}
    >>> "exp" in [made.get(v) for v in joint.residuals]
    True
    >>> found = softmaxes_of_results(joint)
    >>> found.how, "exp" in [made.get(v) for v in found.joint.residuals]
    ('gradient of 1 softmax from its result', False)
    """
    residuals = {v for v in joint.residuals if isinstance(v, Var)}
    producer = {v: eqn for eqn in joint.forward.eqns for v in eqn.outvars}
    view = storage(flat_program(joint).jaxpr)
    names: dict[Any, Var] = {}
    eqns: list[JaxprEqn] = []
    for eqn in joint.forward.eqns:
        eqns.append(eqn)
        if eqn.primitive.name != "div":
            continue
        above, below = eqn.invars
        exponential = producer.get(above) if isinstance(above, Var) else None
        if exponential is None or exponential.primitive.name != "exp" or above not in residuals:
            continue
        shifted = _behind(producer, exponential.invars[0], "sub")
        largest = shifted and _behind(producer, shifted.invars[1], "reduce_max")
        total = _behind(producer, below, "reduce_sum")
        if largest and total and total.invars[0] is above and view.is_stored(eqn.outvars[0]):
            names[above] = Var(above.aval)
            eqns.append(
                eqn.replace(
                    primitive=lax.mul_p,
                    params={},
                    invars=[eqn.outvars[0], below],
                    outvars=[names[above]],
                )
            )
    if not names:
        return None
    outvars = joint.forward.outvars
    residual = [v if isinstance(v, Literal) else names.get(v, v) for v in joint.residuals]
    forward = with_borders(joint.forward, eqns=eqns, outvars=[*outvars[: joint.results], *residual])
    many = (
        f"{len(names)} softmaxes from their results"
        if len(names) > 1
        else "1 softmax from its result"
    )
    return Changed(replace(joint, forward=forward), f"gradient of {many}")


def _behind(producer: dict[Any, JaxprEqn], atom: Any, name: str) -> JaxprEqn | None:
    """The equation called `name` that makes `atom`, or what `atom` is another shape of."""
    while not isinstance(atom, Literal) and atom in producer:
        eqn = producer[atom]
        if eqn.primitive.name == name:
            return eqn
        if eqn.primitive.name not in _SAME:
            return None
        atom = eqn.invars[-1]
    return None
