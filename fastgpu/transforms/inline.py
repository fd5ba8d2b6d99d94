"""Inline calls, so that later passes see one flat program.

A call that fixes shardings, layouts, donation or compiler options stays: inlining it would lose
what it says. The call's name becomes a name scope.
"""

from collections.abc import Callable
from typing import Any

import jax

from fastgpu import ir
from fastgpu.ir.compat import ClosedJaxpr, is_plain_call
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
