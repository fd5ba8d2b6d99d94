"""How many microbatches, and what to keep in each: chosen together for least predicted time.

Cutting the batch shrinks everything that scales with it and costs little arithmetic, but every
microbatch reads all parameters and adds to all gradients, and holds their sum; recomputation costs
arithmetic. So for each count the planner's model gives seconds and bytes, and only what it likes
best is compiled. The warning: a roofline does not see that small kernels leave a device idle.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastgpu.compile.budget import MOST_COMPILES, Attempt, Search
from fastgpu.errors import BudgetError
from fastgpu.hardware import Device
from fastgpu.transforms.remat import Modelled

# A count is begun with only if this many compilations are not used up, for one budget.
_MOST_COMPILES = 2 * MOST_COMPILES


@dataclass
class CountSearch:
    """A `Search` over several microbatch counts, asked as if it were one.

    `counts` ascend from 1; `search_for(count)` makes the search of one. `gradient_bytes` is what
    the sum of the gradients takes, on one device as on all.
    """

    counts: Sequence[int]
    search_for: Callable[[int], Search]
    device: Device
    gradient_bytes: int
    default_budget: int | None = None
    searches: dict[int, Search] = field(default_factory=dict)
    answers: dict[int, Attempt] = field(default_factory=dict)

    @property
    def compiles(self) -> int:
        """How many programs were compiled, for all counts."""
        return sum(search.compiles for search in self.searches.values())

    @property
    def planning_seconds(self) -> float:
        """The time that decisions took, for all counts."""
        return sum(search.planning_seconds for search in self.searches.values())

    @property
    def unconstrained(self) -> Attempt:
        """The program that takes the batch at once and keeps everything."""
        return self._of(1).unconstrained

    def bytes_of(self, budget: int | float | str) -> int:
        """A budget in bytes, as `parse_budget` reads it."""
        return self._of(1).bytes_of(budget)

    def within(self, budget: int | float | str) -> Attempt:
        """The attempt of least predicted seconds a step whose compiled peak is at most `budget`.

        Raises `BudgetError` with the smallest peak of all counts when none is found. As in
        `Search`, a smaller budget never gets a larger peak.
        """
        budget = self.bytes_of(budget)
        if budget not in self.answers:
            above = [a.peak for asked, a in self.answers.items() if asked >= budget]
            below = [a.peak for asked, a in self.answers.items() if asked <= budget]
            low, high = max(below, default=0), min([budget, *above])
            self._search(budget, high)
            fitting = [a for a in self._attempts() if low <= a.peak <= high]
            self.answers[budget] = min(fitting, key=lambda a: (self._seconds_of(a), a.peak))
        return self.answers[budget]

    def _search(self, asked: int, budget: int) -> None:
        """Compile until the cheapest that fits `budget` is at hand, or raise `BudgetError`."""
        if self.unconstrained.peak <= budget:
            return
        start, best = self.compiles, math.inf
        candidates = self._candidates(budget)
        for seconds, count in candidates:
            if seconds >= best or self.compiles - start >= _MOST_COMPILES:
                break
            best = min(best, self._tried(count, budget))
        untried = {1, self.counts[-1]} - {count for _, count in candidates}
        if math.isinf(best) and untried:
            best = self._tried(min(untried, key=self._least), budget)
        least = min(self._attempts(), key=lambda a: a.peak)
        if least.peak > budget:
            raise self._of(least.accumulate_steps).infeasible(asked)

    def _candidates(self, budget: int) -> list[tuple[float, int]]:
        """Counts that fit by the model, with their seconds a step, least first."""
        plain = (
            self._predicted(count, self._of(count).planner.unconstrained) for count in self.counts
        )
        enough = next((i for i, peak in enumerate(plain) if peak <= budget), len(self.counts) - 1)
        found: list[tuple[float, int]] = []
        # From the fewest that fit without recomputing (more only take longer) down to where
        # recomputing costs more than it saves, or does not help any more.
        for count in reversed(self.counts[: enough + 1]):
            seconds = self._expected(count, budget)
            if math.isinf(seconds):
                break
            found.append((seconds, count))
            if found[-1][0] > min(found)[0]:
                break
        if all(count > 1 for _, count in found):  # the only one without a sum of gradients
            seconds = self._expected(1, budget)
            found += [] if math.isinf(seconds) else [(seconds, 1)]
        return sorted(found)

    def _expected(self, count: int, budget: int) -> float:
        """About the seconds of a step in `count` microbatches; infinite if no plan is in sight."""
        search = self._of(count)
        model = search.planner.unconstrained
        over = max(0.0, self._predicted(count, model) - budget)
        return self._seconds(count, search.expected_seconds(model.peak - over / self._scale))

    def _tried(self, count: int, budget: int) -> float:
        try:
            return self._seconds_of(self._of(count).within(budget))
        except BudgetError:
            return math.inf

    def _of(self, count: int) -> Search:
        if count not in self.searches:
            self.searches[count] = self.search_for(count)
        return self.searches[count]

    def _attempts(self) -> list[Attempt]:
        return [a for search in self.searches.values() for a in search.attempts]

    def _seconds_of(self, attempt: Attempt) -> float:
        return self._seconds(attempt.accumulate_steps, attempt.modelled.seconds)

    def _seconds(self, count: int, seconds: float) -> float:
        """A step of such microbatches, but for the optimizer's update, which all counts share."""
        # Each microbatch's gradients are read, and so is their sum, which is written again.
        adding = 0.0 if count == 1 else 3 * self.gradient_bytes / self.device.bandwidth
        return count * (seconds + adding)

    def _least(self, count: int) -> float:
        return self._predicted(count, self._of(count).planner.least())

    def _predicted(self, count: int, model: Modelled) -> float:
        """The compiled peak, if the model is off by as much as it was for the batch at once."""
        first = self.unconstrained
        summed = 0 if count == 1 else self.gradient_bytes
        return first.peak + (model.peak + summed - first.modelled.peak) * self._scale

    @property
    def _scale(self) -> float:
        return self._of(1).scale
