"""Rewrite a jaxpr by rules that are ordinary JAX code.

A rule looks at one equation and returns a JAX function of the equation's input values that computes
the same outputs another way, or `None` to leave it. The rewriter evaluates the jaxpr under a new
trace and calls the rules' functions in place of the equations they match, so nobody builds
equations by hand. Source lines, name scopes, meshes and effects stay with the equations.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fastgpu.errors import VerificationError
from fastgpu.ir.compat import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    bind,
    map_sub_jaxprs,
    scope,
    shard_mapped,
    sub_jaxprs,
)

Rule = Callable[[JaxprEqn], Callable[..., Any] | None]
Rules = Mapping[str, Rule]


def rewrite(closed: ClosedJaxpr, rules: Rules) -> ClosedJaxpr:
    """Apply `rules`, a dict from primitive name to rule, to every equation, nested ones included.

    The result has the same inputs and outputs (shapes and dtypes). Raises `VerificationError` when
    a rule's function gives other shapes or dtypes than the equation it replaces.

    >>> import jax, jax.numpy as jnp
    >>> closed = jax.make_jaxpr(lambda x: jnp.sin(x) + 1)(1.0)
    >>> print(rewrite(closed, {"sin": lambda eqn: jnp.cos}))
    { lambda ; a:f32[]. let b:f32[] = cos a; c:f32[] = add b 1.0:f32[] in (c,) }
    """
    if not _matches(closed.jaxpr, rules):
        return closed

    def evaluate(*args: Any) -> list[Any]:
        return interpret(closed.jaxpr, closed.consts, args, rules)

    rewritten = jax.make_jaxpr(evaluate)(*closed.in_avals)
    jaxpr = rewritten.jaxpr.replace(debug_info=closed.jaxpr.debug_info)
    return ClosedJaxpr(jaxpr, rewritten.consts)


def interpret(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], rules: Rules) -> list[Any]:
    """Evaluate `jaxpr` on `args`, with `rules` in force; call it under a trace to rewrite."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        with scope(eqn):
            outputs = _apply(eqn, values, rules)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(eqn: JaxprEqn, values: list[Any], rules: Rules) -> list[Any]:
    rule = rules.get(eqn.primitive.name)
    replacement = rule(eqn) if rule is not None else None
    if replacement is not None:
        outputs = replacement(*values)
        outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
        _check_outputs(eqn, outputs, rule)
        return outputs
    if any(_matches(sub, rules) for sub in sub_jaxprs(eqn)):
        if eqn.primitive.name == "shard_map":
            return shard_mapped(
                eqn, lambda *args: interpret(eqn.params["jaxpr"], (), args, rules), values
            )
        return bind(eqn, values, map_sub_jaxprs(eqn, lambda sub: rewrite(sub, rules)))
    return bind(eqn, values)


def _matches(jaxpr: Jaxpr, rules: Rules) -> bool:
    """Whether any equation, nested ones included, has a rule: most sub-jaxprs have none."""
    return any(
        eqn.primitive.name in rules or any(_matches(sub, rules) for sub in sub_jaxprs(eqn))
        for eqn in jaxpr.eqns
    )


def _check_outputs(eqn: JaxprEqn, outputs: list[Any], rule: Any) -> None:
    avals: list[Any] = [v.aval for v in eqn.outvars]
    expected = [(aval.shape, aval.dtype) for aval in avals if hasattr(aval, "shape")]
    got = [(jnp.shape(output), jnp.result_type(output)) for output in outputs]
    if expected != got:
        raise VerificationError(
            f"rule {getattr(rule, '__name__', rule)!r} replaced {eqn.primitive.name!r}"
            " by something of another type",
            expected=str(expected),
            got=str(got),
            fix="return outputs of the same shapes and dtypes, or None to leave the equation",
        )
