"""When two equations do the same: keys that are equal then, and only then.

Programs within an equation are compared by their equations. A function with a derivative of its
own is another object at each call: it is the same if its program and that of its derivative are.
"""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.ir.compat import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, bind, sub_jaxprs
from fastgpu.transforms.inline import inline_calls

_CUSTOM_DERIVATIVES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


def operation(eqn: JaxprEqn) -> Hashable:
    """What `eqn` does, to which types: all but its variables, values of literals, and derivatives.

    An equation with effects is equal to itself alone.

    >>> a, b = jax.make_jaxpr(lambda x: (x * 2.0) * 3.0)(1.0).jaxpr.eqns
    >>> operation(a) == operation(b)
    True
    """
    if eqn.effects:
        return _Only(eqn)
    inputs = tuple((isinstance(atom, Literal), atom.aval) for atom in eqn.invars)
    outputs = tuple(v.aval for v in eqn.outvars)
    if eqn.primitive.name in _CUSTOM_DERIVATIVES:
        settings = tuple(map(_plain, sub_jaxprs(eqn)))
    else:
        settings = _settings(eqn, ())
    return eqn.primitive, settings, inputs, outputs, eqn.ctx


def derivative(eqn: JaxprEqn) -> Hashable:
    """What makes derivatives of calls of the same function equal; `None` if JAX derives `eqn`.

    >>> a, b = jax.make_jaxpr(lambda x: jax.nn.relu6(jax.nn.relu6(x)))(1.0).jaxpr.eqns
    >>> derivative(a) == derivative(b)
    True
    """
    if eqn.primitive.name not in _CUSTOM_DERIVATIVES:
        return None
    return _with_own_derivative(eqn, ())


def literal_key(literal: Literal) -> Hashable:
    """Equal for literals of the same type and, to the bit, the same value."""
    value = np.asarray(literal.val)
    return str(value.dtype), value.shape, value.tobytes(), literal.aval


class _Only:
    """Equal to itself alone; keeps what it stands for alive, so that no other object can pass."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Only) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


# `within`: the functions whose derivatives are being looked at, outermost first.
_Within = tuple[Hashable, ...]


def _settings(eqn: JaxprEqn, within: _Within) -> Hashable:
    if eqn.primitive.name in _CUSTOM_DERIVATIVES:
        return _with_own_derivative(eqn, within)
    return tuple((name, _plain(value, within)) for name, value in sorted(eqn.params.items()))


def _with_own_derivative(eqn: JaxprEqn, within: _Within) -> Hashable:
    """The programs of a function and of its derivative, which every call has as an own object."""
    avals: list[Any] = [v.aval for v in eqn.invars]
    moving = all(jnp.issubdtype(aval.dtype, jnp.inexact) for aval in avals)
    if eqn.params["symbolic_zeros"] or not moving:
        return _Only(eqn)
    function = tuple(_program(sub, within) for sub in sub_jaxprs(eqn))
    if function in within:  # the derivative of exp is exp
        return function
    structs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]

    def run(*values: Any) -> list[Any]:
        return bind(eqn, values)

    def forward(values: Any, tangents: Any) -> Any:
        return jax.jvp(run, values, tangents)

    def reverse(values: Any, cotangents: Any) -> Any:
        return jax.vjp(run, *values)[1](cotangents)

    if eqn.primitive.name == "custom_jvp_call":
        traced = jax.make_jaxpr(forward)(tuple(structs), tuple(structs))
    else:
        traced = jax.make_jaxpr(reverse)(tuple(structs), jax.eval_shape(run, *structs))
    # Flat, so that calls of the function itself are known again.
    return function, _plain(inline_calls(traced), (*within, function))


def _plain(value: Any, within: _Within = ()) -> Hashable:
    """What makes two settings equal: for a program its equations, for other objects `==`."""
    if isinstance(value, ClosedJaxpr):
        return _program(value.jaxpr, within), tuple(map(_Only, value.consts))
    if isinstance(value, Jaxpr):
        return _program(value, within)
    if isinstance(value, tuple | list):
        return tuple(_plain(part, within) for part in value)
    try:
        hash(value)
    except TypeError:
        return _Only(value)
    return value


def _program(jaxpr: Jaxpr, within: _Within) -> Hashable:
    names: dict[Any, int] = {}

    def name(atom: Any) -> Hashable:
        if isinstance(atom, Literal):
            return literal_key(atom)
        return names.setdefault(atom, len(names)), atom.aval

    inputs = tuple(map(name, (*jaxpr.constvars, *jaxpr.invars)))
    eqns = tuple(
        (
            _Only(eqn) if eqn.effects else eqn.primitive,
            _settings(eqn, within),
            tuple(map(name, eqn.invars)),
            tuple(map(name, eqn.outvars)),
            eqn.ctx,
        )
        for eqn in jaxpr.eqns
    )
    return inputs, eqns, tuple(map(name, jaxpr.outvars))
