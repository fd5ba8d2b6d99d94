"""Passes as values, run one after the other; what each did can be asked afterwards."""

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fastgpu import ir
from fastgpu.hardware import Device
from fastgpu.ir.compat import ClosedJaxpr


@dataclass(frozen=True)
class Context:
    """What a pass may look at besides the jaxpr: the device that the program is for.

    >>> from fastgpu.hardware import device
    >>> Context(device("h100")).device.platform
    'cuda'
    """

    device: Device


@dataclass(frozen=True)
class Pass:
    """One rewriting step: `run(closed_jaxpr, context)` gives an equivalent closed jaxpr.

    `stage` is "forward" (before differentiation), "joint" (forward and backward in one jaxpr) or
    "step" (a whole training step, update included); in a program without it, a pass does nothing.
    `why` is one line. `platforms` are those on which the pass pays; elsewhere it is left out.
    A pass that is not `exact` rounds by intention: only its types are verified.
    A pass that is not `default` buys one thing for another, and runs for those who name it.

    >>> halve = Pass("nothing", "forward", lambda closed, context: closed, why="an example")
    >>> halve.name
    'nothing'
    """

    name: str
    stage: Literal["forward", "joint", "step"]
    run: Callable[[ClosedJaxpr, Context], ClosedJaxpr]
    why: str
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")
    exact: bool = True
    default: bool = True


@dataclass(frozen=True)
class PassReport:
    """What one pass did: equations, floating-point operations and bytes moved, before and after.

    >>> PassReport("cse", (3, 2), (9.0, 6.0), (36.0, 24.0), 0.01).to_json()["equations"]
    [3, 2]
    """

    name: str
    equations: tuple[int, int]
    flops: tuple[float, float]
    bytes_moved: tuple[float, float]
    seconds: float
    changed: dict[str, int] = field(default_factory=dict)
    # The program that the pass returned.
    program: ClosedJaxpr | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, object]:
        """The report as a JSON-ready dict."""
        return {
            "pass": self.name,
            "equations": list(self.equations),
            "flops": list(self.flops),
            "bytes_moved": list(self.bytes_moved),
            "seconds": self.seconds,
            "changed": self.changed,
        }


@dataclass(frozen=True)
class Ran:
    """A pass that ran: the programs that it was given and returned, and the seconds it took."""

    name: str
    before: ClosedJaxpr
    after: ClosedJaxpr
    seconds: float


def run_passes(
    closed: ClosedJaxpr, passes: Sequence[Pass], context: Context
) -> tuple[ClosedJaxpr, list[Ran]]:
    """Run `passes` in order on `closed`; `report` says what each of them did.

    With `FASTGPU_VERIFY=1` in the environment, types are checked and outputs compared on random
    inputs after every pass; a difference raises `VerificationError` naming the pass.
    """
    verifying = os.environ.get("FASTGPU_VERIFY", "0") not in ("", "0")
    ran = []
    for step in passes:
        start = time.perf_counter()
        rewritten = step.run(closed, context)
        seconds = time.perf_counter() - start
        if verifying:
            check = ir.verify if step.exact else ir.verify_types
            check(closed, rewritten, label=f"pass {step.name!r}")
        ran.append(Ran(step.name, closed, rewritten, seconds))
        closed = rewritten
    return closed, ran


def report(ran: Ran) -> PassReport:
    """What a pass did. It takes about as long as the pass, and is made for those who ask."""
    programs = ran.before, ran.after
    counts = [Counter(_label(eqn) for eqn in ir.walk(closed)) for closed in programs]
    costs = [ir.program_cost(closed) for closed in programs]
    delta = {
        name: counts[1][name] - counts[0][name]
        for name in sorted({*counts[0], *counts[1]})
        if counts[0][name] != counts[1][name]
    }
    return PassReport(
        ran.name,
        (counts[0].total(), counts[1].total()),
        (costs[0].flops, costs[1].flops),
        (costs[0].bytes_moved, costs[1].bytes_moved),
        ran.seconds,
        delta,
        ran.after,
    )


def _label(eqn: ir.JaxprEqn) -> str:
    name, _ = ir.stands_for(eqn)
    return name if eqn.primitive.name == name else f"{name} by {eqn.params['chooser'].name}"
