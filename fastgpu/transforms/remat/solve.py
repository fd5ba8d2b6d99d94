"""Choose what to keep: least recomputation such that every backward position fits the budget.

A mixed-integer linear program in the spirit of Checkmate (Jain et al., MLSys 2020) and MONeT
(Shah et al., ICLR 2021), on values instead of layers. Its memory rows are running sums, so that the
matrix stays sparse; `scipy.optimize.milp` (HiGHS) solves it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from fastgpu.ir.analysis import aval_bytes
from fastgpu.ir.compat import Var
from fastgpu.transforms.remat.problem import Problem

_MIB = 2**20


@dataclass(frozen=True)
class Decision:
    """What is kept, and which forward equations run again, for one problem.

    `seconds` is the price of it, `bound` the least that any decision could cost: what the solver
    proved.
    """

    problem: Problem
    saved: frozenset[Var]
    again: frozenset[int]
    seconds: float
    bound: float

    @property
    def gap(self) -> float:
        """How far the decision may be from the best, as a fraction of its price."""
        return max(0.0, self.seconds - self.bound) / self.seconds if self.seconds > 0 else 0.0


class Solver:
    """The linear program of one problem, for any budget.

    Variables: x (kept) for each value, z (run again) for each equation, m (bytes kept so far)
    and t (the largest value on the way to what is computed again) for each segment, and the budget.
    Inequalities are rows `a @ variables <= b`.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.x: dict[Var, int] = {}
        self.z: dict[int, int] = {}
        self._needed()
        self.decided = len(self.x) + len(self.z)
        self.m = [self.decided + k for k in range(problem.segments)]
        self.t = [self.decided + problem.segments + k for k in range(problem.segments)]
        self.size = self.decided + 2 * problem.segments + 1  # the last one is the budget

    def _needed(self) -> None:
        """Only what residuals are computed from takes part."""
        problem = self.problem
        self.values = sorted(problem.needed, key=lambda v: problem.producer[v])
        for v in self.values:
            self.x[v] = len(self.x)
        count = len(self.x)
        for index in sorted({problem.producer[v] for v in self.values}):
            self.z[index] = count + len(self.z)

    @cached_property
    def rows(self) -> LinearConstraint:
        """All inequalities; the budget is a variable, of which `bounds` knows the size."""
        problem = self.problem
        eqns = problem.joint.forward.eqns
        entries: list[tuple[int, int, float]] = []
        limits: list[float] = []

        def row(terms: list[tuple[int, float]], limit: float) -> None:
            entries.extend((len(limits), variable, value) for variable, value in terms)
            limits.append(limit)

        for v in problem.residuals:
            row([(self.x[v], -1.0), (self.z[problem.producer[v]], -1.0)], -1.0)
        for index, z in self.z.items():
            for u in {u for u in eqns[index].invars if isinstance(u, Var)}:
                if u not in self.x:
                    continue  # an input: always there
                terms = [(z, 1.0), (self.x[u], -1.0)]
                source = problem.producer[u]
                if problem.segment_of[source] == problem.segment_of[index]:
                    terms.append((self.z[source], -1.0))
                row(terms, 0.0)
        kept: list[list[tuple[int, float]]] = [[] for _ in range(problem.segments)]
        local: list[list[tuple[Var, float]]] = [[] for _ in range(problem.segments)]
        for v in self.values:
            k = problem.segment_of[problem.producer[v]]
            size = aval_bytes(v.aval) / _MIB
            kept[k].append((self.x[v], size))
            local[k].append((v, size))
        for k in range(problem.segments):
            before = [(self.m[k - 1], 1.0)] if k else []
            row([*before, *kept[k], (self.m[k], -1.0)], 0.0)
        slack = self.size - 1
        for k in range(problem.segments):
            for window in problem.windows[k]:
                first = window is problem.windows[k][0]
                terms = [(self.m[k], 1.0), (slack, -1.0)]
                for v, size in local[k]:
                    again = self.z[problem.producer[v]]
                    stored = v in problem.stored and problem.view.root[v] is v
                    if problem.last_read(v) >= window.start:
                        if stored:
                            terms.append((again, size))
                    elif not first:
                        terms.append((self.x[v], -size))
                    elif stored:
                        row([(again, size), (self.t[k], -1.0)], 0.0)
                if first:
                    terms.append((self.t[k], 1.0))
                row(terms, -window.base / _MIB)
        for k in range(1, problem.segments):
            row([(self.m[k - 1], 1.0), (slack, -1.0)], -problem.forward_base[k] / _MIB)
        matrix: Any = _sparse(entries, len(limits), self.size)
        below: Any = np.array(limits)
        return LinearConstraint(matrix, -np.inf, below)

    def bounds(self, budget: float) -> tuple[np.ndarray, np.ndarray]:
        """0 <= x, z <= 1; small values are kept, equations with effects never run again."""
        lower, upper = np.zeros(self.size), np.ones(self.size)
        upper[self.decided :] = np.inf
        upper[-1] = budget / _MIB
        for v, x in self.x.items():
            index = self.problem.producer[v]
            if aval_bytes(v.aval) <= self.problem.small:
                lower[x] = 1.0
            if not self.problem.may_recompute(index):
                upper[self.z[index]] = 0.0
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
            cost[x] = 1e-6 * total * aval_bytes(v.aval) / max(budget, 1.0)
            if v not in self.problem.stored and aval_bytes(v.aval) > self.problem.small:
                # A value that would be fused is written for being kept.
                cost[x] += aval_bytes(v.aval) / self.problem.device.bandwidth * 1e6
        return cost

    def solve(self, budget: float, time_limit: float = 5.0) -> Decision | None:
        """The cheapest decision whose temporaries fit `budget` bytes, to half a percent."""
        problem = self.problem
        integrality = np.ones(self.size)
        integrality[self.decided :] = 0
        options = {"mip_rel_gap": 0.005, "time_limit": time_limit}
        result = self._minimize(self.cost(budget), budget, integrality, options)
        if result.x is None:
            return None
        chosen = result.x > 0.5
        saved = frozenset(v for v, x in self.x.items() if chosen[x])
        again = frozenset(index for index, z in self.z.items() if chosen[z])
        bound = result.mip_dual_bound if result.mip_dual_bound is not None else 0.0
        return Decision(
            problem,
            saved,
            again,
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


def _sparse(entries: list[tuple[int, int, float]], rows: int, columns: int) -> csr_array:
    if not entries:
        return csr_array((rows, columns))
    row, column, value = zip(*entries, strict=True)
    return csr_array((value, (row, column)), shape=(rows, columns))
