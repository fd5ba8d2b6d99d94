"""Gradients of clipped values ask the result, not the input, where it was clipped.

JAX keeps `x > 0` for the gradient of y = max(x, 0), and so x, or what it is made of. y > 0 says the
same, not-a-numbers included, and y is what the next layer keeps anyway. Where the gradient needs
what x is made of in any case, as that of a batch norm does, asking y would be one more read.
"""

from dataclasses import replace
from typing import Any

from fastgpu.ir.compat import JaxprEqn, Literal, Var, sub_jaxprs
from fastgpu.ir.fusion import Storage, storage
from fastgpu.transforms.remat.joint import Joint, flat_program

_CALLS = ("custom_jvp_call", "jit", "pjit")
# The comparisons of an input that its clipped result answers as well, by the bound that they name.
_SIDES = {"gt": "max", "lt": "min"}


def masks_of_results(joint: Joint) -> Joint:
    """`joint` whose forward half compares clipped results instead of what was clipped.

    >>> import jax, jax.numpy as jnp
    >>> from fastgpu.transforms.remat.joint import trace_joint
    >>> fn = lambda x, w: ([jnp.sum(jax.nn.relu(x @ w) @ w)], [])
    >>> joint = masks_of_results(trace_joint(fn, [jnp.ones((2, 2))], [jnp.ones((2, 2))]))
    >>> relu, mask = joint.forward.eqns[1:3]
    >>> mask.primitive.name, mask.invars[0] is relu.outvars[0]
    ('gt', True)
    """
    view = storage(flat_program(joint).jaxpr)
    read = {
        stored
        for v in joint.residuals
        if isinstance(v, Var) and str(_aval(v).dtype) != "bool"
        for stored in _made_of(view, v)
    }
    # For each clipped input: the result, and the bound of each side.
    results: dict[Var, tuple[Var, dict[str, Any]]] = {}
    eqns = []
    for eqn in joint.forward.eqns:
        source, bounds = _clips(eqn)
        if isinstance(source, Var) and bounds:
            made_of = _made_of(view, source)
            if len(made_of) == 1 and made_of <= read:
                eqns.append(eqn)
                continue
            results.setdefault(source, (eqn.outvars[0], bounds))
        elif eqn.primitive.name in _SIDES and isinstance(eqn.invars[0], Var):
            found = results.get(eqn.invars[0])
            bound = _value(eqn.invars[1])
            if found and bound is not None and found[1].get(_SIDES[eqn.primitive.name]) == bound:
                eqn = eqn.replace(invars=[found[0], eqn.invars[1]])
        eqns.append(eqn)
    return replace(joint, forward=joint.forward.replace(eqns=eqns))


def _made_of(view: Storage, var: Var) -> frozenset[Var]:
    """The stored values of `var`'s size or more that a kernel reads for `var`."""
    root = view.root[var]
    behind = view.sources.get(root, frozenset((root,)))
    return frozenset(v for v in behind if _aval(v).size >= _aval(var).size)


def _clips(eqn: JaxprEqn) -> tuple[Any, dict[str, Any]]:
    """What `eqn` clips, and to which bounds: {"max": low, "min": high}; nothing for any other."""
    name = eqn.primitive.name
    if name in _SIDES.values():
        bound = _value(eqn.invars[1])
        return eqn.invars[0], {} if bound is None else {name: bound}
    if name not in _CALLS or len(eqn.outvars) != 1 or len(eqn.invars) != 1:
        return None, {}
    (inner,) = sub_jaxprs(eqn)
    source: Any = inner.invars[0]
    bounds: dict[str, Any] = {}
    for step in inner.eqns:
        clipped, found = _clips(step)
        if clipped is not source or not found or bounds.keys() & found.keys():
            return None, {}
        source, bounds = step.outvars[0], bounds | found
    return (eqn.invars[0], bounds) if inner.outvars[0] is source else (None, {})


def _aval(var: Var) -> Any:
    return var.aval


def _value(atom: Any) -> Any:
    return atom.val.item() if isinstance(atom, Literal) and hasattr(atom.val, "item") else None
