"""From a budget of temporary bytes to a decision whose modelled peak fits it."""

import time
from dataclasses import dataclass, replace

from fastgpu.hardware import Device
from fastgpu.ir.compat import ClosedJaxpr
from fastgpu.ir.fusion import Storage, kernel_seconds, storage, temporary_bytes
from fastgpu.transforms.remat.joint import Joint, flat_program
from fastgpu.transforms.remat.problem import pose
from fastgpu.transforms.remat.rewrite import rematerialized
from fastgpu.transforms.remat.solve import Decision, Solver

# Segments of the forward half that are tried: few need much memory at once, many need their
# borders kept.
_DIVISIONS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 20, 25)
_SMALL = 64 * 1024


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
    seconds = sum(kernel_seconds(view, device))
    return Modelled(program, view, temporary_bytes(view), seconds, decision)


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
    >>> planner.unconstrained.peak > planner.decide(planner.unconstrained.peak // 2).peak
    True
    """

    def __init__(self, joint: Joint, device: Device) -> None:
        self.joint, self.device = joint, device
        self.unconstrained = modelled(flat_program(joint), device)
        self._solvers: dict[int, Solver] = {}

    @property
    def solvers(self) -> list[Solver]:
        """The same program cut in several ways, no two with as many segments."""
        peak = self.unconstrained.peak
        small = min(_SMALL, peak / 2000)
        if not self._solvers:
            for division in _DIVISIONS:
                problem = pose(self.joint, self.device, peak / division, small)
                self._solvers.setdefault(problem.segments, Solver(problem))
        return list(self._solvers.values())

    def decide(self, budget: float) -> Modelled | None:
        """The cheapest decision found whose modelled peak is at most `budget` bytes, or `None`."""
        start = time.perf_counter()
        priced = [(solver.relaxed(budget), solver) for solver in self.solvers]
        ranked = sorted(
            ((cost, solver) for cost, solver in priced if cost is not None), key=lambda one: one[0]
        )
        best: Modelled | None = None
        for _, solver in ranked[:2]:
            found = self._fit(solver, budget)
            if found is not None and (best is None or found.seconds < best.seconds):
                best = found
        if best is None:
            return None
        return replace(best, planning_seconds=time.perf_counter() - start)

    def least(self) -> Modelled:
        """The decision with the lowest modelled peak that was found."""
        start = time.perf_counter()
        bounds = sorted(((solver.least(), solver) for solver in self.solvers), key=lambda b: b[0])
        tried = [self.unconstrained]
        for bound, solver in bounds[:2]:
            for slack in (1.01, 1.05, 1.15):
                decision = solver.solve(bound * slack)
                if decision is not None:
                    tried.append(modelled(rematerialized(decision), self.device, decision))
        best = min(tried, key=lambda m: m.peak)
        return replace(best, planning_seconds=time.perf_counter() - start)

    def _fit(self, solver: Solver, budget: float) -> Modelled | None:
        """Solve with a budget corrected by how far the model's peak is from it."""
        allowed, best = budget, None
        for _ in range(4):
            decision = solver.solve(allowed)
            if decision is None:
                break
            found = modelled(rematerialized(decision), self.device, decision)
            if found.peak <= budget and (best is None or found.seconds < best.seconds):
                best = found
            if 0.97 * budget <= found.peak <= budget:
                break
            allowed += 0.99 * budget - found.peak
        return best
