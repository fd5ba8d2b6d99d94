"""Forward and backward of a function as two flat programs, with every residual in sight.

`jax.vjp` of a traced function is itself traced: its forward half gives the function's results and
the residuals that differentiation chose to keep, its backward half reads them. Only here can a
pass see what the memory of a training step is made of.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from fastgpu.ir.compat import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, dce, with_borders
from fastgpu.transforms.inline import inline_calls


@dataclass(frozen=True)
class Joint:
    """`forward`: inputs → results, then residuals. `backward`: cotangents, residuals → gradients.

    `results` counts the results of the function, of which the first `cotangents` are
    differentiated. Both programs are closed over no constants: those are inputs `consts` in front.
    """

    forward: Jaxpr
    backward: Jaxpr
    results: int
    cotangents: int
    consts: tuple[Any, ...]

    @property
    def residuals(self) -> list[Any]:
        """For each residual the forward program's variable (or literal), in backward's order."""
        return list(self.forward.outvars[self.results :])

    @property
    def backward_residuals(self) -> list[Var]:
        """The same residuals, as the backward program names them."""
        return list(self.backward.invars[self.cotangents :])


@dataclass(frozen=True)
class Changed:
    """The same function's joint program, written another way; `how` says the change in a line."""

    joint: Joint
    how: str


def trace_joint(
    fn: Callable[..., tuple[Any, Any]], differentiated: Sequence[Any], rest: Sequence[Any]
) -> Joint:
    """Trace `fn(*differentiated, *rest) -> (results, aux)`: lists of arrays, flat.

    The backward program is that of cotangents for `results`; `aux` is not differentiated.
    """
    count = len(differentiated)
    tree: Any = None
    primal: list[Any] = []

    def forward(*args: Any) -> list[Any]:
        nonlocal tree
        moving, fixed = args[:count], args[count:]
        results, pull, aux = jax.vjp(lambda *m: fn(*m, *fixed), *moving, has_aux=True)
        leaves, tree = jax.tree.flatten(pull)
        primal[:] = [len(results), len(results) + len(aux)]
        return [*results, *aux, *leaves]

    closed = inline_calls(jax.make_jaxpr(forward)(*differentiated, *rest))
    cotangents, results = primal

    def backward(*args: Any) -> list[Any]:
        pull = jax.tree.unflatten(tree, args[cotangents:])
        return list(pull(list(args[:cotangents])))

    avals = [*closed.out_avals[:cotangents], *closed.out_avals[results:]]
    pulled = inline_calls(jax.make_jaxpr(backward)(*avals))
    return _cleaned(closed, pulled, results, cotangents)


def _cleaned(closed: ClosedJaxpr, pulled: ClosedJaxpr, results: int, cotangents: int) -> Joint:
    """Without what nobody reads; constants become inputs, in front, so that both are plain."""
    pulled = dce(pulled)
    kept = _kept(pulled.jaxpr, cotangents)
    outvars = [*closed.jaxpr.outvars[:results], *(closed.jaxpr.outvars[results + i] for i in kept)]
    forward = dce(ClosedJaxpr(with_borders(closed.jaxpr, outvars=outvars), closed.consts))
    back = pulled.jaxpr
    back = with_borders(
        back,
        constvars=[],
        invars=[
            *back.invars[:cotangents],
            *(back.invars[cotangents + i] for i in kept),
            *back.constvars,
        ],
    )
    front = forward.jaxpr
    shared = [Var(v.aval) for v in back.invars[len(back.invars) - len(pulled.consts) :]]
    front = with_borders(
        front,
        constvars=[],
        invars=[*shared, *front.constvars, *front.invars],
        outvars=[*front.outvars, *shared],
    )
    return Joint(front, back, results, cotangents, (*pulled.consts, *forward.consts))


def without_unread(joint: Joint) -> Joint:
    """`joint` without residuals that its backward half does not read, and what made them."""
    back = dce(ClosedJaxpr(joint.backward, ())).jaxpr
    kept = _kept(back, joint.cotangents)
    invars = [*back.invars[: joint.cotangents], *(back.invars[joint.cotangents + i] for i in kept)]
    residuals = joint.residuals
    outvars = [*joint.forward.outvars[: joint.results], *(residuals[i] for i in kept)]
    front = dce(ClosedJaxpr(with_borders(joint.forward, outvars=outvars), ())).jaxpr
    return replace(joint, forward=front, backward=with_borders(back, invars=invars))


def _kept(back: Jaxpr, cotangents: int) -> list[int]:
    """Which residuals the backward half reads."""
    read = {v for eqn in back.eqns for v in eqn.invars if isinstance(v, Var)}
    read |= {v for v in back.outvars if isinstance(v, Var)}
    return [i for i, v in enumerate(back.invars[cotangents:]) if v in read]


def flat_program(joint: Joint) -> ClosedJaxpr:
    """Forward and backward as one closed program: inputs, cotangents → results, gradients.

    The backward half reads every residual from memory: what JAX does.
    """
    names: dict[Var, Any] = dict(zip(joint.backward_residuals, joint.residuals, strict=True))

    def read(atom: Any) -> Any:
        return atom if isinstance(atom, Literal) else names.get(atom, atom)

    backward = [eqn.replace(invars=[read(v) for v in eqn.invars]) for eqn in joint.backward.eqns]
    outvars = [
        *joint.forward.outvars[: joint.results],
        *(read(v) for v in joint.backward.outvars),
    ]
    return joined(joint, [*joint.forward.eqns, *backward], outvars)


def joined(joint: Joint, eqns: list[JaxprEqn], outvars: list[Any]) -> ClosedJaxpr:
    """A closed program of `joint`'s inputs and cotangents with these equations and outputs."""
    invars = [*joint.forward.invars, *joint.backward.invars[: joint.cotangents]]
    jaxpr = with_borders(
        joint.forward,
        constvars=invars[: len(joint.consts)],
        invars=invars[len(joint.consts) :],
        outvars=outvars,
        eqns=eqns,
        effects=joint.forward.effects | joint.backward.effects,
    )
    return ClosedJaxpr(jaxpr, joint.consts)
