"""Memory budgets on a GPU that is not there: peak, prediction, cost, beside what people do by hand.

    python benchmarks/remat.py --by-hand --json benchmarks/results/remat.json
    python benchmarks/remat.py --networks resnet50 --budgets= --sweep --json ...   # the sweep alone

Every peak is XLA's own figure for an H100, compiled on this machine without one. Costs are roofline
seconds of the whole step, for fastgpu's plan and for what is written by hand alike.
A network takes minutes, with `--by-hand` or `--sweep` half an hour: a compilation is 10 to 60 s on
two cores. The file keeps the figures of networks and parts that a run leaves out.
"""

import argparse
import itertools
import json
import os
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import by_hand
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import fastgpu as fgpu
from fastgpu import models
from fastgpu.compile import Plan, Search
from fastgpu.hardware import show_bytes
from fastgpu.models import googlenet, llama, mobilenet, resnet, transformer, unet, vgg
from fastgpu.training.step import TrainStep


@dataclass(frozen=True)
class Network:
    """A model of `fastgpu.models`, a batch, and the block that a person would checkpoint."""

    model: str
    batch: int
    block: by_hand.Block
    shape: tuple[int, ...] = (224, 224, 3)
    dtype: Any = jnp.float32
    settings: dict[str, Any] = field(default_factory=dict)


TRANSFORMER = (transformer.TransformerBlock, "__call__")
DENSE = (nn.Dense, "__call__")
NETWORKS = {
    "resnet50": Network("resnet50", 184, (resnet.Bottleneck, "__call__")),
    "vgg16": Network("vgg16", 176, (vgg.VGG, "_stage")),
    "mobilenetv2": Network("mobilenetv2", 272, (mobilenet.InvertedResidual, "__call__")),
    "unet": Network("unet", 11, (unet.DoubleConv, "__call__")),
    "googlenet": Network("googlenet", 320, (googlenet.Inception, "__call__")),
    "gpt2-small": Network("gpt2-small", 8, TRANSFORMER, (1024,), jnp.int32),
    "llama-1b": Network(
        "llama-1b",
        4,
        (llama.LlamaBlock, "__call__"),
        (2048,),
        jnp.int32,
        {"dtype": jnp.bfloat16},
    ),
    "vit-b16": Network("vit-b16", 64, TRANSFORMER),
}
# Seconds instead of minutes, to try this program out.
SMALL = {"width": 128, "heads": 2, "depth": 4, "context": 128, "vocab_size": 512}
TRIALS = {
    "gpt-tiny": Network("gpt2-small", 64, TRANSFORMER, (128,), jnp.int32, SMALL),
    "mlp": Network("mlp", 1 << 15, DENSE, (256,), settings={"hidden": (256,) * 16}),
}
BUDGETS = (0.7, 0.5, 0.35)
SWEEP_STEPS = 20


def build(network: Network, **settings: Any) -> tuple[TrainStep, Any, Any]:
    """The step, with these settings, and the shapes that it is for."""
    module = models.create(network.model, **network.settings)
    x = jax.ShapeDtypeStruct((network.batch, *network.shape), network.dtype)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(x.shape, x.dtype)))
    out = jax.eval_shape(module.apply, variables, x)
    labels = jax.ShapeDtypeStruct(out.shape[:-1], jnp.int32)
    tx = optax.adam(1e-3)
    loss = fgpu.supervised_loss(module, "softmax_cross_entropy_with_integer_labels")
    state = jax.eval_shape(lambda v: fgpu.TrainState.create(v, tx, rng=0), variables)
    return fgpu.train_step(loss, tx, **settings), state, {"inputs": x, "labels": labels}


class Measured:
    """One network's step; every budget asks the same search, which keeps what it compiled."""

    def __init__(self, name: str, network: Network, target: str) -> None:
        self.name, self.network, self.target = name, network, target
        self.step, self.state, self.batch = build(network)
        self.start = time.perf_counter()
        self.base = self.plan(None)
        print(
            f"{name}, batch {network.batch}, {target}: {show_bytes(self.base.peak_bytes)}",
            flush=True,
        )

    def plan(self, budget: int | None) -> Plan:
        """The compiler's figures within a budget."""
        return fgpu.plan(
            self.step, self.state, self.batch, target=self.target, memory_budget=budget
        )

    def unconstrained(self) -> dict:
        """The figures without a budget, for the file."""
        return {
            "network": self.name,
            "batch": self.network.batch,
            "unconstrained_peak_bytes": self.base.peak_bytes,
            "unconstrained_step_seconds": self.base.predicted_step_seconds,
            "arguments_bytes": self.base.memory.argument_bytes,
        }

    def within(self, part: float) -> dict:
        """What a budget of `part` of the unconstrained peak leads to."""
        whole = self.base.peak_bytes
        budget = int(part * whole)
        try:
            found = self.plan(budget)
        except fgpu.errors.BudgetError as error:
            print(f"  {part:.1%}: infeasible; least {error.least_bytes / whole:.1%}", flush=True)
            return {"budget": part, "feasible": False, "least_bytes": error.least_bytes}
        row = {
            "budget": part,
            "feasible": True,
            "met": found.fits,
            "peak_bytes": found.peak_bytes,
            "prediction_error": found.predicted_peak_bytes / found.peak_bytes - 1,
            "extra_step_cost": found.extra_step_cost,
            "recompute_flops_fraction": found.recompute_flops_fraction,
            "gap": found.gap,
            "compiles": found.compiles,
            "planning_seconds": found.planning_seconds,
        }
        print(
            f"  {part:.1%}: peak {found.peak_bytes / whole:.1%}, predicted "
            f"{row['prediction_error']:+.2%}, step {found.extra_step_cost:+.1%}, gap "
            f"{found.gap:.2%}, {found.compiles} compiles so far, "
            f"{time.perf_counter() - self.start:.0f} s",
            flush=True,
        )
        return row

    def in_microbatches(self, part: float) -> dict:
        """The same budget where the number of microbatches may be chosen, too."""
        step, state, batch = build(self.network, accumulate_steps="auto")
        budget = int(part * self.base.peak_bytes)
        found = fgpu.plan(step, state, batch, target=self.target, memory_budget=budget)
        cost = found.predicted_step_seconds / self.base.predicted_step_seconds - 1
        print(
            f"  {part:.1%} in {found.accumulate_steps} microbatches: peak "
            f"{found.peak_bytes / self.base.peak_bytes:.1%}, step {cost:+.1%}",
            flush=True,
        )
        return {
            "budget": part,
            "accumulate_steps": found.accumulate_steps,
            "peak_bytes": found.peak_bytes,
            "prediction_error": found.predicted_peak_bytes / found.peak_bytes - 1,
            "extra_step_cost": cost,
        }

    def sweep(self) -> list[dict]:
        """Budgets falling in equal steps from the whole peak until one is infeasible."""
        search, _, _ = self.step.search((self.state, self.batch), self.target)
        assert isinstance(search, Search)
        saved = search.planner.unconstrained.peak - search.planner.least().peak
        step = (1 - 0.97 * (1 - saved / self.base.peak_bytes)) / (SWEEP_STEPS - 1)
        rows = [self.within(1.0)]
        while rows[-1]["feasible"] and step * len(rows) < 1:
            rows.append(self.within(1 - step * len(rows)))
        return rows


def violations(sweep: list[dict], whole: int) -> list[str]:
    """Where a smaller budget compiled to a larger peak, or a peak is above its budget."""
    found = []
    feasible = [row for row in sweep if row["feasible"]]
    for row in feasible:
        if row["peak_bytes"] > row["budget"] * whole:
            found.append(f"{row['budget']:.1%}: the peak is {row['peak_bytes'] / whole:.1%}")
    for before, after in itertools.pairwise(feasible):
        if after["peak_bytes"] > before["peak_bytes"]:
            found.append(
                f"{before['budget']:.1%} to {after['budget']:.1%}: the peak rises from "
                f"{before['peak_bytes']:,} to {after['peak_bytes']:,} bytes"
            )
    if sweep[-1]["feasible"] or len(sweep) < SWEEP_STEPS:
        found.append(f"the sweep ended after {len(sweep)} of {SWEEP_STEPS} steps")
    return found


def measured_by_hand(network: Network, target: str) -> list[dict]:
    """Peak and cost of the step in every way that `by_hand` knows."""
    known: dict[str, dict] = {}
    rows = []
    for way, context in by_hand.ways(network.block, partial(build, network)).items():
        row = {"policy": way, **by_hand.measure(context, partial(build, network), target, known)}
        print(f"  by hand, {way}: peak {show_bytes(row['peak_bytes'])}", flush=True)
        rows.append(row)
    return rows


def beside(result: dict) -> list[dict]:
    """For each budget fastgpu's cost, and that of the cheapest way by hand within it."""
    whole = result["unconstrained_peak_bytes"]
    rows = []
    for plan in result.get("plans", ()):
        fitting = [row for row in result["by_hand"] if row["peak_bytes"] <= plan["budget"] * whole]
        best = min(fitting, key=lambda row: row["step_seconds"], default=None)
        cost = best and best["step_seconds"] / result["unconstrained_step_seconds"] - 1
        rows.append(
            {
                "budget": plan["budget"],
                "extra_step_cost": plan.get("extra_step_cost"),
                "by_hand": best and best["policy"],
                "by_hand_extra_step_cost": cost,
            }
        )
    return rows


def show_by_hand(result: dict) -> None:
    for row in result["by_hand"]:
        peak = row["peak_bytes"] / result["unconstrained_peak_bytes"]
        cost = row["step_seconds"] / result["unconstrained_step_seconds"] - 1
        print(f"  {row['policy']:<50} peak {peak:6.1%}, step {cost:+6.1%}")
    for row in result["beside"]:
        ours, theirs = row["extra_step_cost"], row["by_hand_extra_step_cost"]
        print(
            f"  {row['budget']:.0%}: "
            + ("infeasible" if ours is None else f"step {ours:+.1%}")
            + "; by hand "
            + ("none fits" if theirs is None else f"{theirs:+.1%} ({row['by_hand']})"),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--target", default="h100")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="parts; may be none")
    parser.add_argument("--by-hand", action="store_true", help="also jax.checkpoint, RematScope")
    parser.add_argument("--sweep", action="store_true", help="also 20 falling budgets; rising: 1")
    parser.add_argument("--microbatches", action="store_true", help="also the batch as a lever")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    options = parser.parse_args()
    budgets = [float(part) for part in options.budgets.split(",") if part]
    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    failed = False
    for name in options.networks.split(","):
        network = (NETWORKS | TRIALS).get(name)
        if network is None:
            sys.exit(f"{name!r} is none of {', '.join(NETWORKS | TRIALS)}")
        result = known.setdefault(name, {})
        measured = Measured(name, network, options.target)
        result |= measured.unconstrained()
        if budgets:
            result["plans"] = [measured.within(part) for part in budgets]
        if options.microbatches:
            result["microbatches"] = [measured.in_microbatches(part) for part in BUDGETS]
        if options.sweep:
            result["sweep"] = measured.sweep()
            for violation in violations(result["sweep"], measured.base.peak_bytes):
                print(f"  VIOLATION {violation}", flush=True)
                failed = True
        if options.by_hand:
            result["by_hand"] = measured_by_hand(network, options.target)
        if "by_hand" in result:
            result["beside"] = beside(result)
            show_by_hand(result)
        if options.json:
            options.json.write_text(json.dumps(known, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
