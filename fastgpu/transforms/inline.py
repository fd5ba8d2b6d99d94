"""Inline calls, so that later passes see one flat program.

A call that fixes shardings, layouts, donation or compiler options stays: inlining it would lose
what it says. The call's name becomes a name scope.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from fastgpu import ir
from fastgpu.ir.compat import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, is_plain_call
from fastgpu.ir.rewrite import interpret


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
    return ir.rewrite(closed, _RULES)


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


def _rule(eqn: ir.JaxprEqn) -> Callable[..., Any] | None:
    if not is_plain_call(eqn):
        return None
    called = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    jaxpr, consts = (
        (called.jaxpr, called.consts) if isinstance(called, ClosedJaxpr) else (called, ())
    )

    def inlined(*args: Any) -> list[Any]:
        with jax.named_scope(eqn.params.get("name", eqn.primitive.name)):
            return interpret(jaxpr, consts, args, _RULES)

    return inlined


_RULES: ir.Rules = dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), _rule)
