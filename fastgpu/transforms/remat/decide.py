"""From a budget of temporary bytes to a decision whose modelled peak fits it."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fastgpu.hardware import Device
from fastgpu.ir.compat import ClosedJaxpr
from fastgpu.ir.fusion import Storage, program_seconds, storage, temporary_bytes
from fastgpu.transforms.remat.clipped import masks_of_results
from fastgpu.transforms.remat.joint import Joint, flat_program
from fastgpu.transforms.remat.problem import Cut, Survey, pose, segments, survey
from fastgpu.transforms.remat.rewrite import rematerialized
from fastgpu.transforms.remat.shelves import Shelf
from fastgpu.transforms.remat.solve import Decision, Solver

# Segments that are tried first, as parts of the peak: few segments need much memory at once, many
# need their borders kept.
_DIVISIONS = (3, 6, 10, 14, 20)
# Then neighbours of the best, round by round while one is better; in a long program, where each
# takes a tenth of a second, only the first few, once.
_NEIGHBOURS = (
    {"taper": 0.0},
    {"division": 1.3},
    {"in_order": False},
    {"taper": 0.8},
    {"division": 1 / 1.3},
)
_ROUNDS = 3
_FEW, _MANY_EQUATIONS = 3, 8_000
# Cuts that are solved to integers, in the order of their relaxed cost.
_MOST_TRIED = 6
# Another cut is tried while it may come to less than this part of the price found.
_WORTHWHILE = 0.97
_SMALL = 64 * 1024
# Budgets near the least, in multiples of it.
_SLACKS = (1.02, 1.06, 1.12, 1.2, 1.3)


@dataclass(frozen=True)
class Modelled:
    """A joint program and what the model says of it: temporaries over time, seconds.

    `decision` is `None` for the program that keeps everything. `planning_seconds` is the time that
    the decision took.
    """

    program: ClosedJaxpr
    view: Storage
    timeline: list[int]
    seconds: float
    decision: Decision | None = None
    planning_seconds: float = 0.0

    @property
    def peak(self) -> int:
        """Modelled peak of the temporaries in bytes."""
        return max(self.timeline, default=0)


def modelled(program: ClosedJaxpr, device: Device, decision: Decision | None = None) -> Modelled:
    """Run the model on a program."""
    view = storage(program.jaxpr)
    seconds = program_seconds(view, device)
    return Modelled(program, view, temporary_bytes(view, device.platform), seconds, decision)


class Planner:
    """Decides about one joint program, for any number of budgets.

    >>> import jax, jax.numpy as jnp
    >>> from fastgpu.hardware import device
    >>> from fastgpu.transforms.remat.joint import trace_joint
    >>> def deep(w, x):
    ...     for _ in range(16):
    ...         x = jnp.tanh(x @ w)
    ...     return [jnp.sum(x)], []
    >>> w, x = jnp.ones((64, 64)), jnp.ones((4096, 64))
    >>> planner = Planner(trace_joint(deep, [w], [x]), device("h100"))
    >>> planner.unconstrained.peak > planner.decide(0.6 * planner.unconstrained.peak).peak
    True
    """

    def __init__(self, joint: Joint, device: Device, shelves: tuple[Shelf, ...] = ()) -> None:
        self.joint = masks_of_results(joint)
        self.device, self.shelves = device, shelves
        self.unconstrained = modelled(flat_program(joint), device)
        self._solvers: dict[Cut, Solver] = {}
        self._by_segments: dict[Any, Solver] = {}
        self._ranked: dict[float, list[tuple[float, Solver]]] = {}

    def decide(self, budget: float, thorough: bool = True) -> Modelled | None:
        """The cheapest decision found whose modelled peak is at most `budget` bytes, or `None`.

        When the solver has none, and the search is `thorough`, decisions near its least are tried.
        """
        start = time.perf_counter()
        best: Modelled | None = None
        fitting = 0
        for cost, solver in self._cuts_for(budget)[:_MOST_TRIED]:
            paid = math.inf if best is None else best.seconds - self.unconstrained.seconds
            if fitting == 2 or cost > _WORTHWHILE * paid:
                break
            found = self._fit(solver, budget)
            if found is not None:
                fitting += 1
                if best is None or found.seconds < best.seconds:
                    best = found
        if best is None and not thorough:
            return None
        best = best or self._near_least(budget)
        if best is None:
            return None
        return replace(best, planning_seconds=time.perf_counter() - start)

    def expected_seconds(self, budget: float) -> float:
        """About what the decision for `budget` comes to, quickly; infinite if none is in sight."""
        if self.unconstrained.peak <= budget:
            return self.unconstrained.seconds
        cuts = self._cuts_for(budget)
        return self.unconstrained.seconds + (cuts[0][0] if cuts else math.inf)

    def least(self) -> Modelled:
        """The decision with the lowest modelled peak that was found."""
        start = time.perf_counter()
        frugal = (found for _, _, found in self.frugal)
        best = min([self.unconstrained, *frugal], key=lambda m: m.peak)
        return replace(best, planning_seconds=time.perf_counter() - start)

    @cached_property
    def frugal(self) -> list[tuple[Solver, float, Modelled]]:
        """The best cuts, the least that each can do with, and a decision near that.

        The solver's rows are above the model there, because they add up what is alive one after
        the other; so the decisions come first, and their modelled peaks are looked at afterwards.
        """
        found = []
        for least, solver in self._least_cuts[: _MOST_TRIED // 2]:
            decided = (self._decided(solver, least * slack) for slack in _SLACKS)
            first = next((model for model in decided if model is not None), None)
            if first is not None:
                found.append((solver, least, first))
        return found

    def _near_least(self, budget: float) -> Modelled | None:
        """The cheapest of the decisions near the least memory whose modelled peak fits."""
        fitting = []
        for solver, least, first in self.frugal:
            if first.peak > budget:
                continue
            fitting.append(first)
            # More memory costs less time: the most slack that still fits, by bisection.
            low, high = 0, len(_SLACKS)
            while high - low > 1:
                middle = (low + high) // 2
                model = self._decided(solver, least * _SLACKS[middle])
                if model is not None and model.peak <= budget:
                    fitting.append(model)
                    low = middle
                else:
                    high = middle
        return min(fitting, key=lambda model: model.seconds, default=None)

    def _decided(self, solver: Solver, budget: float) -> Modelled | None:
        """The model of what `solver` decides within `budget`."""
        decision = solver.solve(budget)
        if decision is None:
            return None
        return modelled(rematerialized(decision), self.device, decision)

    def _cuts_for(self, budget: float) -> list[tuple[float, Solver]]:
        if budget not in self._ranked:
            ranked = self._best_cuts(lambda solver: solver.relaxed(budget))
            if not ranked:
                # What is asked for is below what the first cuts can do with; others need less.
                modest = (solver for least, solver in self._least_cuts if least <= budget)
                priced = [(solver.relaxed(budget), solver) for solver in modest]
                ranked = sorted((one for one in priced if math.isfinite(one[0])), key=_value)
            self._ranked[budget] = ranked
        return self._ranked[budget]

    @cached_property
    def _least_cuts(self) -> list[tuple[float, Solver]]:
        return self._best_cuts(lambda solver: solver.least())

    def _best_cuts(self, value: Callable[[Solver], float]) -> list[tuple[float, Solver]]:
        """Solvers of several cuts and their values, lowest first; infinite ones left out."""
        peak = self.unconstrained.peak
        found: dict[Solver, float] = {}

        def worth(cut: Cut) -> float:
            solver = self._solver(cut)
            if solver not in found:
                found[solver] = value(solver)
            return found[solver]

        best = min((Cut(peak / division) for division in _DIVISIONS), key=worth)
        many = len(self.unconstrained.view.jaxpr.eqns) > _MANY_EQUATIONS
        for _ in range(1 if many else _ROUNDS):
            nearest = min(_neighbours(best, _FEW if many else len(_NEIGHBOURS)), key=worth)
            if worth(nearest) >= worth(best):
                break
            best = nearest
        finite = [(cost, solver) for solver, cost in found.items() if math.isfinite(cost)]
        return sorted(finite, key=_value)

    @cached_property
    def _survey(self) -> Survey:
        small = min(_SMALL, self.unconstrained.peak / 2000)
        view = storage(flat_program(self.joint).jaxpr)
        return survey(self.joint, view, self.device, small, self.shelves)

    def _solver(self, cut: Cut) -> Solver:
        if cut not in self._solvers:
            segment_of = segments(self._survey, cut)
            key = tuple(segment_of), cut.in_order
            if key not in self._by_segments:
                self._by_segments[key] = Solver(pose(self._survey, cut, segment_of))
            self._solvers[cut] = self._by_segments[key]
        return self._solvers[cut]

    def _fit(self, solver: Solver, budget: float) -> Modelled | None:
        """Solve with a budget corrected by how far the model's peak is from it."""
        allowed, best = budget, None
        for _ in range(4):
            found = self._decided(solver, allowed)
            if found is None:
                break
            if found.peak <= budget and (best is None or found.seconds < best.seconds):
                best = found
            if 0.97 * budget <= found.peak <= budget:
                break
            allowed += 0.99 * budget - found.peak
        return best


def _value(ranked: tuple[float, Solver]) -> float:
    return ranked[0]


def _neighbours(cut: Cut, count: int) -> Iterator[Cut]:
    """The first `count` ways to cut a little differently."""
    for change in _NEIGHBOURS[:count]:
        settings: dict[str, Any] = dict(change)
        size = cut.segment_bytes / settings.pop("division", 1.0)
        yield replace(cut, segment_bytes=size, **settings)
