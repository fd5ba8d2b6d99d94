"""`max_batch`: the largest batch that fits, from a few compilations and without running any.

The peak of a compiled step grows by nearly the same bytes for every example. So two compilations
give a line, the line a size, and a third compilation proves it. The one warning: compilers switch
algorithms with sizes, so a line is a guess, and only a size that was compiled is an answer.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import jax

from fastgpu.compile import Search, memory_report, shape_of
from fastgpu.errors import BudgetError, ConfigurationError
from fastgpu.hardware import Device, Target, parse_budget, resolve_target, show_bytes
from fastgpu.training.microbatch import batch_examples, first_axis_split, resized
from fastgpu.training.state import TrainState
from fastgpu.training.step import TrainStep

_MOST_SIZES = 8
# Sizes this close to each other are not told apart.
_CLOSE = 0.01
# The part of the budget that the line is followed to: XLA's steps are about this high.
_AIM = 0.998
# Of the first guess, which rests on one compilation.
_FARTHEST = 64
_LARGEST_AXIS = 2**31 - 1


@dataclass(frozen=True)
class MaxBatch:
    """The largest batch found, usable as an integer. Bytes are the compiler's, on one device.

    `predicted_peak_bytes` is what the line through the sizes before had said (0 if this was the
    first). With a plan, `peak_bytes` is that of the plan which the step takes at this size.
    `too_large` is the smallest larger size that was compiled and does not fit, if there is one.

    >>> int(MaxBatch(96, 1000, 990, 1024, 3))
    96
    """

    batch_size: int
    peak_bytes: int
    predicted_peak_bytes: int
    budget_bytes: int
    compiles: int
    too_large: int | None = None

    def __index__(self) -> int:
        return self.batch_size

    def __str__(self) -> str:
        return (
            f"batch {self.batch_size}: peak {show_bytes(self.peak_bytes)} of "
            f"{show_bytes(self.budget_bytes)} (predicted "
            f"{show_bytes(self.predicted_peak_bytes)}), {self.compiles} compilations"
            + (f"; {self.too_large} does not fit" if self.too_large else "")
        )


def max_batch(
    step: TrainStep,
    state: TrainState,
    batch: Any,
    memory_budget: int | float | str | None = None,
    target: str | Device | Target | None = None,
) -> MaxBatch:
    """The largest batch with which a step's compiled peak is within a budget; nothing is run.

    Args:
      step: a `fastgpu.train_step`. One that was made with a memory budget may recompute to fit; any
        other is taken as it is. With `accumulate_steps=k` the batch is a multiple of k. Its
        `global_batch` is not looked at.
      state, batch: arrays or `jax.ShapeDtypeStruct`. The batch may be of any size: it says what one
        example is, and the nearer its size is to the answer, the better. Sharded structs stay
        sharded: sizes are multiples of what their first axis is split by.
      memory_budget: bytes, or text such as "16GiB"; by default the step's own, else the memory of
        the target.
      target: as for `fastgpu.plan`; by default the step's, else what JAX runs on.

    Compiles two sizes, predicts by the line through them, and compiles what it predicts, until a
    size fits and one 1% larger is not expected to: three or four compilations, and for a step with
    a plan those of its last search. Above about 3/4 of a GPU's memory XLA recomputes on its own
    account and the peak follows no line; after eight sizes the largest that fits is the answer.

    Raises `BudgetError` when not even the smallest batch fits, with its peak, `ConfigurationError`
    for a budget in percent, or for a step that cuts every batch until it fits.

    >>> import jax.numpy as jnp, optax
    >>> from fastgpu.training import train_step
    >>> def loss_fn(params, model_state, batch, rng):
    ...     hidden = jnp.tanh(batch @ params["w"])
    ...     return jnp.mean((hidden @ params["w"].T) ** 2), (model_state, {})
    >>> tx = optax.sgd(0.1)
    >>> state = TrainState.create({"params": {"w": jnp.ones((64, 256))}}, tx, rng=0)
    >>> found = max_batch(train_step(loss_fn, tx), state, jnp.ones((16, 64)), "4MiB", "cpu")
    >>> 1000 < int(found) < 4000, found.peak_bytes <= found.budget_bytes
    (True, True)
    """
    if step.accumulate_steps == "auto":
        raise ConfigurationError(
            "with accumulate_steps='auto' a step cuts every batch until it fits",
            expected="a step with a fixed number of microbatches",
            got="accumulate_steps='auto'",
            fix="pass train_step(..., accumulate_steps=1) to find the largest microbatch",
        )
    state, batch = jax.tree.map(shape_of, (state, batch))
    target = step.target if target is None else target
    budget = _budget(step, memory_budget, target)
    parts = math.lcm(*map(first_axis_split, jax.tree.leaves(batch)))
    unit = parts * step.accumulate_steps
    sizes = _Sizes(_of_any_size(step), state, batch, target, budget, unit)
    size: int | None = max(unit, batch_examples(batch) // unit * unit)
    while size is not None or not sizes.proven():
        if size is not None:
            sizes.measure(size)
        size = sizes.next()
    best = max(sizes.fitting)
    return MaxBatch(
        best,
        sizes.peaks[best],
        sizes.predicted[best],
        budget,
        sizes.compiles,
        min((size for size in sizes.peaks if size > best), default=None),
    )


@dataclass
class _Sizes:
    """The smallest peak that was compiled for each batch size; sizes are multiples of `unit`."""

    step: TrainStep
    state: TrainState
    batch: Any
    target: Any
    budget: int
    unit: int
    peaks: dict[int, int] = field(default_factory=dict)
    predicted: dict[int, int] = field(default_factory=dict)
    compiles: int = 0

    @property
    def fitting(self) -> list[int]:
        """The sizes that fit."""
        return [size for size, peak in self.peaks.items() if peak <= self.budget]

    def measure(self, size: int) -> None:
        """Compile the step at `size`, or the plan with the least memory."""
        self.predicted[size] = int(self._predict(size))
        if self.step.memory_budget is None:
            compiled = self.step.compile(self.state, resized(self.batch, size), self.target)
        else:
            search = self._search(size)
            compiled = search.compile(search.planner.least().program)
        self.peaks[size] = memory_report(compiled).peak_bytes
        self.compiles += 1

    def proven(self) -> bool:
        """Whether the step itself fits at the largest size; if not, its peak is corrected.

        Raises `BudgetError` when no size is left.
        """
        if not self.fitting:
            raise self._infeasible()
        if self.step.memory_budget is None:
            return True
        size = max(self.fitting)
        search = self._search(size)
        before = search.compiles
        try:
            self.peaks[size] = search.within(self.budget).peak
        except BudgetError as error:
            self.peaks[size] = max(error.least_bytes, self.budget + 1)
        self.compiles += search.compiles - before
        return self.peaks[size] <= self.budget

    def next(self) -> int | None:
        """The size to compile next, or `None` if the largest is known well enough."""
        low = max(self.fitting, default=0)
        over = [size for size in self.peaks if size not in self.fitting and size > low]
        high = min([*over, _LARGEST_AXIS + 1])
        between = self._whole(low + self.unit), self._whole(high - 1)
        if between[0] > between[1] or (low and len(self.peaks) >= _MOST_SIZES):
            return None
        guess = self._follow()
        if len(self.peaks) > 1:
            close = (1 + _CLOSE) * low
            if low and (guess < max(close, low + self.unit) or high <= close):
                return None
        elif guess < self.unit + low:  # one more size, so that there is a line
            guess = 1.05 * low
        if len(self.peaks) > _MOST_SIZES // 2 and over:
            guess = (low + high) / 2  # no line: halve what is left
        return min(max(self._whole(guess), between[0]), between[1])

    def _follow(self) -> float:
        """Where the line through the two sizes nearest to the budget reaches it."""
        size, slope = self._line()
        if slope <= 0:
            return 2.0 * size
        guess = size + (_AIM * self.budget - self.peaks[size]) / slope
        return min(guess, _FARTHEST * max(self.peaks))

    def _predict(self, size: int) -> float:
        if not self.peaks:
            return 0.0
        anchor, slope = self._line()
        return self.peaks[anchor] + slope * (size - anchor)

    def _line(self) -> tuple[int, float]:
        """The size whose peak is nearest to the budget, and the bytes for each example."""
        near = sorted(self.peaks, key=lambda size: abs(self.peaks[size] - self.budget))
        first = near[0]
        if len(near) == 1:
            state = sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(self.state))
            return first, max(self.peaks[first] - state, 0.0) / first
        return first, (self.peaks[first] - self.peaks[near[1]]) / (first - near[1])

    def _whole(self, size: float) -> int:
        return int(size) // self.unit * self.unit

    def _search(self, size: int) -> Search:
        search, _, _ = self.step.search((self.state, resized(self.batch, size)), self.target)
        assert isinstance(search, Search)  # the count is fixed
        return search

    def _infeasible(self) -> BudgetError:
        size = min(self.peaks)
        peak = self.peaks[size]
        state = sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(self.state))
        ways = "keep the optimizer state in 8 bits with fastgpu.optimizers.compressed; or split "
        ways += "state and batch with fastgpu.shard_fsdp"
        if self.step.memory_budget is None:
            ways = (
                f"let the step recompute, train_step(..., memory_budget={self.budget}); or {ways}"
            )
        return BudgetError(
            f"not even a batch of {size} fits {show_bytes(self.budget)}",
            expected=f"a budget of at least {show_bytes(peak)}, the peak at batch {size}",
            got=f"{show_bytes(self.budget)}; {show_bytes(state)} of the peak are the state "
            "(parameters, optimizer state)",
            fix=ways,
            least_bytes=peak,
        )


def _of_any_size(step: TrainStep) -> TrainStep:
    if step.global_batch is None:
        return step
    return TrainStep(
        step.loss_fn,
        step.optimizer,
        step.passes,
        step.target,
        step.donate,
        step.recompile,
        step.memory_budget,
        step.accumulate_steps,
        compress=step.compress,
        precision=step.precision,
    )


def _budget(step: TrainStep, memory_budget: int | float | str | None, target: Any) -> int:
    asked = step.memory_budget if memory_budget is None else memory_budget
    if asked is None:
        return resolve_target(target).device.memory_bytes

    def no_peak() -> int:
        raise ConfigurationError(
            f"a budget of {asked} says nothing about the largest batch: its peak is what is sought",
            expected="bytes, or text such as '16GiB'",
            got=repr(asked),
        )

    return parse_budget(asked, no_peak)


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
