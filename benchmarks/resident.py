"""Resident memory of real training on a CPU, with and without a memory budget.

    python benchmarks/resident.py --json benchmarks/results/resident.json

Networks train for some steps in processes of their own: an 8-layer GPT on text that repeats itself,
a ResNet on scikit-learn's digits, and an MLP. Shown is by how much the budget lowers the peak of
resident memory, beside what the compiler's figures promised. The kernel's high-water mark is reset
when the program is compiled: compiling takes memory of its own, which is listed beside it.
"""

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import numpy as np
import optax

import fastgpu as fgpu
from fastgpu import models
from fastgpu.hardware import show_bytes


@dataclass(frozen=True)
class Run:
    """A model, where its batches come from, and the budgets that it is trained within."""

    model: str
    settings: dict[str, Any]
    batches: Callable[[int], list[dict[str, np.ndarray]]]
    tx: optax.GradientTransformation
    budgets: tuple[str, ...] = ("60%", "50%")


def repeating_text(count: int) -> list[dict[str, np.ndarray]]:
    """Token sequences that repeat a random phrase of 16: what a GPT learns to copy."""
    rng = np.random.default_rng(0)
    phrases = rng.integers(0, 512, (count, 16, 16), dtype=np.int32)
    tokens = np.tile(phrases, (1, 1, 17))[:, :, :257]  # [count, batch, 257]
    return [{"inputs": t[:, :-1], "labels": t[:, 1:]} for t in tokens]


def digits(count: int) -> list[dict[str, np.ndarray]]:
    """Batches of 768 digits, enlarged from 8 to 64 pixels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.kron(images.reshape(-1, 8, 8, 1) / 16, np.ones((8, 8, 1))).astype(np.float32)
    rng = np.random.default_rng(0)
    picks = [rng.permutation(len(labels))[:768] for _ in range(count)]
    return [{"inputs": images[pick], "labels": labels[pick].astype(np.int32)} for pick in picks]


def blobs(count: int) -> list[dict[str, np.ndarray]]:
    """Batches of 32768 points around ten centres: the quickest to train on."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, 64))
    labels = rng.integers(0, 10, (count, 1 << 15), dtype=np.int32)
    inputs = [(centres[of] + rng.normal(size=(*of.shape, 64))).astype(np.float32) for of in labels]
    return [{"inputs": x, "labels": of} for x, of in zip(inputs, labels, strict=True)]


GPT = {"depth": 8, "width": 256, "heads": 4, "context": 256, "vocab_size": 512}
RESNET = {"width": 32, "stage_sizes": (6, 2, 2), "num_classes": 10}
ADAM = optax.adam(1e-3)
# Adam's first steps go by the sign of a gradient; where batch norm makes that rounding, runs part.
MOMENTUM = optax.sgd(0.05, momentum=0.9)
MLP = {"hidden": (256,) * 16, "num_classes": 10, "dropout": 0.0}
RUNS = {
    "gpt": Run("gpt2-small", GPT, repeating_text, ADAM),
    "resnet": Run("resnet18", RESNET, digits, MOMENTUM, ("80%", "65%")),
    "mlp": Run("mlp", MLP, blobs, ADAM),
}
STEPS = 5


def train(name: str, budget: str | None, steps: int = STEPS) -> dict:
    """Losses and resident bytes of one training process: this one."""
    run = RUNS[name]
    module = models.create(run.model, **run.settings)
    batches = run.batches(steps + 1)
    tx = run.tx
    loss = fgpu.supervised_loss(module, "softmax_cross_entropy_with_integer_labels")
    variables = module.init(jax.random.key(0), batches[0]["inputs"])
    step = fgpu.train_step(loss, tx, memory_budget=budget)
    state = fgpu.TrainState.create(variables, tx, rng=0)
    del variables
    result: dict[str, Any] = {"budget": budget}
    state, metrics = step(state, batches[0])
    losses = [float(metrics["loss"])]
    gc.collect()
    result["compiling_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result["before_bytes"] = reset_high_water_mark()
    for batch in batches[1:]:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    result["peak_bytes"] = status_bytes("VmHWM")
    result["losses"] = losses
    if budget is not None:
        plan = fgpu.plan(step, state, batches[0])
        result["planned_peak_bytes"] = plan.peak_bytes
        result["planned_drop_bytes"] = plan.unconstrained_peak_bytes - plan.peak_bytes
    return result


def reset_high_water_mark() -> int:
    """The kernel's record of peak resident memory starts anew from the bytes that are returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def status_bytes(name: str) -> int:
    """An entry of /proc/self/status, such as VmHWM: peak resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def in_a_process(name: str, budget: str | None, steps: int = STEPS) -> dict:
    """`train` in a process of its own."""
    command = [sys.executable, __file__, "--worker", name, "--steps", str(steps)]
    command += ["--budget", budget] if budget else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}, budget {budget}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, budgets: tuple[str, ...]) -> dict:
    free = in_a_process(name, None)
    print(
        f"{name}: peak {show_bytes(free['peak_bytes'])} without a budget "
        f"(compiling {show_bytes(free['compiling_peak_bytes'])})",
        flush=True,
    )
    rows = []
    for budget in budgets:
        row = in_a_process(name, budget)
        drop = free["peak_bytes"] - row["peak_bytes"]
        row["drop_bytes"] = drop
        row["drop_of_planned"] = drop / row["planned_drop_bytes"]
        row["largest_loss_difference"] = float(
            np.max(np.abs(np.subtract(row["losses"], free["losses"])) / np.abs(free["losses"]))
        )
        print(
            f"  {budget}: peak {show_bytes(row['peak_bytes'])}, lower by {show_bytes(drop)}; "
            f"planned {show_bytes(row['planned_drop_bytes'])}: {row['drop_of_planned']:.1%}; "
            f"losses differ by {row['largest_loss_difference']:.1e}, "
            f"compiling {show_bytes(row['compiling_peak_bytes'])}",
            flush=True,
        )
        rows.append(row)
    return {"run": name, "steps": STEPS, "without_budget": free, "budgets": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", default=",".join(RUNS))
    parser.add_argument("--budgets", help="such as 60%%,40%%; by default those of each run")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--budget", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(train(options.worker, options.budget, options.steps)))
        return
    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for name in options.runs.split(","):
        if name not in RUNS:
            sys.exit(f"{name!r} is none of {', '.join(RUNS)}")
        budgets = tuple(options.budgets.split(",")) if options.budgets else RUNS[name].budgets
        known[name] = compare(name, budgets)
        if options.json:
            options.json.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
