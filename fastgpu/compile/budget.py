"""Close the loop: plan, compile, read the compiler's own peak, correct, at most four times."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastgpu.compile.live import live_at_peak
from fastgpu.compile.memory import MemoryReport, memory_report, return_freed_memory
from fastgpu.errors import BudgetError
from fastgpu.hardware import parse_budget, show_bytes
from fastgpu.ir.compat import ClosedJaxpr
from fastgpu.transforms.remat.decide import Modelled, Planner
from fastgpu.transforms.remat.shelves import Shelf

# Compiles everything around a joint program.
Compile = Callable[[ClosedJaxpr], Any]
MOST_COMPILES = 4
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# A plan this close to its budget is not worth another compile.
_CLOSE = 0.96
# The part of a miss that the next attempt is expected to miss by.
_AGAIN = 0.3
# Another version is planned if its step may take less than this part of the best one's.
_WORTHWHILE = 0.999
# A plan that costs no more than this part of the step is taken without looking for a cheaper one.
_CHEAP = 0.01


@dataclass(frozen=True)
class Version:
    """One way to write the program; `changes` says what is not as the user wrote it."""

    planner: Planner
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attempt:
    """One compiled program: what the model predicted for it, and what the compiler said.

    `version` is the one of which `modelled` is a plan; `None` where nothing was to be planned. Of
    `accumulate_steps` microbatches, the program computes one.
    """

    modelled: Modelled
    predicted_bytes: float | None
    memory: MemoryReport
    collectives: dict[str, int] = field(default_factory=dict)
    version: Version | None = None
    accumulate_steps: int = 1

    @property
    def peak(self) -> int:
        """The compiler's peak in bytes."""
        return self.memory.peak_bytes

    @property
    def shelves(self) -> set[Shelf]:
        """Where values of the plan wait."""
        decision = self.modelled.decision
        return set() if decision is None else set(decision.shelved.values())


# A plan, its version, and the attempt by which the model is corrected.
_Planned = tuple[Version, Modelled, Attempt]


def _smaller_arguments(least: Attempt, budget: int) -> str:
    resident = least.memory.argument_bytes
    return (
        f"give smaller arguments (they take {show_bytes(resident)}); half the batch halves what "
        f"scales with it of {show_bytes(least.memory.temp_bytes)} temporaries"
    )


@dataclass
class Search:
    """What was compiled for one program and target; a later budget starts from what it found.

    A smaller budget never gets a larger peak than a larger one did: every attempt and every answer
    is kept, and a new answer lies between those for its neighbours. `alternatives` are other
    versions of the program; they are made when `planner` does not meet a budget at next to no cost.
    The planner sees one of `accumulate_steps` microbatches, `compile` compiles them all.
    `default_budget` holds when none is asked for. `ways_out(attempt, budget)` says what would need
    less than `attempt`, the least.
    """

    planner: Planner
    compile: Compile
    devices: int = 1
    alternatives: Callable[[], Iterable[Version]] = tuple
    accumulate_steps: int = 1
    default_budget: int | None = None
    ways_out: Callable[[Attempt, int], str] = _smaller_arguments
    attempts: list[Attempt] = field(default_factory=list)
    answers: dict[int, Attempt] = field(default_factory=dict)
    planning_seconds: float = 0.0

    @property
    def compiles(self) -> int:
        """How many programs were compiled."""
        return len(self.attempts)

    @property
    def unconstrained(self) -> Attempt:
        """The program that keeps everything, compiled once."""
        if not self.attempts:
            self._try(self._original, self.planner.unconstrained, None)
        return self.attempts[0]

    @cached_property
    def _original(self) -> Version:
        return Version(self.planner)

    @cached_property
    def _others(self) -> list[Version]:
        """The alternatives, made once."""
        return list(self.alternatives())

    def bytes_of(self, budget: int | float | str) -> int:
        """A budget in bytes, as `parse_budget` reads it."""
        return parse_budget(budget, lambda: self.unconstrained.peak)

    def within(self, budget: int | float | str) -> Attempt:
        """The cheapest attempt whose compiled peak is at most `budget`.

        Raises `BudgetError` when none is found within `MOST_COMPILES` compilations and one more, of
        what needs least.
        """
        budget = self.bytes_of(budget)
        if budget not in self.answers:
            self.answers[budget] = self._search(budget)
        return self.answers[budget]

    def _search(self, budget: int) -> Attempt:
        first = self.unconstrained
        if first.peak <= budget:
            return first
        start = len(self.attempts)
        aim = 0.995
        while len(self.attempts) - start < MOST_COMPILES - 1:
            known = self._cheapest(budget)
            if known is not None and known.peak >= _CLOSE * budget:
                break
            planned = self._plan(aim * budget, start, least=known is None)
            if planned is None:
                break
            version, modelled, anchor = planned
            if known is not None and modelled.seconds >= known.modelled.seconds:
                break
            if any(a.modelled.peak == modelled.peak for a in self.attempts):
                aim -= 0.02
                if aim < 0.9:
                    break
                continue
            self._try(version, modelled, self._predict(anchor, modelled))
        best = self._cheapest(budget)
        if best is None:
            # Before it is said that nothing fits, what needs least is tried.
            version, modelled, anchor = self._least(budget, start)
            if all(a.modelled.peak != modelled.peak for a in self.attempts):
                self._try(version, modelled, self._predict(anchor, modelled))
                best = self._cheapest(budget)
        if best is None:
            raise self.infeasible(budget)
        return best

    def _cheapest(self, budget: int) -> Attempt | None:
        above = [a.peak for asked, a in self.answers.items() if asked >= budget]
        below = [a.peak for asked, a in self.answers.items() if asked <= budget]
        low, high = max(below, default=0), min([budget, *above])
        fitting = [a for a in self.attempts if low <= a.peak <= high]
        return min(fitting, key=lambda a: (a.modelled.seconds, a.peak), default=None)

    @property
    def scale(self) -> float:
        """Compiled bytes per modelled byte: a sharded program holds a part on each device."""
        first = self.unconstrained
        if self.devices == 1 or not first.modelled.peak:
            return 1.0
        return first.memory.temp_bytes / first.modelled.peak

    def _plan(self, budget: float, start: int, least: bool) -> _Planned | None:
        """The cheapest plan for `budget` bytes; or, if `least`, that with the smallest peak."""
        began = time.perf_counter()
        best = self._exact_if_cheap(budget, start) or self._cheapest_version(budget, start)
        if best is None and least:
            best = self._least(budget, start)
        self.planning_seconds += time.perf_counter() - began
        return best

    def _least(self, budget: float, start: int) -> _Planned:
        """The plan with the smallest peak of all versions."""
        plans = []
        for version in (self._original, *self._others):
            anchor, _ = self._allowed(version, budget, start)
            plans.append((version, version.planner.least(), anchor))
        return min(plans, key=lambda plan: self._predict(plan[2], plan[1]))

    def expected_seconds(self, modelled_bytes: float) -> float:
        """About what the cheapest plan of `modelled_bytes` takes; infinite if none is in sight."""
        began = time.perf_counter()
        expected = self.planner.expected_seconds(modelled_bytes)
        if expected > self._cheap_seconds:
            others = (v.planner.expected_seconds(modelled_bytes) for v in self._others)
            expected = min([expected, *others])
        self.planning_seconds += time.perf_counter() - began
        return expected

    @property
    def _cheap_seconds(self) -> float:
        return (1 + _CHEAP) * self.planner.unconstrained.seconds

    def _exact_if_cheap(self, budget: float, start: int) -> _Planned | None:
        """A plan of the program as it is written, if it costs next to nothing."""
        _, allowed = self._allowed(self._original, budget, start)
        if self.planner.expected_seconds(allowed) > self._cheap_seconds:
            return None
        found = self._decide(self._original, budget, start, thorough=False)
        return None if found is None or found[1].seconds > self._cheap_seconds else found

    def _cheapest_version(self, budget: float, start: int) -> _Planned | None:
        """The cheapest plan of any version that was found."""
        expected = []
        for version in (self._original, *self._others):
            _, allowed = self._allowed(version, budget, start)
            expected.append((version.planner.expected_seconds(allowed), version))
        expected.sort(key=lambda pair: pair[0])
        for thorough in (False, True):
            best = None
            for seconds, version in expected:
                if best is not None and seconds >= _WORTHWHILE * best[1].seconds:
                    break
                found = self._decide(version, budget, start, thorough)
                if found is not None and (best is None or found[1].seconds < best[1].seconds):
                    best = found
            if best is not None:
                return best
        return None

    def _decide(
        self, version: Version, budget: float, start: int, thorough: bool
    ) -> _Planned | None:
        """The decision for `budget` bytes if the model is off by as much as for the anchor."""
        anchor, allowed = self._allowed(version, budget, start)
        whole = version.planner.unconstrained
        if whole.peak <= allowed:
            return version, whole, anchor
        modelled = version.planner.decide(allowed, thorough)
        return None if modelled is None else (version, modelled, anchor)

    def _allowed(self, version: Version, budget: float, start: int) -> tuple[Attempt, float]:
        """What corrects the model, and the modelled bytes for `budget`.

        What was just missed is missed again by a part of that.
        """
        anchor = self._anchor(version, budget, start)
        tried = any(a is anchor for a in self.attempts[start:])
        aim = budget - _AGAIN * max(0.0, anchor.peak - budget) * tried
        return anchor, anchor.modelled.peak + (aim - anchor.peak) / self.scale

    def _anchor(self, version: Version, budget: float, start: int) -> Attempt:
        """The attempt that tells most about the next one: of the same version, recent, near."""
        same = [a for a in self.attempts[start:] if a.version is version]
        if same:
            return same[-1]
        known = [a for a in self.attempts if a.version is version] or [
            a for a in self.attempts if a.version is self._original
        ]
        if len(self.attempts) - start >= 2:
            # Perhaps it is the shelves that the model is wrong about.
            known = [a for a in known if a.shelves <= set(version.planner.shelves)]
        return min(known, key=lambda a: abs(a.peak - budget))

    def _predict(self, anchor: Attempt, modelled: Modelled) -> float:
        return anchor.peak + (modelled.peak - anchor.modelled.peak) * self.scale

    def _try(self, version: Version, modelled: Modelled, predicted: float | None) -> None:
        compiled = self.compile(modelled.program)
        collectives = count_collectives(compiled.as_text()) if self.devices > 1 else {}
        memory = memory_report(compiled)
        steps = self.accumulate_steps
        self.attempts.append(Attempt(modelled, predicted, memory, collectives, version, steps))
        del compiled
        return_freed_memory()

    def infeasible(self, budget: int) -> BudgetError:
        """The error that says what was found for `budget`."""
        least = min(self.attempts, key=lambda a: a.peak)
        memory = least.memory
        filling = [
            f"{show_bytes(value.bytes)} {' '.join(str(value).split())}"
            for value in live_at_peak(least.modelled)[:3]
        ]
        resident = memory.argument_bytes + memory.output_bytes - memory.alias_bytes
        return BudgetError(
            f"no plan fits {show_bytes(budget)}",
            expected=f"a budget of at least {show_bytes(least.peak)}, the smallest peak found",
            got=f"{show_bytes(budget)}; of the smallest peak, {show_bytes(resident)} are arguments "
            f"and results (parameters, optimizer state, batch), {show_bytes(memory.temp_bytes)} "
            f"temporaries, most of them {'; '.join(filling)}",
            fix=self.ways_out(least, budget),
            least_bytes=least.peak,
        )


def count_collectives(program_text: str) -> dict[str, int]:
    """How many collective operations of each kind a compiled program has.

    >>> count_collectives("%x = f32[8] all-reduce(%y), %z = f32[8] all-gather-start(%x)")
    {'all-gather': 1, 'all-reduce': 1}
    """
    calls = re.findall(r"\b([a-z]+(?:-[a-z]+)*?)(?:-start)?\(", program_text)
    found = Counter(name for name in calls if name in _COLLECTIVES)
    return {name: found[name] for name in _COLLECTIVES if found[name]}
