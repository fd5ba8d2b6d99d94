"""What residuals in fewer bits do: bytes on an H100, errors of gradients, losses of a real run.

    python benchmarks/residuals.py --json benchmarks/results/residuals.json

About ten minutes on two cores. Bytes are XLA's own for a 12-layer decoder (width 512, 8 x 512
tokens, float32, Adam), compiled for an H100 that is not there. Errors and losses are of a 12-layer
decoder that learns to continue scikit-learn's digits, as rows of 64 grey levels, on this machine:
three seeds, exact and compressed from the same start with the same batches. Both are planned as if
matrix products were a hundred times slower: otherwise it is cheaper to compute most values again.
"""

import argparse
import dataclasses
import json
import os
import statistics
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import fastgpu as fgpu
from fastgpu.hardware import Device, device

SEEDS = (0, 1, 2)
STEPS, BATCH = 60, 64
# Of the temporaries without a budget, what each way may take.
BYTES = {"bfloat16": 1 / 1.6, "int8": 1 / 2.4}
BUDGET = {"bfloat16": "65%", "int8": "45%"}


def decoder(width: int, heads: int, context: int, vocab: int) -> Any:
    return fgpu.models.create(
        "gpt2-small",
        depth=12,
        width=width,
        heads=heads,
        context=context,
        vocab_size=vocab,
        dropout=0.0,
    )


def with_slow_products(name: str) -> Device:
    known = device(name)
    flops = {dtype: rate / 100 for dtype, rate in known.flops.items()}
    return dataclasses.replace(known, host_link=0.0, flops=flops)


def step_for(module: Any, **settings: Any) -> tuple[Any, Any]:
    tx = optax.adam(1e-3)
    loss = fgpu.supervised_loss(module, "softmax_cross_entropy_with_integer_labels")
    return fgpu.train_step(loss, tx, **settings), tx


def on_h100(compress: str) -> dict[str, Any]:
    """The compiler's temporaries with and without packing, and what waits in which form."""
    module = decoder(512, 8, 512, 8192)
    tokens = jax.ShapeDtypeStruct((8, 512), jnp.int32)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 512), int)))
    step, tx = step_for(module, compress=compress)
    state = jax.eval_shape(lambda v: fgpu.TrainState.create(v, tx, rng=0), variables)
    batch = {"inputs": tokens, "labels": tokens}
    target = with_slow_products("h100")
    before = fgpu.plan(step, state, batch, target=target)
    resident = before.peak_bytes - before.memory.temp_bytes
    budget = int(resident + BYTES[compress] * before.memory.temp_bytes)
    after = fgpu.plan(step, state, batch, target=target, memory_budget=budget)
    waiting = {"keep": 0, "recompute": 0, compress: 0}
    for residual in after.residuals:
        waiting[residual.decision] += residual.bytes
    return {
        "compress": compress,
        "temp_bytes_before": before.memory.temp_bytes,
        "temp_bytes": after.memory.temp_bytes,
        "times_smaller": before.memory.temp_bytes / after.memory.temp_bytes,
        "residual_bytes": waiting,
    }


def digits() -> np.ndarray:
    """1,797 rows of 65 tokens: a start, then 64 grey levels."""
    levels = load_digits(return_X_y=True)[0].astype(np.int32) + 1
    return np.concatenate([np.zeros((len(levels), 1), np.int32), levels], axis=1)


def real_run(compress: str | None) -> dict[str, Any]:
    """Last losses (means of ten steps) of each seed; gradient errors at the first and last step."""
    rows, module = digits(), decoder(64, 4, 64, 18)
    settings: dict[str, Any] = {}
    if compress is not None:
        settings = {"memory_budget": BUDGET[compress], "compress": compress}
        settings["target"] = with_slow_products("cpu")
    losses, errors, packed = [], [], 0
    for seed in SEEDS:
        step, tx = step_for(module, **settings)
        rng = np.random.default_rng(seed)
        variables = module.init(jax.random.key(seed), jnp.zeros((1, 64), int))
        state = fgpu.TrainState.create(variables, tx, rng=seed)
        last: list[float] = []
        for index in range(STEPS):
            some = rows[rng.choice(len(rows), BATCH, replace=False)]
            batch = {"inputs": jnp.asarray(some[:, :-1]), "labels": jnp.asarray(some[:, 1:])}
            if compress is not None and seed == 0 and index in (0, STEPS - 1):
                errors.append(step.gradient_error(state, batch))
                residuals = fgpu.plan(step, state, batch).residuals
                packed = sum(r.bytes for r in residuals if r.decision == compress)
            state, metrics = step(state, batch)
            if index >= STEPS - 10:
                last.append(float(metrics["loss"]))
        losses.append(statistics.mean(last))
        print(f"  {compress or 'exact'}, seed {seed}: loss {losses[-1]:.4f}", flush=True)
    return {
        "compress": compress,
        "packed_bytes": packed,
        "budget": None if compress is None else BUDGET[compress],
        "losses": losses,
        "mean": statistics.mean(losses),
        "deviation_over_seeds": statistics.stdev(losses),
        "gradient_errors": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {"jax": jax.__version__, "steps": STEPS, "seeds": list(SEEDS)}
    report["h100"] = [on_h100(compress) for compress in BYTES]
    for row in report["h100"]:
        print(
            f"{row['compress']}: temporaries {row['times_smaller']:.2f} times smaller, "
            f"{row['residual_bytes']}",
            flush=True,
        )
    report["digits"] = [real_run(compress) for compress in (None, *BUDGET)]
    for row in report["digits"]:
        print(
            f"{row['compress'] or 'exact'}: loss {row['mean']:.4f} +- "
            f"{row['deviation_over_seeds']:.4f}, gradient errors "
            f"{[f'{error:.2%}' for error in row['gradient_errors']]}"
        )
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
