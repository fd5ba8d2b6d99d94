"""How long planning takes without compiling, and how far its decisions are from the best.

    python benchmarks/planning.py --json benchmarks/results/planning.json

Programs are training losses of deep networks on shapes alone; nothing is compiled or run. A value
counts when it is a residual or a residual is computed from it: the solver decides about those.
Every budget gets a planner of its own, so that nothing is found by an earlier one. The time that
JAX needs to trace and differentiate the program is shown beside it.
"""

import argparse
import cProfile
import json
import os
import pstats
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import jax.numpy as jnp

import fastgpu as fgpu
from fastgpu import models
from fastgpu.compile import Gradient
from fastgpu.hardware import device
from fastgpu.transforms.remat import Planner
from fastgpu.transforms.remat.problem import survey

TOKENS, IMAGE = ((8, 256), jnp.int32), ((16, 64, 64, 3), jnp.float32)
GPT = {"width": 256, "heads": 4, "context": 256, "vocab_size": 4096}
# name: model, its settings, input, and the decided values that it is there for
PROGRAMS = {
    "gpt-1k": ("gpt2-small", {**GPT, "depth": 7}, TOKENS, 1_000),
    "resnet-1k": ("resnet50", {"stage_sizes": (2, 3, 3, 2)}, IMAGE, 1_000),
    "gpt-10k": ("gpt2-small", {**GPT, "depth": 74}, TOKENS, 10_000),
    "resnet-10k": ("resnet50", {"stage_sizes": (3, 24, 72, 3)}, IMAGE, 10_000),
}
BUDGETS = (0.7, 0.5, 0.35)
MOST_SECONDS = {1_000: 1.0, 10_000: 10.0}
MOST_GAP = 0.02


def gradient_of(program: str) -> Gradient:
    """The traced forward and backward half of a training loss."""
    name, settings, (shape, dtype), _ = PROGRAMS[program]
    module = models.create(name, **settings)
    x = jax.ShapeDtypeStruct(shape, dtype)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(x.shape, x.dtype)))
    out = jax.eval_shape(module.apply, variables, x)
    batch = {"inputs": x, "labels": jax.ShapeDtypeStruct(out.shape[:-1], jnp.int32)}
    loss = fgpu.supervised_loss(module, "softmax_cross_entropy_with_integer_labels")
    state = {name: tree for name, tree in variables.items() if name != "params"}
    rng = jax.eval_shape(jax.random.key, 0)
    return Gradient(
        lambda params, rest: loss(params, *rest), variables["params"], (state, batch, rng), "h100"
    )


def decided_values(planner: Planner) -> int:
    """Values that take part in a decision."""
    view = planner.unconstrained.view
    return len(survey(planner.joint, view, planner.device, small=1024).needed)


def measure(program: str, budgets: tuple[float, ...]) -> dict:
    start = time.perf_counter()
    joint = gradient_of(program).joint
    traced = time.perf_counter() - start
    values = decided_values(Planner(joint, device("h100")))
    limit = MOST_SECONDS[PROGRAMS[program][3]]
    result = {
        "program": program,
        "values": values,
        "forward_equations": len(joint.forward.eqns),
        "backward_equations": len(joint.backward.eqns),
        "tracing_seconds": traced,
        "limit_seconds": limit,
        "plans": [],
    }
    print(
        f"{program}: {values} values, {len(joint.forward.eqns)} + {len(joint.backward.eqns)} "
        f"equations, traced in {traced:.1f} s; at most {limit:.0f} s",
        flush=True,
    )
    for part in budgets:
        start, processor = time.perf_counter(), time.process_time()
        planner = Planner(joint, device("h100"))
        prepared = time.perf_counter() - start
        budget = part * planner.unconstrained.peak
        found = planner.decide(budget)
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
        row = {
            "budget": part,
            "prepare_seconds": prepared,
            "seconds": seconds,
            "processor_seconds": processor,
        }
        if found is None:
            row |= {"feasible": False, "ok": seconds <= limit}
            print(
                f"  {part:.0%}: no decision fits, {seconds:.2f} s (processor {processor:.2f} s)",
                flush=True,
            )
        else:
            gap = 0.0 if found.decision is None else found.decision.gap
            extra = found.seconds / planner.unconstrained.seconds - 1
            row |= {
                "feasible": True,
                "peak_bytes": found.peak,
                "budget_bytes": int(budget),
                "gap": gap,
                "extra_cost": extra,
                "ok": seconds <= limit and gap <= MOST_GAP,
            }
            print(
                f"  {part:.0%}: {seconds:.2f} s (processor {processor:.2f} s), gap {gap:.2%}, "
                f"peak {found.peak / budget:.1%} of the budget, {extra:+.1%} time"
                f"{'' if row['ok'] else '   ABOVE THE LIMIT'}",
                flush=True,
            )
        result["plans"].append(row)
    return result


def profile(program: str, budget: float) -> None:
    """Where the time of one decision goes, by function."""
    joint = gradient_of(program).joint
    profiler = cProfile.Profile()
    profiler.enable()
    planner = Planner(joint, device("h100"))
    planner.decide(budget * planner.unconstrained.peak)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(45)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--profile", action="store_true", help="one decision, by function")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    options = parser.parse_args()
    budgets = tuple(float(part) for part in options.budgets.split(","))
    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    failed = False
    for program in options.programs.split(","):
        if program not in PROGRAMS:
            sys.exit(f"{program!r} is none of {', '.join(PROGRAMS)}")
        if options.profile:
            profile(program, budgets[0])
            continue
        known[program] = measure(program, budgets)
        failed |= not all(row["ok"] for row in known[program]["plans"])
        if options.json:
            options.json.write_text(json.dumps(known, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
