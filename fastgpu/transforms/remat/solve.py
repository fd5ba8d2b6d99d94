"""Choose what to keep: least recomputation such that every backward position fits the budget.

A mixed-integer linear program in the spirit of Checkmate (Jain et al., MLSys 2020) and MONeT
(Shah et al., ICLR 2021), on values instead of layers. Its memory rows are running sums, so that the
matrix stays sparse; `scipy.optimize.milp` (HiGHS) solves it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from fastgpu.ir.analysis import aval_bytes
from fastgpu.ir.compat import Var
from fastgpu.ir.fusion import is_view
from fastgpu.transforms.remat.problem import Problem
from fastgpu.transforms.remat.shelves import Shelf

_MIB = 2**20


@dataclass(frozen=True)
class Decision:
    """What is kept for one problem.

    `shelved` are the values that wait elsewhere, `restored` the segments of the backward half for
    which each is brought back. `seconds` is the price of it, `bound` the least that any decision
    could cost: what the solver proved.
    """

    problem: Problem
    saved: frozenset[Var]
    shelved: dict[Var, Shelf]
    restored: frozenset[tuple[Var, int]]
    seconds: float
    bound: float

    def of(self, value: Var) -> str:
        """What is done about a value: "keep", "recompute", or the shelf that it waits on."""
        shelf = self.shelved.get(self.problem.view.root[value])
        if value in self.saved or (shelf is None and value not in self.problem.residuals):
            return "keep"
        return "recompute" if shelf is None else shelf.name

    @cached_property
    def again(self) -> frozenset[int]:
        """The forward equations that run again: what residuals need that are not at hand."""
        problem = self.problem
        segment_of, producer = problem.segment_of, problem.producer

        def at_hand(v: Var) -> bool:
            return v in self.saved or (v, segment_of[producer[v]]) in self.restored

        pending = [producer[v] for v in problem.residuals if not at_hand(v)]
        again: set[int] = set()
        while pending:
            index = pending.pop()
            if index in again:
                continue
            again.add(index)
            for u in problem.joint.forward.eqns[index].invars:
                if not isinstance(u, Var) or u not in producer or at_hand(u):
                    continue
                if segment_of[producer[u]] == segment_of[index]:
                    pending.append(producer[u])
        return frozenset(again)

    @property
    def gap(self) -> float:
        """How far the decision may be from the best, as a fraction of its price."""
        return max(0.0, self.seconds - self.bound) / self.seconds if self.seconds > 0 else 0.0


class Solver:
    """The linear program of one problem, for any budget.

    Small values are kept. A value that its only large input gives for nothing, fused into whatever
    reads it, `follows` that input: there is nothing to decide about it.

    Variables: x (kept) for each value, z (run again) for each equation, s (put on a shelf) for each
    movable value and shelf, r (restored) for each of those and each segment that reads it; m (bytes
    kept so far), t (the largest value on the way to what is computed again), bytes that have not
    left for the host by its end, and what is waited for from there, for each segment; what is
    waited for to leave; and the budget.
    Inequalities are rows `a @ variables <= b`.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.x: dict[Var, int] = {}
        self.z: dict[int, int] = {}
        self.s: dict[tuple[Var, Shelf], int] = {}
        self.r: dict[tuple[Var, Shelf, int], int] = {}
        self._needed()
        self._movable()
        self.decided = len(self.x) + len(self.z) + len(self.s) + len(self.r)
        count = problem.segments
        self.m, self.t, self.queue, self.late = (
            [self.decided + group * count + k for k in range(count)] for group in range(4)
        )
        self.stuck = self.decided + 4 * count
        self.size = self.stuck + 2  # the last one is the budget

    def _needed(self) -> None:
        """Only what residuals are computed from takes part."""
        problem = self.problem
        needed = sorted(problem.needed, key=lambda v: problem.producer[v])
        self.bytes = {v: aval_bytes(v.aval) for v in needed}
        self.small = [v for v in needed if self.bytes[v] <= problem.small]
        large = [v for v in needed if self.bytes[v] > problem.small]
        self.follows = self._following(large)
        self.values = [v for v in large if v not in self.follows]
        for v in self.values:
            self.x[v] = len(self.x)
        count = len(self.x)
        for index in sorted({problem.producer[v] for v in self.values}):
            self.z[index] = count + len(self.z)

    def _following(self, large: list[Var]) -> dict[Var, Var]:
        """For values that cost nothing where another of their segment is: that other.

        Keeping such a value would take as many bytes as keeping what it is made of.
        """
        problem, segment_of = self.problem, self.problem.segment_of
        eqns, producer = problem.joint.forward.eqns, problem.producer
        needed = set(large)
        read_elsewhere = {
            u
            for index in {producer[v] for v in problem.needed}
            for u in eqns[index].invars
            if isinstance(u, Var) and u in needed and segment_of[producer[u]] != segment_of[index]
        }
        follows: dict[Var, Var] = {}
        for v in large:
            index = producer[v]
            sources = {u for u in eqns[index].invars if isinstance(u, Var) and u in needed}
            if len(sources) != 1 or len(eqns[index].outvars) != 1 or v in read_elsewhere:
                continue
            if not (problem.view.fused[index] or is_view(eqns[index])):
                continue
            (source,) = sources
            leader = follows.get(source, source)
            same_segment = segment_of[producer[leader]] == segment_of[index]
            if same_segment and self.bytes[v] >= self.bytes[leader]:
                follows[v] = leader
        return follows

    def _movable(self) -> None:
        """Values of the last segment are needed at once; nothing is gained by moving them."""
        problem = self.problem
        readers: dict[Var, set[int]] = {}
        for index in {problem.producer[v] for v in problem.needed}:
            for u in problem.joint.forward.eqns[index].invars:
                if isinstance(u, Var) and u in problem.movable:
                    readers.setdefault(u, set()).add(problem.segment_of[index])
        self.places: dict[Var, list[int]] = {}
        for v in self.values:
            own = problem.segment_of[problem.producer[v]]
            if v not in problem.movable or own >= problem.segments - 1:
                continue
            places = {k for k in (own, *readers.get(v, ())) if k < problem.segments - 1}
            self.places[v] = sorted(places)
        first = len(self.x) + len(self.z)
        pairs = [(v, shelf) for v in self.places for shelf in problem.movable[v]]
        self.s.update((pair, first + i) for i, pair in enumerate(pairs))
        first += len(self.s)
        triples = [(v, shelf, k) for v, shelf in pairs for k in self.places[v]]
        self.r.update((triple, first + i) for i, triple in enumerate(triples))

    def _restored(self, v: Var, k: int) -> list[tuple[int, float]]:
        """Terms of a row: -1 for each way in which `v` is brought back for segment `k`."""
        if k not in self.places.get(v, ()):
            return []
        return [(self.r[v, shelf, k], -1.0) for shelf in self.problem.movable[v]]

    @cached_property
    def rows(self) -> LinearConstraint:
        """All inequalities; the budget is a variable, of which `bounds` knows the size."""
        problem = self.problem
        eqns = problem.joint.forward.eqns
        columns: list[int] = []
        values: list[float] = []
        ends, limits = [0], list[float]()

        def row(terms: list[tuple[int, float]], limit: float) -> None:
            for variable, value in terms:
                columns.append(variable)
                values.append(value)
            ends.append(len(columns))
            limits.append(limit)

        # What is neither decided about nor follows such a value is always there.
        leader = {v: v for v in self.values} | self.follows
        led = {leader[v] for v in problem.residuals if v in leader}
        for v in sorted(led, key=lambda v: self.x[v]):
            own = problem.segment_of[problem.producer[v]]
            there = [(self.x[v], -1.0), (self.z[problem.producer[v]], -1.0)]
            row([*there, *self._restored(v, own)], -1.0)
        for index, z in self.z.items():
            read = [u for u in eqns[index].invars if isinstance(u, Var)]
            for u in dict.fromkeys(leader[u] for u in read if u in leader):
                terms = [(z, 1.0), (self.x[u], -1.0)]
                terms += self._restored(u, problem.segment_of[index])
                source = problem.producer[u]
                if problem.segment_of[source] == problem.segment_of[index]:
                    terms.append((self.z[source], -1.0))
                row(terms, 0.0)
        kept: list[list[tuple[int, float]]] = [[] for _ in range(problem.segments)]
        local: list[list[tuple[int, int, float, bool, int]]] = [[] for _ in range(problem.segments)]
        for v in self.values:
            k = problem.segment_of[problem.producer[v]]
            size = self.bytes[v] / _MIB
            kept[k].append((self.x[v], size))
            stored = v in problem.stored and problem.view.root[v] is v
            again = self.z[problem.producer[v]]
            local[k].append((self.x[v], again, size, stored, problem.last_read(v)))
        always = [0.0] * problem.segments
        small: list[list[tuple[float, int]]] = [[] for _ in range(problem.segments)]
        for v in self.small:
            k, size = problem.segment_of[problem.producer[v]], self.bytes[v] / _MIB
            always[k] += size
            small[k].append((size, problem.last_read(v)))
        # Brought back for each segment from any shelf, from the host, on the way; leaving for it.
        back: list[list[tuple[Var, int, float]]] = [[] for _ in range(problem.segments)]
        fetched: list[list[tuple[int, float]]] = [[] for _ in range(problem.segments)]
        coming: list[list[tuple[int, float]]] = [[] for _ in range(problem.segments)]
        leaving: list[list[tuple[int, float]]] = [[] for _ in range(problem.segments)]
        for (v, shelf), put in self.s.items():
            k, size = problem.segment_of[problem.producer[v]], self.bytes[v] / _MIB
            if shelf.host:
                leaving[k].append((put, size))
            else:
                kept[k].append((put, shelf.device_bytes(v.aval) / _MIB))
        for (v, shelf, k), restored in self.r.items():
            size = self.bytes[v] / _MIB
            row([(restored, 1.0), (self.s[v, shelf], -1.0)], 0.0)
            back[k].append((v, restored, size))
            if shelf.host:
                fetched[k].append((restored, size))
                for other in range(k + 1, k + problem.ahead[k] + 1):
                    coming[other].append((restored, size))
        for k in range(problem.segments):
            before = [(self.m[k - 1], 1.0)] if k else []
            row([*before, *kept[k], (self.m[k], -1.0)], -always[k])
        slack = self.size - 1
        for k in range(problem.segments):
            for window in problem.windows[k]:
                first = window is problem.windows[k][0]
                terms = [(self.m[k], 1.0), (slack, -1.0), *coming[k]]
                for v, restored, size in back[k]:
                    own = problem.segment_of[problem.producer[v]] == k
                    if first or (own and problem.last_read(v) >= window.start):
                        terms.append((restored, size))
                for x, again, size, stored, last in local[k]:
                    if last >= window.start:
                        if stored:
                            terms.append((again, size))
                    elif not first:
                        terms.append((x, -size))
                    elif stored:
                        row([(again, size), (self.t[k], -1.0)], 0.0)
                if first:
                    terms.append((self.t[k], 1.0))
                gone = 0.0 if first else sum(size for size, last in small[k] if last < window.start)
                row(terms, gone - window.base / _MIB)
        for k in range(1, problem.segments):
            terms = [(self.m[k - 1], 1.0), (slack, -1.0), (self.queue[k - 1], 1.0)]
            row(terms, -problem.forward_base[k] / _MIB)
        for terms, limit in self._link_rows(leaving, fetched):
            row(terms, limit)
        matrix: Any = csr_array((values, columns, ends), shape=(len(limits), self.size))
        matrix.sum_duplicates()
        below: Any = np.array(limits)
        return LinearConstraint(matrix, -np.inf, below)

    def _link_rows(
        self, leaving: list[list[tuple[int, float]]], fetched: list[list[tuple[int, float]]]
    ) -> Iterator[tuple[list[tuple[int, float]], float]]:
        """What goes over the link to the host, in MiB, against the time that there is for it."""
        problem = self.problem
        if not any(leaving):
            return
        hidden = [problem.hidden_bytes(t) / _MIB for t in problem.forward_seconds]
        for k in range(problem.segments):
            before = [(self.queue[k - 1], 1.0)] if k else []
            moved = hidden[k] if k else 0.0
            yield [*before, *leaving[k], (self.queue[k], -1.0)], moved
            yield [*leaving[k], (self.queue[k], -1.0)], 0.0
        microsecond = problem.device.host_link / _MIB * 1e-6
        yield [(self.queue[-1], 1.0), (self.stuck, -microsecond)], 0.0
        # Whatever is due between two segments has from when the first of it may set out.
        for last in range(problem.segments):
            for first in range(last + 1):
                reach = problem.backward_seconds[first + 1 : last + problem.ahead[last] + 1]
                due = [term for k in range(first, last + 1) for term in fetched[k]]
                waits = [(self.late[k], -microsecond) for k in range(first, last + 1)]
                if fetched[first] and fetched[last]:
                    yield [*due, *waits], problem.hidden_bytes(sum(reach)) / _MIB

    def bounds(self, budget: float) -> tuple[np.ndarray, np.ndarray]:
        """0 <= x, z <= 1; equations with effects never run again."""
        lower, upper = np.zeros(self.size), np.ones(self.size)
        upper[self.decided :] = np.inf
        upper[-1] = budget / _MIB
        for index, z in self.z.items():
            if not self.problem.may_recompute(index):
                upper[z] = 0.0
        return lower, upper

    def relaxed(self, budget: float) -> float:
        """The least cost in seconds when values may be kept in part; infinite if none fits."""
        result = self._minimize(self.cost(budget), budget)
        return np.inf if result.x is None else float(result.fun) * 1e-6

    def least(self) -> float:
        """The smallest budget in bytes that the relaxed problem has a solution for."""
        cost = np.zeros(self.size)
        cost[-1] = 1.0
        result = self._minimize(cost, np.inf)
        return np.inf if result.x is None else float(result.x[-1]) * _MIB

    def cost(self, budget: float) -> np.ndarray:
        """Microseconds of running equations again; of equally cheap decisions, that with least."""
        cost = np.zeros(self.size)
        for index, z in self.z.items():
            cost[z] = self.problem.seconds[index] * 1e6
        total = cost.sum() or 1.0
        for v, x in self.x.items():
            size = self.bytes[v]
            cost[x] = 1e-6 * total * size / max(budget, 1.0)
            if v not in self.problem.stored:
                # A value that would be fused is written for being kept.
                cost[x] += size / self.problem.device.bandwidth * 1e6
        traffic = 1e6 / self.problem.device.bandwidth
        for (v, shelf), put in self.s.items():
            # The host's copy is one read; packing reads twice and writes the packed value.
            size, waiting = self.bytes[v], shelf.device_bytes(v.aval)
            cost[put] = (size if shelf.host else 2 * size + waiting) * traffic
        for (v, shelf, _), restored in self.r.items():
            cost[restored] = (self.bytes[v] + shelf.device_bytes(v.aval)) * traffic
        cost[[*self.late, self.stuck]] = 1.0
        return cost

    def solve(self, budget: float, time_limit: float = 5.0) -> Decision | None:
        """The cheapest decision whose temporaries fit `budget` bytes, to one percent."""
        problem = self.problem
        integrality = np.ones(self.size)
        integrality[self.decided :] = 0
        options = {"mip_rel_gap": 0.01, "time_limit": time_limit}
        result = self._minimize(self.cost(budget), budget, integrality, options)
        if result.x is None:
            return None
        chosen = result.x > 0.5
        saved = frozenset((*self.small, *(v for v, x in self.x.items() if chosen[x])))
        restored = frozenset((v, k) for (v, _, k), r in self.r.items() if chosen[r])
        wanted = {v for v, _ in restored}
        shelved = {v: shelf for (v, shelf), s in self.s.items() if chosen[s] and v in wanted}
        bound = result.mip_dual_bound if result.mip_dual_bound is not None else 0.0
        return Decision(
            problem,
            saved,
            shelved,
            restored,
            float(result.fun) * 1e-6,
            max(0.0, float(bound)) * 1e-6,
        )

    def _minimize(
        self,
        cost: np.ndarray,
        budget: float,
        integrality: np.ndarray | None = None,
        options: dict[str, Any] | None = None,
    ) -> Any:
        lower, upper = self.bounds(budget)
        return milp(
            cost,
            integrality=integrality,
            bounds=Bounds(lower, upper),  # pyright: ignore[reportArgumentType]
            constraints=self.rows,
            options=options,
        )
