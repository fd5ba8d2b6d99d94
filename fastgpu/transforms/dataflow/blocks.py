"""Blocks of equations that are one block, over and over: which values go from each to the next.

A `Run` is a stretch of a program whose blocks, one after the other, do the same with the same
values of their own, read the same values of the block before, and else only what was there before
the run. That is what a loop does: values handed on are its carries, what differs from block to
block its rows, what does not its constants.
"""

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastgpu.ir.analysis import aval_bytes
from fastgpu.ir.compat import Jaxpr, JaxprEqn, Literal, Var
from fastgpu.transforms.dataflow.repeats import numbered, stretches
from fastgpu.transforms.dataflow.same_equations import derivative, literal_key

# Of the places at which blocks may begin, so many are tried: where fewest bytes cross.
_CUTS = 4
# Stretches of equal equations that are looked into, of each part of a program.
_TRIED = 8
# A place in a block: which equation and which of its inputs or outputs.
Place = tuple[int, int]


@dataclass(frozen=True)
class Run:
    """`count` blocks of `period` equations from equation `start` on, that are one block.

    `sources` says for every input of the block's equations where it is made: `(equation, output)`
    of the block itself, the same less `period` for the block before, `None` for neither.
    """

    jaxpr: Jaxpr
    start: int
    period: int
    count: int
    sources: dict[Place, Place | None]

    @property
    def stop(self) -> int:
        """The first equation after the run."""
        return self.start + self.period * self.count

    def block(self, index: int) -> list[JaxprEqn]:
        """The equations of a block."""
        first = self.start + index * self.period
        return self.jaxpr.eqns[first : first + self.period]

    def column(self, place: Place) -> list[Any]:
        """What the blocks read at `place`, block by block."""
        equation, position = place
        rows = self.jaxpr.eqns[self.start + equation : self.stop : self.period]
        return [eqn.invars[position] for eqn in rows]

    def is_row(self, place: Place) -> bool:
        """Whether blocks read different values from before the run at `place`."""
        if self.sources[place] is not None:
            return False
        first, *others = map(identity, self.column(place))
        return any(other != first for other in others)

    def made(self, place: Place) -> list[Var]:
        """What the blocks make at `place`, block by block."""
        equation, position = place
        rows = self.jaxpr.eqns[self.start + equation : self.stop : self.period]
        return [eqn.outvars[position] for eqn in rows]

    @cached_property
    def carried(self) -> dict[Place, Any]:
        """What a block reads of the block before, and what the first one reads in its place."""
        return {
            (source[0] + self.period, source[1]): self.column(place)[0]
            for place, source in self.sources.items()
            if source is not None and source[0] < 0
        }

    @cached_property
    def kept(self) -> list[Place]:
        """What is read after the run, apart from what the last block hands on."""
        made = {
            v: (index, position)
            for index, eqn in enumerate(self.jaxpr.eqns[self.start : self.stop])
            for position, v in enumerate(eqn.outvars)
        }
        readers = (eqn.invars for eqn in self.jaxpr.eqns[self.stop :])
        read = {v for atoms in (*readers, self.jaxpr.outvars) for v in atoms if isinstance(v, Var)}
        found = set()
        for v in read & made.keys():
            index, position = made[v]
            place = index % self.period, position
            if index // self.period < self.count - 1 or place not in self.carried:
                found.add(place)
        return sorted(found)


def runs(jaxpr: Jaxpr, least: int) -> list[Run]:
    """Runs of at least `least` blocks, in order; none overlaps another.

    >>> import jax, jax.numpy as jnp
    >>> def deep(x, ws):
    ...     for w in ws:
    ...         x = jnp.tanh(x @ w)
    ...     return x
    >>> closed = jax.make_jaxpr(deep)(jnp.ones((2, 3)), [jnp.ones((3, 3))] * 5)
    >>> [(run.start, run.period, run.count) for run in runs(closed.jaxpr, least=3)]
    [(0, 2, 5)]
    """
    return sorted(_Finder(jaxpr, least).between(0, len(jaxpr.eqns)), key=lambda run: run.start)


class _Finder:
    def __init__(self, jaxpr: Jaxpr, least: int) -> None:
        self.jaxpr, self.least = jaxpr, max(least, 2)
        self.numbers = numbered(jaxpr.eqns)
        self.maker = {
            v: (index, position)
            for index, eqn in enumerate(jaxpr.eqns)
            for position, v in enumerate(eqn.outvars)
        }
        self.derivatives: dict[int, Hashable] = {}

    def between(self, start: int, stop: int) -> Iterator[Run]:
        """The longest run of a stretch of the program, and those before and after it."""
        found = stretches(self.numbers[start:stop], self.least)
        for first, last, period in itertools.islice(found, _TRIED):
            run = self._within(start + first, start + last, period)
            if run is not None:
                yield from self.between(start, run.start)
                yield run
                yield from self.between(run.stop, stop)
                return

    def _within(self, start: int, stop: int, period: int) -> Run | None:
        """The most blocks of a stretch in which equal equations follow each other."""
        found = (self._from(cut, stop, period) for cut in self._cuts(start, stop, period))
        return max((run for run in found if run), key=lambda run: run.count, default=None)

    def _cuts(self, start: int, stop: int, period: int) -> list[int]:
        """Where blocks may begin: places that the fewest bytes cross, in the first period."""
        crossing = [0] * (stop - start + 1)
        last: dict[Var, int] = {}
        for index in range(start, stop):
            last.update((v, index) for v in self.jaxpr.eqns[index].invars if isinstance(v, Var))
        for v, reader in last.items():
            made = self.maker.get(v, (-1, 0))[0]
            if made >= start:
                crossing[made - start + 1] += aval_bytes(v.aval)
                crossing[reader - start + 1] -= aval_bytes(v.aval)
        bytes_at, widths = 0, []
        for change in crossing:
            bytes_at += change
            widths.append(bytes_at)
        # Nothing crosses the beginning of the stretch, whatever crosses it a period later.
        best = sorted(range(period, 2 * period), key=lambda cut: (widths[cut], cut))
        return [start + cut - period for cut in best[:_CUTS]]

    def _from(self, start: int, stop: int, period: int) -> Run | None:
        """The longest run in blocks that begin at `start`."""
        firsts = range(start, stop - period + 1, period)
        sources = [self._sources(first, period) for first in firsts]
        alike = [
            (tuple(of.values()), self._derivatives(first, period))
            for of, first in zip(sources, firsts, strict=True)
        ]
        first, count = _longest(alike)
        if first > 0 and alike[first - 1][1] == alike[first][1]:
            block = self.jaxpr.eqns[firsts[first - 1] : firsts[first]]
            if _may_come_first(block, sources[first - 1], sources[first]):
                first, count = first - 1, count + 1
        if count < self.least:
            return None
        run = Run(self.jaxpr, firsts[first], period, count, sources[first + 1])
        return run if self._is_loop(run) else None

    def _sources(self, start: int, period: int) -> dict[Place, Place | None]:
        sources: dict[Place, Place | None] = {}
        for index in range(period):
            for position, atom in enumerate(self.jaxpr.eqns[start + index].invars):
                made = None if isinstance(atom, Literal) else self.maker.get(atom)
                near = made is not None and made[0] >= start - period
                sources[index, position] = (made[0] - start, made[1]) if made and near else None
        return sources

    def _derivatives(self, start: int, period: int) -> tuple[Hashable, ...]:
        for index in range(start, start + period):
            if index not in self.derivatives:
                self.derivatives[index] = derivative(self.jaxpr.eqns[index])
        return tuple(self.derivatives[index] for index in range(start, start + period))

    def _is_loop(self, run: Run) -> bool:
        """Whether the blocks read nothing else of each other, and rows keep the types."""
        for place, source in run.sources.items():
            if source is not None:
                continue
            column = run.column(place)
            if any(self.maker.get(v, (-1, 0))[0] >= run.start for v in column if _is_var(v)):
                return False
            made = run.block(0)[place[0]].outvars
            # A row has a strong type.
            if run.is_row(place) and _is_weak(column[0]) and any(map(_is_weak, made)):
                return False
        return True


def _longest(alike: Sequence[Hashable]) -> tuple[int, int]:
    """Where the most equal neighbours begin, and how many they are."""
    start, best = 0, (0, 0)
    for index, (one, before) in enumerate(zip(alike, (None, *alike), strict=False)):
        if index == 0 or one != before:
            start = index
        best = max(best, (index - start + 1, -start))
    return -best[1], best[0]


def _may_come_first(
    block: Sequence[JaxprEqn], own: dict[Place, Place | None], later: dict[Place, Place | None]
) -> bool:
    """Whether a block may be the first of a run: it reads the same of itself as later blocks do."""
    handed: dict[Place, Any] = {}
    for place, source in later.items():
        mine = own[place]
        inside = mine is not None and mine[0] >= 0
        if source is not None and source[0] >= 0:
            if mine != source:
                return False
        elif inside:
            return False
        elif source is not None:
            # Later blocks read one value in both places.
            atom = block[place[0]].invars[place[1]]
            if handed.setdefault(source, atom) is not atom:
                return False
    return True


def identity(atom: Any) -> Hashable:
    """Equal for what has the same value: a variable, or a literal of the same bits."""
    return literal_key(atom) if isinstance(atom, Literal) else atom


def _is_var(atom: Any) -> bool:
    return isinstance(atom, Var)


def _is_weak(atom: Any) -> bool:
    return getattr(atom.aval, "weak_type", False)
