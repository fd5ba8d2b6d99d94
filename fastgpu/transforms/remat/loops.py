"""Loops in a shape whose memory can be decided about.

Differentiation stacks what the backward half of a `scan` reads, one row an iteration, and a planner
can only keep or recompute the whole stack. So before differentiation a loop is written another way:

- unrolled: every iteration is decided by itself, when they are few.
- in chunks: a scan over chunks, each a `jax.checkpoint` of a scan over its iterations, so that only
  the carries between chunks are kept (Griewank, Optim. Methods Softw. 1992; Chen et al. 2016,
  arXiv:1604.06174). The last iterations may stay as they are: their rows are read first and freed
  before the first chunk is computed again, and what is kept costs no time.

The warning: for reverse mode only. Taking rows apart has a derivative rule of its own, which is
gone once the gradient is traced.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu import ir
from fastgpu.ir.analysis import aval_bytes, walk
from fastgpu.ir.compat import ClosedJaxpr, Jaxpr, JaxprEqn, bind, source_line, sub_jaxprs
from fastgpu.ir.fusion import is_fusible, storage
from fastgpu.ir.rewrite import interpret

# Loops whose stacks are a smaller part of the program's temporaries are left alone.
_NOTABLE = 0.05
# Iterations, and equations in all, up to which a loop is unrolled.
_MOST_UNROLLED = 64
_MOST_EQUATIONS = 6000
# Parts of a loop that go in chunks; the rest keeps what it stacks.
_PARTS = (1.0, 2 / 3, 1 / 3)
# A chunk without a remainder may be longer or shorter than the best one by this factor.
_NEAR = 1.5


@dataclass(frozen=True)
class Reshaped:
    """A program with loops in another shape; `loops` says which and how, one line a loop."""

    program: ClosedJaxpr
    loops: tuple[str, ...]


def reshaped_loops(closed: ClosedJaxpr, temporary_bytes: int) -> Iterator[Reshaped]:
    """Other ways to write the loops of `closed`, a program to be differentiated in reverse.

    `temporary_bytes` is what its gradient takes: loops that stack a notable part of it are
    rewritten. Loops with effects stay as they are, and so do loops in `while`, in
    `jax.checkpoint`, and in functions with derivatives of their own. The results are the same up to
    the order in which gradients are summed over iterations.

    >>> def deep(w, x):
    ...     return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
    >>> closed = jax.make_jaxpr(deep)(jnp.ones((12, 8, 8)), jnp.ones((256, 8)))
    >>> for way in reshaped_loops(closed, temporary_bytes=256 * 8 * 4 * 12):
    ...     print(way.loops[0].split(": ")[1])
    12 iterations unrolled
    12 iterations, 12 of them in chunks of 2
    12 iterations, 8 of them in chunks of 2
    12 iterations, 4 of them in chunks of 2
    12 iterations, 12 of them in chunks of 1
    12 iterations, 8 of them in chunks of 1
    12 iterations, 4 of them in chunks of 1
    """
    least = _NOTABLE * temporary_bytes
    scans = [_Loop(eqn) for eqn in walk(closed) if eqn.primitive.name == "scan"]
    if not any(loop.may_change(least) for loop in scans):
        return
    ways = [partial(_unrolling, most=_MOST_EQUATIONS)]
    ways += [partial(_chunking, part=part, bodies=b) for b in (False, True) for part in _PARTS]
    seen: set[tuple[str, ...]] = {()}
    for rules in ways:
        loops: list[str] = []
        program = ir.rewrite(closed, rules(least, loops))
        if tuple(loops) not in seen:
            seen.add(tuple(loops))
            yield Reshaped(program, tuple(loops))


class _Loop:
    """A scan equation, and what its gradient would stack."""

    def __init__(self, eqn: JaxprEqn, body: ClosedJaxpr | None = None) -> None:
        self.eqn, self.body = eqn, body or eqn.params["jaxpr"]
        self.length: int = eqn.params["length"]
        self.reverse: bool = eqn.params["reverse"]
        self.consts: int = eqn.params["num_consts"]
        self.carries: int = eqn.params["num_carry"]

    @cached_property
    def carried_bytes(self) -> int:
        """Bytes between two iterations."""
        return sum(aval_bytes(v.aval) for v in self.body.jaxpr.outvars[: self.carries])

    @cached_property
    def body_bytes(self) -> int:
        """Bytes that the gradient of one iteration keeps, about."""
        return max(1, _written_bytes(self.body.jaxpr))

    @property
    def stacked_bytes(self) -> int:
        """Bytes that the gradient of the loop keeps, about."""
        return self.length * self.body_bytes

    @cached_property
    def equations(self) -> int:
        """Equations of the body, nested ones included."""
        return sum(1 for _ in walk(self.body))

    @property
    def best_chunk(self) -> float:
        """Iterations per chunk at which kept carries and one chunk's stacks take least memory."""
        return math.sqrt(self.length * self.carried_bytes / self.body_bytes)

    def may_change(self, least: float) -> bool:
        """Whether the loop stacks at least so many bytes and has no effects."""
        return self.length > 1 and not self.eqn.effects and self.stacked_bytes >= least

    def says(self, how: str) -> str:
        """The line of a report about this loop."""
        return f"{source_line(self.eqn) or 'scan'}: {self.length} iterations{how}"

    def parts(self, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Constants, carries and stacked inputs among the equation's inputs."""
        first, second = self.consts, self.consts + self.carries
        return list(values[:first]), list(values[first:second]), list(values[second:])

    def scan(
        self, consts: list[Any], carry: list[Any], xs: list[Any], length: int
    ) -> tuple[list[Any], list[Any]]:
        """`length` iterations as a loop: carries, stacked outputs."""
        params = {**self.eqn.params, "jaxpr": self.body, "length": length}
        outputs = bind(self.eqn, [*consts, *carry, *xs], params)
        return outputs[: self.carries], outputs[self.carries :]

    def step(
        self, consts: list[Any], carry: list[Any], row: list[Any], rules: ir.Rules
    ) -> tuple[list[Any], list[Any]]:
        """One iteration, written out: carries, outputs."""
        values = [*consts, *carry, *row]
        outputs = interpret(self.body.jaxpr, self.body.consts, values, rules)
        return outputs[: self.carries], outputs[self.carries :]


def _written_bytes(jaxpr: Jaxpr) -> int:
    """Bytes that a program writes, loops in it included: about what its gradient keeps."""
    view = storage(jaxpr)
    total = 0
    for eqn, writes in zip(jaxpr.eqns, view.writes, strict=True):
        total += sum(aval_bytes(v.aval) for v in writes)
        if eqn.primitive.name == "scan":
            total += eqn.params["length"] * _written_bytes(eqn.params["jaxpr"].jaxpr)
        elif eqn.primitive.name == "cond" or not (is_fusible(eqn) or eqn.primitive.name in _KEPT):
            total += max((_written_bytes(sub) for sub in sub_jaxprs(eqn)), default=0)
    return total


def _keep(eqn: JaxprEqn) -> Callable[..., Any]:
    return lambda *values: bind(eqn, values)


# What is not differentiated in reverse, or by a rule of its own, or was decided by the user.
_KEPT = ("while", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")
_LEFT_ALONE: dict[str, ir.Rule] = dict.fromkeys(_KEPT, _keep)


# Unrolled


def _unrolling(least: float, loops: list[str], most: int) -> ir.Rules:
    """Iterations one after the other, where a planner of the whole program sees them."""

    def rule(eqn: JaxprEqn) -> Callable[..., Any]:
        loop = _Loop(eqn)
        few = loop.length <= _MOST_UNROLLED and loop.length * loop.equations <= most
        if not few or not loop.may_change(least):
            return _keep(eqn)
        loops.append(loop.says(" unrolled"))
        return partial(_unrolled, loop, _unrolling(least, loops, most // loop.length))

    # A branch is one equation, whatever is in it.
    return {**_LEFT_ALONE, "cond": _keep, "scan": rule}


def _unrolled(loop: _Loop, rules: ir.Rules, *values: Any) -> list[Any]:
    consts, carry, xs = loop.parts(values)
    rows = [_split(x, (1,) * loop.length) for x in xs]
    outputs: list[list[Any]] = [[] for _ in range(loop.length)]
    for index in reversed(range(loop.length)) if loop.reverse else range(loop.length):
        row = [x[index].reshape(x[index].shape[1:]) for x in rows]
        carry, outputs[index] = loop.step(consts, carry, row, rules)
    return [*carry, *(jnp.stack(column) for column in zip(*outputs, strict=True))]


def _split(x: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
    """Stretches of rows, of these lengths."""
    split = _differentiable_slices if jnp.issubdtype(x.dtype, jnp.inexact) else _slices
    return split(x, sizes)


def _slices(x: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
    stops = itertools.accumulate(sizes)
    return [lax.slice_in_dim(x, b - size, b) for b, size in zip(stops, sizes, strict=True)]


# JAX's own gradient pads each part to the whole and adds them up.
_differentiable_slices = jax.custom_vjp(_slices, nondiff_argnums=(1,))
_differentiable_slices.defvjp(
    lambda x, sizes: (_slices(x, sizes), None),
    lambda sizes, _, cotangents: (jnp.concatenate(cotangents),),
)


# In chunks


def _chunking(least: float, loops: list[str], part: float, bodies: bool) -> ir.Rules:
    """Nested loops: inner ones first, so that an outer one need not change without reason.

    `part` of each loop goes in chunks; of one iteration each with `bodies`.
    """
    rules: dict[str, ir.Rule] = dict(_LEFT_ALONE)

    def rule(eqn: JaxprEqn) -> Callable[..., Any]:
        loop = _Loop(eqn, ir.rewrite(eqn.params["jaxpr"], rules))
        if not loop.may_change(least):
            return lambda *values: bind(eqn, values, {**eqn.params, "jaxpr": loop.body})
        size = 1 if bodies else _best_size(loop)
        count = max(1, int(part * loop.length / size + 1e-9))
        loops.append(loop.says(f", {count * size} of them in chunks of {size}"))
        return partial(_chunked, loop, count, size)

    rules["scan"] = rule
    return rules


def _best_size(loop: _Loop) -> int:
    """Iterations per chunk: near the best, without a remainder if there is such a number."""
    best = min(max(loop.best_chunk, 1.0), loop.length / 2)
    near = range(math.ceil(best / _NEAR), math.floor(best * _NEAR) + 1)
    even = [size for size in near if loop.length % size == 0]
    return min(even, key=lambda size: abs(math.log(size / best)), default=max(1, round(best)))


def _chunked(loop: _Loop, count: int, size: int, *values: Any) -> list[Any]:
    """The first `count * size` iterations in chunks, the rest as they are."""
    consts, carry, xs = loop.parts(values)
    chunked, rest = count * size, loop.length - count * size
    parts = [[x] for x in xs]
    if rest:
        # The first iterations of a reverse loop are its last rows.
        parts = [
            _split(x, (rest, chunked))[::-1] if loop.reverse else _split(x, (chunked, rest))
            for x in xs
        ]

    def chunk(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        if size == 1:
            return loop.step(consts, carry, xs, {})
        return loop.scan(consts, carry, xs, size)

    grouped = [x[0] for x in parts]
    if size > 1:
        grouped = [x.reshape(count, size, *x.shape[1:]) for x in grouped]
    # In the body of a loop nothing could be merged with its recomputation, and barriers would only
    # be in the way; but a loop of one turn is no loop to the compiler.
    body = jax.checkpoint(chunk, prevent_cse=count == 1)
    carry, ys = lax.scan(body, carry, grouped, length=count, reverse=loop.reverse)
    if size > 1:
        ys = [y.reshape(chunked, *y.shape[2:]) for y in ys]
    if rest:
        carry, others = loop.scan(consts, carry, [x[1] for x in parts], rest)
        pairs = zip(others, ys, strict=True) if loop.reverse else zip(ys, others, strict=True)
        ys = [jnp.concatenate(pair) for pair in pairs]
    return [*carry, *ys]
