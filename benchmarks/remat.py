"""Memory budgets on a GPU that is not there: peak, prediction, cost, beside `jax.checkpoint`.

    python benchmarks/remat.py --networks resnet50,gpt2-small --json benchmarks/results/remat.json

Every peak is XLA's own figure for an H100, compiled on this machine without one. Costs are roofline
seconds of the whole step, for fastgpu's plan and for the hand-written policies alike. Those put
`jax.checkpoint` around every block of the model, with each of JAX's named policies.
A network takes minutes: a compilation is 10 to 60 s on two cores.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import fastgpu as fgpu
from fastgpu import models
from fastgpu.compile.plan import modelled_whole
from fastgpu.hardware import device
from fastgpu.models import googlenet, llama, mobilenet, resnet, transformer, unet

IMAGE, TOKENS = ((224, 224, 3), jnp.float32), ((1024,), jnp.int32)
# name: batch, one example's shape and dtype, settings, blocks that a person would checkpoint
NETWORKS = {
    "resnet50": (184, IMAGE, {}, (resnet.Bottleneck,)),
    "vgg16": (176, IMAGE, {}, ()),
    "mobilenetv2": (272, IMAGE, {}, (mobilenet.InvertedResidual,)),
    "unet": (11, IMAGE, {}, (unet.DoubleConv,)),
    "googlenet": (320, IMAGE, {}, (googlenet.Inception,)),
    "gpt2-small": (8, TOKENS, {}, (transformer.TransformerBlock,)),
    "llama-1b": (4, ((2048,), jnp.int32), {"dtype": jnp.bfloat16}, (llama.LlamaBlock,)),
    "vit-b16": (64, IMAGE, {}, (transformer.TransformerBlock,)),
}
POLICIES = ("nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable")
BUDGETS = (0.7, 0.5, 0.35)


def build(name: str):
    """The step, and the shapes that it is for."""
    batch, (shape, dtype), settings, _ = NETWORKS[name]
    module = models.create(name, **settings)
    x = jax.ShapeDtypeStruct((batch, *shape), dtype)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(x.shape, x.dtype)))
    out = jax.eval_shape(module.apply, variables, x)
    labels = jax.ShapeDtypeStruct(out.shape[:-1], jnp.int32)
    tx = optax.adam(1e-3)
    loss = fgpu.supervised_loss(module, "softmax_cross_entropy_with_integer_labels")
    state = jax.eval_shape(lambda v: fgpu.TrainState.create(v, tx, rng=0), variables)
    return fgpu.train_step(loss, tx), state, {"inputs": x, "labels": labels}


def by_hand(name: str, target: str) -> list[dict]:
    """Peak and cost of the step with every block under `jax.checkpoint`, for each policy."""
    rows = []
    blocks = NETWORKS[name][3]
    for policy in POLICIES if blocks else ():
        originals = [(block, block.__call__) for block in blocks]
        for block, call in originals:
            block.__call__ = checkpointed(call, getattr(jax.checkpoint_policies, policy))
        try:
            step, state, batch = build(name)
            search, whole, args = step.search((state, batch), target)
            first = search.unconstrained
            model = modelled_whole(whole(first.modelled.program), args, device(target))
            peak = first.peak
            rows.append({"policy": policy, "peak_bytes": peak, "step_seconds": model.seconds})
        finally:
            for block, call in originals:
                block.__call__ = call
    return rows


def checkpointed(call, policy):
    """A block's method under `jax.checkpoint`; keywords such as `train` are no arrays."""

    def under_checkpoint(self, x, **settings):
        return nn.remat(lambda block, x: call(block, x, **settings), policy=policy)(self, x)

    return under_checkpoint


def measure(name: str, target: str, budgets: tuple[float, ...]) -> dict:
    step, state, batch = build(name)
    start = time.perf_counter()
    base = fgpu.plan(step, state, batch, target=target)
    result = {
        "network": name,
        "batch": NETWORKS[name][0],
        "unconstrained_peak_bytes": base.peak_bytes,
        "unconstrained_step_seconds": base.predicted_step_seconds,
        "arguments_bytes": base.memory.argument_bytes,
        "plans": [],
    }
    print(
        f"{name}, batch {NETWORKS[name][0]}, {target}: {base.peak_bytes / 2**30:.2f} GiB",
        flush=True,
    )
    for part in budgets:
        budget = int(part * base.peak_bytes)
        try:
            found = fgpu.plan(step, state, batch, target=target, memory_budget=budget)
        except fgpu.errors.BudgetError as error:
            row = {"budget": part, "feasible": False, "least_bytes": error.least_bytes}
            print(f"  {part:.0%}: infeasible; least {error.least_bytes / base.peak_bytes:.1%}")
        else:
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
                f"  {part:.0%}: peak {found.peak_bytes / base.peak_bytes:.1%}, predicted "
                f"{row['prediction_error']:+.2%}, step {found.extra_step_cost:+.1%}, gap "
                f"{found.gap:.2%}, {found.compiles} compiles so far, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
        result["plans"].append(row)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--target", default="h100")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--by-hand", action="store_true", help="also the jax.checkpoint policies")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    options = parser.parse_args()
    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for name in options.networks.split(","):
        if name not in NETWORKS:
            sys.exit(f"{name!r} is none of {', '.join(NETWORKS)}")
        budgets = tuple(float(part) for part in options.budgets.split(","))
        result = measure(name, options.target, budgets)
        if options.by_hand:
            result["by_hand"] = by_hand(name, options.target)
            for row in result["by_hand"]:
                peak = row["peak_bytes"] / result["unconstrained_peak_bytes"]
                cost = row["step_seconds"] / result["unconstrained_step_seconds"] - 1
                print(f"  by hand, {row['policy']}: peak {peak:.1%}, step {cost:+.1%}", flush=True)
        known[name] = result
        if options.json:
            options.json.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
