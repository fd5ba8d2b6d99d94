"""Parameters are updated after everything has read them, so that nobody needs a copy.

In `p - f(gradient)` with p's memory given to the result, XLA's CPU backend has to know that every
other reader of p comes first. The gradient with respect to a layer's input reads its weights, and
nothing says that this happens before their update: so XLA copies the weights, every step. Here the
update is made to depend on those readers: it is multiplied by a 1 that is computed from one element
of each of their results, which changes no bit of it.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu.ir.analysis import aval_bytes
from fastgpu.ir.compat import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from fastgpu.ir.fusion import is_fusible
from fastgpu.transforms.inline import inline_calls, instantiated

# A copy of less costs nothing.
_SMALL = 1 << 20


def update_in_place(closed: ClosedJaxpr) -> ClosedJaxpr:
    """`closed` with each update of a large input computed after all other readers of that input.

    >>> def step(w, x):
    ...     h = jnp.tanh(x)
    ...     loss, gradients = jax.value_and_grad(lambda w, h: jnp.sum(h @ w), (0, 1))(w, h)
    ...     return w - 0.1 * gradients[0], gradients[1], loss
    >>> w, x = jnp.ones((600, 600)), jnp.ones((8, 600))
    >>> before = jax.make_jaxpr(step)(w, x)
    >>> after = update_in_place(before)
    >>> len(after.eqns) > len(before.eqns), len(update_in_place(after).eqns) == len(after.eqns)
    (True, True)
    """
    jaxpr = closed.jaxpr
    large = [v for v in jaxpr.invars if aval_bytes(v.aval) >= _SMALL]
    if not large:
        return closed
    program = _Program(jaxpr)
    late: dict[int, list[Var]] = {}
    for var in large:
        update = program.update_of(var)
        if update is not None and (found := program.not_before(update, var)):
            late[update] = found
    if not late:
        return closed
    eqns: list[JaxprEqn] = []
    for index in program.order(late):
        eqn = jaxpr.eqns[index]
        eqns += _after(eqn, late[index]) if index in late else [eqn]
    return ClosedJaxpr(jaxpr.replace(eqns=eqns), closed.consts)


class _Program:
    """Who makes, reads and precedes what; equations by index, sets of them as bits."""

    def __init__(self, jaxpr: Jaxpr) -> None:
        self.jaxpr, self.eqns = jaxpr, jaxpr.eqns
        self.producer = {v: i for i, eqn in enumerate(self.eqns) for v in eqn.outvars}
        self.readers: dict[Var, list[int]] = defaultdict(list)
        self.before: list[int] = []
        for index, eqn in enumerate(self.eqns):
            before = 0
            for v in {v for v in eqn.invars if isinstance(v, Var)}:
                self.readers[v].append(index)
                if v in self.producer:
                    before |= self.before[self.producer[v]] | 1 << self.producer[v]
            self.before.append(before)
        self.given = {v for v in jaxpr.outvars if isinstance(v, Var)}

    def update_of(self, var: Var) -> int | None:
        """The equation whose result may take `var`'s memory: one of its type, made from it."""
        made, pending = {var}, [var]
        while pending:
            for index in self.readers[pending.pop()]:
                eqn = self.eqns[index]
                if not is_fusible(eqn) or _type(eqn.outvars[0])[0] != _type(var)[0]:
                    continue
                if eqn.outvars[0] in self.given and _type(eqn.outvars[0]) == _type(var):
                    return index if _operand(eqn) is not None else None
                if eqn.outvars[0] not in made:
                    made.add(eqn.outvars[0])
                    pending.append(eqn.outvars[0])
        return None

    def not_before(self, update: int, var: Var) -> list[Var]:
        """Results for which `var` is read, which nothing orders before `update`.

        None of them if one needs the update: then a copy has to be made.
        """
        found: dict[Var, None] = {}
        pending, seen = [var], {var}
        while pending:
            for index in self.readers[pending.pop()]:
                if index == update or self.before[update] >> index & 1:
                    continue
                eqn = self.eqns[index]
                if self.before[index] >> update & 1 or eqn.effects:
                    return []
                for out in eqn.outvars:
                    if is_fusible(eqn) and out not in self.given:
                        # What is computed on the way to its readers is computed by them.
                        if out not in seen:
                            seen.add(out)
                            pending.append(out)
                    elif not jnp.issubdtype(_type(out)[1], jnp.number) or not _type(out)[0]:
                        if out in self.readers or out in self.given:
                            return []
                    else:
                        found[out] = None
        return list(found)

    def order(self, late: dict[int, list[Var]]) -> list[int]:
        """All equations, each update after what it now depends on."""
        needs = {i: {self.producer[v] for v in late[i]} for i in late}
        placed: set[int] = set()
        order: list[int] = []
        for start in range(len(self.eqns)):
            pending = [start]
            while pending:
                index = pending[-1]
                reads = {
                    self.producer[v]
                    for v in self.eqns[index].invars
                    if isinstance(v, Var) and v in self.producer
                }
                missing = (reads | needs.get(index, set())) - placed
                if index in placed or not missing:
                    pending.pop()
                    if index not in placed:
                        placed.add(index)
                        order.append(index)
                else:
                    pending += sorted(missing, reverse=True)
        return order


def _after(eqn: JaxprEqn, values: Sequence[Var]) -> list[JaxprEqn]:
    """`eqn`, which computes what it did, but not before `values` are there."""
    place = _operand(eqn)
    assert place is not None
    operand = eqn.invars[place]
    shapes = [jax.ShapeDtypeStruct(*_type(v)) for v in (operand, *values)]
    program = inline_calls(jax.make_jaxpr(_tied)(*shapes))
    eqns, (tied,) = instantiated(program.jaxpr, [operand, *values])
    invars = [*eqn.invars[:place], tied, *eqn.invars[place + 1 :]]
    return [*eqns, eqn.replace(invars=invars)]


def _tied(operand: jax.Array, *values: jax.Array) -> jax.Array:
    """`operand` times a 1 that is made of `values`; compilers do not see that it is one."""
    one = jnp.ones((), jnp.uint32)
    for value in values:
        element = lax.slice(value, (0,) * value.ndim, (1,) * value.ndim).reshape(())
        real = jnp.real(element).astype(jnp.float32)
        sign = lax.bitcast_convert_type(real, jnp.uint32) >> jnp.uint32(31)
        one = one + (sign >> jnp.uint32(1))
    return operand * one.astype(operand.dtype)


def _operand(eqn: JaxprEqn) -> int | None:
    """Which input of `eqn` can be multiplied: a floating one, as large as the result."""
    shape = _type(eqn.outvars[0])[0]
    for place in reversed(range(len(eqn.invars))):
        v = eqn.invars[place]
        floating = not isinstance(v, Literal) and jnp.issubdtype(_type(v)[1], jnp.floating)
        if floating and _type(v)[0] == shape:
            return place
    return None


def _type(v: Any) -> tuple[tuple[int, ...], Any]:
    return tuple(getattr(v.aval, "shape", ())), getattr(v.aval, "dtype", jnp.float32)
