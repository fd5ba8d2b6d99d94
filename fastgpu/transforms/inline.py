"""Inline calls, so that later passes see one flat program.

A call that fixes shardings, layouts, donation or compiler options stays: inlining it would lose
what it says. The call's name becomes a name scope.
"""

from collections.abc import Sequence
from typing import Any

from fastgpu.ir.analysis import walk
from fastgpu.ir.compat import (
    ClosedJaxpr,
    DropVar,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    is_plain_call,
    map_sub_jaxprs,
    within_scope,
)


def inline_calls(closed: ClosedJaxpr) -> ClosedJaxpr:
    """Replace every plain call by the equations that it runs, nested calls included.

    >>> import jax
    >>> f = jax.jit(lambda x: jax.jit(lambda y: y * 2)(x) + 1)
    >>> print(inline_calls(jax.make_jaxpr(f)(1.0)))
    { lambda ; a:f32[]. let
        b:f32[] = mul a 2.0:f32[]
        c:f32[] = add b 1.0:f32[]
      in (c,) }
    """
    if not any(is_plain_call(eqn) for eqn in walk(closed)):
        return closed
    flat = _Flat(dict(zip(closed.jaxpr.constvars, closed.consts, strict=True)))
    flat.add(closed.jaxpr)
    jaxpr = closed.jaxpr.replace(
        constvars=list(flat.consts),
        eqns=flat.eqns,
        outvars=[flat.read(v) for v in closed.jaxpr.outvars],
    )
    return ClosedJaxpr(jaxpr, list(flat.consts.values()))


def instantiated(
    program: Jaxpr, inputs: Sequence[Any], results: Sequence[Var] = ()
) -> tuple[list[JaxprEqn], list[Any]]:
    """The equations of `program` for these inputs, under new names, and what its outputs are.

    Outputs are called `results`, if given; each is then the result of an equation.
    """
    names: dict[Any, Any] = dict(zip(program.invars, inputs, strict=True))
    given = dict(zip(program.outvars, results, strict=True)) if results else {}

    def read(atom: Any) -> Any:
        return atom if isinstance(atom, Literal) else names[atom]

    eqns = []
    for eqn in program.eqns:
        invars = [read(v) for v in eqn.invars]
        names.update((v, given.get(v) or Var(v.aval)) for v in eqn.outvars)
        eqns.append(eqn.replace(invars=invars, outvars=[names[v] for v in eqn.outvars]))
    return eqns, [read(v) for v in program.outvars]


class _Flat:
    """Equations of a program and of those that it calls, in order."""

    def __init__(self, consts: dict[Var, Any]) -> None:
        self.consts = consts
        self.eqns: list[JaxprEqn] = []
        self._names: dict[Var, Any] = {}
        self._const_of = {id(value): v for v, value in consts.items()}

    def read(self, atom: Any) -> Any:
        """What an atom of a program that was added is called now."""
        return atom if isinstance(atom, Literal) else self._names.get(atom, atom)

    def add(self, program: Jaxpr, caller: JaxprEqn | None = None) -> None:
        """Add the equations of `program`; those of a call get new names, and the call's scope."""
        for eqn in program.eqns:
            eqn = eqn.replace(invars=[self.read(v) for v in eqn.invars])
            if caller is not None:
                eqn = within_scope(eqn, caller)
            if is_plain_call(eqn):
                self._call(eqn)
                continue
            if caller is not None:
                fresh = [v if isinstance(v, DropVar) else Var(v.aval) for v in eqn.outvars]
                self._names.update(zip(eqn.outvars, fresh, strict=True))
                eqn = eqn.replace(outvars=fresh)
            self.eqns.append(eqn.replace(params=map_sub_jaxprs(eqn, inline_calls)))

    def _call(self, eqn: JaxprEqn) -> None:
        called = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
        program = called
        if isinstance(called, ClosedJaxpr):
            program = called.jaxpr
            for v, value in zip(program.constvars, called.consts, strict=True):
                self._names[v] = self._const(v, value)
        self._names.update(zip(program.invars, eqn.invars, strict=True))
        self.add(program, eqn)
        results = [self.read(v) for v in program.outvars]
        self._names.update(zip(eqn.outvars, results, strict=True))

    def _const(self, v: Var, value: Any) -> Var:
        if id(value) not in self._const_of:
            self._const_of[id(value)] = fresh = Var(v.aval)
            self.consts[fresh] = value
        return self._const_of[id(value)]
