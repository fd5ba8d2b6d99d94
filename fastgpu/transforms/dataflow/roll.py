"""Repeated blocks as one loop: a deep network's layers are compiled once, not once for each.

A model written as a Python loop over its blocks is a program as long as it is deep, and the time
that a compiler takes grows with it. Here blocks that are one block, over and over, become one
`jax.lax.scan`: what a block hands on is its carry, the weights, random keys and statistics of its
own are stacked to rows, and what is read later of each block comes out in rows. Differentiated,
the loop gives a backward loop, so that both halves are short.

The price, and why this pass runs only for those who name it: weights are copied to be stacked, and
their gradients come out of a stack, so that a step takes about twice the weights' bytes more and is
slower where a block computes little for each weight; nothing is fused across blocks; and on a CPU
each row that is taken out of a stack is a kernel of its own to compile, where equal kernels of an
unrolled program are compiled once already. What is gained is time to trace, differentiate and
lower, and time to compile where that goes by the program's length. In a profile, all iterations
carry the name scope of the second block.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu.ir.compat import ClosedJaxpr, Jaxpr, Literal, Var, bind, scope, with_borders
from fastgpu.ir.rewrite import interpret
from fastgpu.transforms.dataflow.blocks import Place, Run, identity, runs

# A run is worth a loop if it is so many blocks, of so many equations for each value that differs
# from block to block and has to be stacked.
LEAST_BLOCKS = 4
_LEAST_EQUATIONS_PER_ROW = 2


def roll_blocks(closed: ClosedJaxpr) -> ClosedJaxpr:
    """Put a `scan` in place of every run of equal blocks of equations, if there are enough.

    Looks at the program itself, not into programs in it. The results are the same.

    >>> def deep(x, ws):
    ...     for w in ws:
    ...         x = jnp.tanh(x @ w) + x
    ...     return x
    >>> closed = jax.make_jaxpr(deep)(jnp.ones((2, 3)), [jnp.ones((3, 3))] * 5)
    >>> [eqn.primitive.name for eqn in roll_blocks(closed).jaxpr.eqns][-1:]
    ['scan']
    """
    found = [run for run in runs(closed.jaxpr, LEAST_BLOCKS) if _pays(run)]
    if not found:
        return closed

    def evaluate(*args: Any) -> list[Any]:
        return _evaluate(closed, args, found)

    rolled = jax.make_jaxpr(evaluate)(*closed.in_avals)
    jaxpr = rolled.jaxpr.replace(debug_info=closed.jaxpr.debug_info)
    return ClosedJaxpr(jaxpr, rolled.consts)


def _pays(run: Run) -> bool:
    rows = {tuple(map(identity, run.column(place))) for place in run.sources if run.is_row(place)}
    return run.period >= _LEAST_EQUATIONS_PER_ROW * (len(rows) + len(run.kept))


def _evaluate(closed: ClosedJaxpr, args: Sequence[Any], found: Sequence[Run]) -> list[Any]:
    """What `closed` computes, with its runs as loops; to be traced."""
    env: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(closed.jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    index = 0
    for run in (*found, None):
        for eqn in closed.jaxpr.eqns[index : run.start if run else None]:
            with scope(eqn):
                env.update(zip(eqn.outvars, bind(eqn, list(map(read, eqn.invars))), strict=True))
        if run:
            env.update(_Loop(run).outputs(read))
            index = run.stop
    return [read(atom) for atom in closed.jaxpr.outvars]


class _Loop:
    """A run as a `scan`."""

    def __init__(self, run: Run) -> None:
        self.run = run
        # What the body reads, under its names there: constants, then rows.
        self.consts: dict[Any, Var] = {}
        self.rows: dict[tuple[Any, ...], tuple[Var, list[Any]]] = {}
        self.carried = {place: Var(run.made(place)[0].aval) for place in run.carried}

    def outputs(self, read: Any) -> dict[Var, Any]:
        """The values of the run that are read after it."""
        run, body = self.run, self._body()
        consts = list(map(read, self.consts))
        rows = [
            jnp.stack([jnp.asarray(read(atom), atom.aval.dtype) for atom in column])
            for _, column in self.rows.values()
        ]

        def step(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
            values = interpret(body, (), [*consts, *carry, *row], {})
            return values[: len(carry)], values[len(carry) :]

        initial = [read(atom) for atom in run.carried.values()]
        last, kept = lax.scan(step, initial, rows, length=run.count)
        found: dict[Var, Any] = {}
        for place, stack in zip(run.kept, kept, strict=True):
            found.update(zip(run.made(place), _rows(stack), strict=True))
        found.update((run.made(place)[-1], v) for place, v in zip(run.carried, last, strict=True))
        return found

    def _body(self) -> Jaxpr:
        eqns = self.run.block(1)
        eqns = [
            eqn.replace(invars=[self._inner((index, i)) for i in range(len(eqn.invars))])
            for index, eqn in enumerate(eqns)
        ]
        outvars = [eqns[index].outvars[i] for index, i in (*self.run.carried, *self.run.kept)]
        invars = [
            *self.consts.values(),
            *self.carried.values(),
            *(v for v, _ in self.rows.values()),
        ]
        return with_borders(
            self.run.jaxpr, constvars=[], invars=invars, outvars=outvars, eqns=eqns, effects=set()
        )

    def _inner(self, place: Place) -> Any:
        """What the body reads at `place`."""
        source = self.run.sources[place]
        column = self.run.column(place)
        if source is not None:
            index, position = source
            return column[1] if index >= 0 else self.carried[index + self.run.period, position]
        if self.run.is_row(place):
            row = Var(column[0].aval)
            return self.rows.setdefault(tuple(map(identity, column)), (row, column))[0]
        if isinstance(column[0], Literal):
            return column[0]
        return self.consts.setdefault(column[0], Var(column[0].aval))


def _rows(stack: jax.Array) -> list[jax.Array]:
    """The rows of `stack`; their gradients are put together, not each padded to the whole."""
    return [lax.squeeze(row, (0,)) for row in lax.split(stack, (1,) * len(stack))]
