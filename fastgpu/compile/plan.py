"""`plan`: does it fit, what fills the memory, and what does making it fit cost?"""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax

from fastgpu.compile.budget import (
    Attempt,
    Search,
    count_collectives,
)
from fastgpu.compile.counts import CountSearch
from fastgpu.compile.deviceless import compile_for, plain_shape
from fastgpu.compile.live import LiveValue, live_at_peak
from fastgpu.compile.memory import MemoryReport, memory_report
from fastgpu.errors import ConfigurationError, require
from fastgpu.hardware import Device, Target, parse_target, resolve_target, show_bytes
from fastgpu.ir.analysis import aval_bytes
from fastgpu.ir.compat import ClosedJaxpr, Var, source_line
from fastgpu.ir.cost import program_cost
from fastgpu.transforms.inline import inline_calls
from fastgpu.transforms.remat import Modelled, modelled

# Values listed in a report; all of them are in the JSON.
_SHOWN = 12


_WAITS = {"offload": "in the host's memory", "int8": "as int8", "bfloat16": "as bfloat16"}


@dataclass(frozen=True)
class ResidualDecision:
    """What becomes of one value that the backward half reads, or is computed again from.

    `decision` is "keep", "recompute", "offload" (it waits in the host's memory), "int8" or
    "bfloat16"; `seconds` is what computing it again costs.
    """

    primitive: str
    shape: tuple[int, ...]
    dtype: str
    source: str
    bytes: int
    decision: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What `plan` found. Bytes are on one device.

    `memory` is the compiler's; `timeline` the model's temporaries while each equation runs,
    `timeline_before` the same without a budget. `predicted_peak_bytes` is what the model expected
    before the last compilation. `gap` bounds how far the recomputation's price may be above the
    least possible for this cut of the program, as a fraction. `changes` names what runs in
    another shape: loops unrolled or in chunks, softmaxes, rows of a loss. With more than one of
    `accumulate_steps`, timelines and residuals are those of one microbatch, seconds those of the
    whole step.
    """

    target: str
    memory: MemoryReport
    budget_bytes: int
    unconstrained_peak_bytes: int
    predicted_peak_bytes: int
    timeline: list[int]
    timeline_before: list[int]
    live_at_peak: list[LiveValue]
    residuals: list[ResidualDecision]
    recompute_flops_fraction: float
    predicted_step_seconds: float
    unconstrained_step_seconds: float
    gap: float
    compiles: int
    planning_seconds: float
    seconds: float
    collectives: dict[str, int] = field(default_factory=dict)
    accumulate_steps: int = 1
    changes: list[str] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        """The compiler's peak: argument + output - alias + temp + code."""
        return self.memory.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget (without one, within the device's memory)."""
        return self.peak_bytes <= self.budget_bytes

    @property
    def extra_step_cost(self) -> float:
        """The part by which recomputation lengthens the predicted step."""
        before = self.unconstrained_step_seconds
        return self.predicted_step_seconds / before - 1 if before else 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything, as a JSON-ready dict."""
        return {
            **asdict(self),
            "memory": self.memory.to_json(),
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "extra_step_cost": self.extra_step_cost,
        }

    def save(self, path: str | Path) -> None:
        """Write the plan: `.json`, or a picture of the timelines (`.png`, `.svg`, `.pdf`).

        Raises `ConfigurationError` for another suffix, `MissingExtraError` without matplotlib.
        """
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps(self.to_json(), indent=1))
        elif path.suffix in (".png", ".svg", ".pdf"):
            self._draw(path)
        else:
            raise ConfigurationError(
                f"{path.name!r} is no kind of file that a plan is saved as",
                expected="a name that ends in .json, .png, .svg or .pdf",
                got=repr(path.suffix),
            )

    def _draw(self, path: Path) -> None:
        require("matplotlib", "plan")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4))
        axes = figure.subplots()
        for label, line in (("without a budget", self.timeline_before), ("plan", self.timeline)):
            # Programs differ in length: both are drawn over their own.
            steps = [index / max(1, len(line) - 1) for index in range(len(line))]
            axes.plot(steps, [value / 2**30 for value in line], label=label)
        axes.set_xlabel("part of the program")
        axes.set_ylabel("temporaries, GiB (model)")
        axes.set_title(f"{self.target}: peak {show_bytes(self.peak_bytes)}")
        axes.legend()
        figure.savefig(path)

    def __str__(self) -> str:
        memory = self.memory
        sizes = Counter[str]()
        for residual in self.residuals:
            sizes[residual.decision] += residual.bytes
        waiting = "".join(
            f"{show_bytes(size)} {_WAITS[how]}, " for how, size in sizes.items() if how in _WAITS
        )
        lines = [
            f"{self.target}: peak {show_bytes(self.peak_bytes)} of "
            f"{show_bytes(self.budget_bytes)}: {'fits' if self.fits else 'DOES NOT FIT'}",
            f"  arguments {show_bytes(memory.argument_bytes)}, "
            f"results {show_bytes(memory.output_bytes)} "
            f"(of which in place {show_bytes(memory.alias_bytes)}), "
            f"temporaries {show_bytes(memory.temp_bytes)}, code {show_bytes(memory.code_bytes)}",
            f"  without a budget: {show_bytes(self.unconstrained_peak_bytes)}; predicted before "
            f"compiling: {show_bytes(self.predicted_peak_bytes)}",
            f"  for the backward half: {show_bytes(sizes['keep'])} kept, {waiting}"
            f"{show_bytes(sizes['recompute'])} recomputed "
            f"({self.recompute_flops_fraction:.1%} more operations)",
            f"  step, by roofline: {self.predicted_step_seconds * 1e3:.2f} ms "
            f"({self.extra_step_cost:+.1%})",
            f"  {self.compiles} compilations, {self.planning_seconds:.1f} s planning, "
            f"{self.seconds:.1f} s in all",
        ]
        if self.accumulate_steps > 1:
            lines.append(f"  gradients summed over {self.accumulate_steps} microbatches")
        lines += [f"  {change}" for change in self.changes]
        if self.collectives:
            counts = ", ".join(f"{count} {name}" for name, count in self.collectives.items())
            lines.append(f"  collectives: {counts}")
        devices = parse_target(self.target).count
        where = "" if devices == 1 else f", over all {devices} devices"
        peak = show_bytes(max(self.timeline, default=0))
        lines.append(f"  alive at the peak of the model ({peak}{where}):")
        for value in self.live_at_peak[:_SHOWN]:
            lines.append(f"  {show_bytes(value.bytes):>12}  {value}")
        return "\n".join(lines)


def plan(
    fn: Callable[..., Any],
    *args: Any,
    target: str | Device | Target | None = None,
    memory_budget: int | float | str | None = None,
) -> Plan:
    """Compile `fn(*args)` for `target` and say what its memory is made of, and what a budget costs.

    Args:
      fn: a `fastgpu.train_step`, a `fastgpu.value_and_grad`, or any function of pytrees.
      args: arrays or `jax.ShapeDtypeStruct`; nothing is run. For several devices give structs
        with shardings over `fastgpu.compile.absent_devices(target)`, or use `shard_fsdp`.
      target: "cpu", "h100", "h100:8" (devices), "h100:4x8" (hosts x devices); `None` is what JAX
        runs on. A GPU need not be there.
      memory_budget: as for `fastgpu.value_and_grad`; for a step or gradient only, whose own budget
        holds when none is given. Without any, the device's memory is the budget, and nothing is
        recomputed (but `train_step(accumulate_steps="auto")` cuts the batch until it fits).

    Raises `BudgetError` when no plan fits, with the smallest peak found; `ConfigurationError` for
    an unknown target, or a budget for a function in which fastgpu cannot decide;
    `MissingExtraError` without the `plan` extra.

    >>> import jax.numpy as jnp
    >>> report = plan(lambda x: jnp.sum(x @ x), jnp.ones((256, 256)), target="cpu")
    >>> report.fits, report.memory.argument_bytes
    (True, 262144)
    """
    start = time.perf_counter()
    chosen = resolve_target(target if target is not None else getattr(fn, "target", None))
    if not hasattr(fn, "search"):
        if memory_budget is not None:
            raise ConfigurationError(
                f"a memory budget cannot be met for {getattr(fn, '__name__', fn)!r}: in a plain "
                "function there is no backward half in which to recompute",
                expected="what fastgpu.train_step or fastgpu.value_and_grad returned",
                got=type(fn).__name__,
                fix="leave memory_budget out, or use fastgpu.value_and_grad",
            )
        compiled = compile_for(fn, args, target)
        whole = modelled_whole(fn, args, chosen.device)
        memory = memory_report(compiled)
        collectives = count_collectives(compiled.as_text()) if chosen.count > 1 else {}
        attempt = Attempt(whole, None, memory, collectives)
        return _report(chosen, attempt, attempt, whole, whole, None, start)

    search, build, call_args = fn.search(args, target)  # pyright: ignore[reportAttributeAccessIssue]
    asked = memory_budget, fn.memory_budget, search.default_budget  # pyright: ignore[reportAttributeAccessIssue]
    wanted = next((budget for budget in asked if budget is not None), None)
    first = search.unconstrained
    budget = None if wanted is None else search.bytes_of(wanted)
    attempt = first if budget is None else search.within(budget)
    before = modelled_whole(build(first.modelled.program), call_args, chosen.device)
    after = before
    if attempt is not first:
        after = modelled_whole(build(attempt.modelled.program), call_args, chosen.device)
    return _report(chosen, attempt, first, after, before, search, start, budget)


def modelled_whole(fn: Callable[..., Any], args: Any, device: Device) -> Modelled:
    """The memory model's view of all of `fn(*args)`: the sharded program as if on one device."""
    leaves, tree = jax.tree.flatten(tuple(args))

    def flat(*values: Any) -> list[Any]:
        return jax.tree.leaves(fn(*jax.tree.unflatten(tree, values)))

    return modelled(inline_calls(jax.make_jaxpr(flat)(*map(plain_shape, leaves))), device)


def _report(
    target: Target,
    attempt: Attempt,
    first: Attempt,
    after: Modelled,
    before: Modelled,
    search: Search | CountSearch | None,
    start: float,
    budget: int | None = None,
) -> Plan:
    decision = attempt.modelled.decision
    # Of a loop over microbatches, what is inside says more than one equation of the step does.
    shown, shown_before = (
        one if tried.accumulate_steps == 1 else tried.modelled
        for one, tried in ((after, attempt), (before, first))
    )
    return Plan(
        target=str(target),
        memory=attempt.memory,
        budget_bytes=budget if budget is not None else target.device.memory_bytes,
        unconstrained_peak_bytes=first.peak,
        predicted_peak_bytes=int(attempt.predicted_bytes or attempt.peak),
        timeline=shown.timeline,
        timeline_before=shown_before.timeline,
        live_at_peak=live_at_peak(shown),
        residuals=_decisions(attempt),
        recompute_flops_fraction=_recomputed(first, attempt, before.program),
        predicted_step_seconds=after.seconds / target.count,
        unconstrained_step_seconds=before.seconds / target.count,
        gap=0.0 if decision is None else decision.gap,
        compiles=1 if search is None else search.compiles,
        planning_seconds=0.0 if search is None else search.planning_seconds,
        seconds=time.perf_counter() - start,
        collectives=attempt.collectives,
        accumulate_steps=attempt.accumulate_steps,
        changes=[] if attempt.version is None else list(attempt.version.changes),
    )


def _decisions(attempt: Attempt) -> list[ResidualDecision]:
    if attempt.version is None:
        return []
    decision = attempt.modelled.decision
    joint = attempt.version.planner.joint
    made_by = {v: eqn for eqn in joint.forward.eqns for v in eqn.outvars}
    index_of = {v: i for i, eqn in enumerate(joint.forward.eqns) for v in eqn.outvars}
    rows = []
    # Residuals, and what is kept because residuals are computed again from it.
    values = dict.fromkeys(r for r in joint.residuals if isinstance(r, Var) and r in made_by)
    if decision is not None:
        kept = (*decision.saved, *decision.shelved)
        values.update(dict.fromkeys(sorted(kept, key=lambda v: index_of[v])))
    for v in values:
        eqn, aval = made_by[v], v.aval
        how = "keep" if decision is None else decision.of(v)
        seconds = 0.0
        if decision is not None and how == "recompute":
            seconds = decision.problem.seconds[index_of[v]]
        rows.append(
            ResidualDecision(
                eqn.primitive.name,
                aval.shape,  # pyright: ignore[reportAttributeAccessIssue]
                str(aval.dtype),  # pyright: ignore[reportAttributeAccessIssue]
                source_line(eqn),
                aval_bytes(aval),
                how,
                seconds,
            )
        )
    return rows


def _recomputed(first: Attempt, attempt: Attempt, whole: ClosedJaxpr) -> float:
    """Operations that `attempt` has more than `first`, as a part of those of the whole program."""
    before, after = (
        one.accumulate_steps * program_cost(one.modelled.program).flops for one in (first, attempt)
    )
    return max(0.0, after - before) / max(1.0, program_cost(whole).flops)
