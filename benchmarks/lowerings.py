"""What each other code buys, operation by operation.

    python benchmarks/lowerings.py --json benchmarks/results/lowerings.json     (about 4 minutes)

Every row times XLA's own code and ours in turn, in one process, for the forward operation and both
gradients: the medians of 9 interleaved runs in milliseconds, and their ratio. These figures are the
evidence for the platforms and the limits of the passes in `fastgpu.transforms`.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import fastgpu as fgpu

ROUNDS = 9

# name: (input shape, window, stride, features out, groups)
CONVOLUTIONS = {
    "depthwise 3x3 32²x144": ((16, 32, 32, 144), 3, 1, 144, 144),
    "depthwise 3x3 64²x96 stride 2": ((16, 64, 64, 96), 3, 2, 96, 96),
    "depthwise 5x5 16²x192": ((16, 16, 16, 192), 5, 1, 192, 192),
    "depthwise 3x3 8²x384": ((16, 8, 8, 384), 3, 1, 384, 384),
    "depthwise 7x7 14²x384": ((16, 14, 14, 384), 7, 1, 384, 384),
    "1x1 32²x64 to 256": ((16, 32, 32, 64), 1, 1, 256, 1),
    "1x1 16²x512 to 128": ((16, 16, 16, 512), 1, 1, 128, 1),
    "1x1 16²x512 to 1024 stride 2": ((16, 16, 16, 512), 1, 2, 1024, 1),
    "3x3 4²x512 to 512": ((16, 4, 4, 512), 3, 1, 512, 1),
    "3x3 8²x512 to 512 stride 2": ((16, 8, 8, 512), 3, 2, 512, 1),
    "3x3 4²x256 to 256": ((16, 4, 4, 256), 3, 1, 256, 1),
    "3x3 8²x256 to 256": ((16, 8, 8, 256), 3, 1, 256, 1),
    "3x3 128²x3 to 32 stride 2": ((16, 128, 128, 3), 3, 2, 32, 1),
    "3x3 300²x3 to 32": ((16, 300, 300, 3), 3, 1, 32, 1),
    "7x7 224²x3 to 64 stride 2": ((16, 224, 224, 3), 7, 2, 64, 1),
}
# name: (input shape, window, stride, padding)
POOLS = {
    "max-pool 3x3 64²x64 stride 2": ((16, 64, 64, 64), 3, 2, 1),
    "max-pool 2x2 148²x32 stride 2": ((16, 148, 148, 32), 2, 2, 0),
    "max-pool 3x3 16²x192 stride 1": ((16, 16, 16, 192), 3, 1, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="run the rows whose name has this text")
    args = parser.parse_args()
    fgpu.configure(device="cpu", cache=False, quiet=True)
    rows = []
    print(f"{'operation':<34}{'part':<17}{'XLA ms':>9}{'ours ms':>9}{'ratio':>8}")
    for name, parts in operations().items():
        if args.only not in name:
            continue
        for part, (fn, inputs) in parts().items():
            fast = fgpu.optimize(fn, target="cpu")
            if part == "step":  # which takes the memory of its first input, as training steps do
                plain, optimized = Step(fn, inputs), Step(fast, inputs)
                baseline, ours = interleaved(plain, optimized, inputs[1:])
            else:
                baseline, ours = interleaved(jax.jit(fn), fast, inputs)
            row = {
                "operation": name,
                "part": part,
                "code": ", ".join(changing(fn, inputs)),
                "xla_ms": baseline,
                "fastgpu_ms": ours,
            }
            rows.append(row)
            ratio = baseline / ours
            print(f"{name:<34}{part:<17}{baseline:9.2f}{ours:9.2f}{ratio:7.1f}x", flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": platform.processor(), "jax": jax.__version__, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def operations() -> dict[str, Callable[[], dict[str, Any]]]:
    convolutions = {
        name: lambda spec=spec: convolution(*spec) for name, spec in CONVOLUTIONS.items()
    }
    pools = {name: lambda spec=spec: pool(*spec) for name, spec in POOLS.items()}
    return {
        **convolutions,
        **pools,
        "random bits, 8 million": random_bits,
        "dense 16x32768 to 1000, Adam": lambda: dense(16, 32768, 1000),
        "two dense of 4096, batch 64, SGD": lambda: two_dense(64, 4096),
    }


def convolution(
    shape: tuple[int, ...], window: int, stride: int, features: int, groups: int
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    kernel_shape = (window, window, shape[-1] // groups, features)
    kernel = jnp.asarray(rng.normal(size=kernel_shape), jnp.float32)

    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    cotangent = jnp.asarray(rng.normal(size=jax.eval_shape(conv, x, kernel).shape), jnp.float32)
    return {
        "forward": (conv, (x, kernel)),
        "weight gradient": (
            lambda x, ct: jax.vjp(lambda kernel: conv(x, kernel), kernel)[1](ct),
            (x, cotangent),
        ),
        "input gradient": (
            lambda kernel, ct: jax.vjp(lambda x: conv(x, kernel), x)[1](ct),
            (kernel, cotangent),
        ),
    }


def pool(shape: tuple[int, ...], window: int, stride: int, padding: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))

    def max_pool(x: jax.Array) -> jax.Array:
        dims, strides = (1, window, window, 1), (1, stride, stride, 1)
        return lax.reduce_window(x, -jnp.inf, lax.max, dims, strides, sides)

    cotangent = jnp.asarray(rng.normal(size=jax.eval_shape(max_pool, x).shape), jnp.float32)
    return {"gradient": (lambda x, ct: jax.vjp(max_pool, x)[1](ct), (x, cotangent))}


def changing(fn: Callable[..., Any], inputs: Any) -> list[str]:
    """The passes that change `fn`; none where it is left to XLA."""
    report = fgpu.transforms.inspect(fn, *inputs, target="cpu")
    claimed = {str(row["code"]) for row in report.operations()} - {"XLA"}
    moved = {row.name for row in report.passes if row.name == "in_place" and row.changed}
    return sorted(claimed | moved)


def random_bits() -> dict[str, Any]:
    key = jax.random.key(0)
    return {"forward": (lambda key: jax.random.bits(key, (1 << 23,)), (key,))}


def dense(batch: int, features: int, units: int) -> dict[str, Any]:
    """A wide layer's weight gradient and its update."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, features)), jnp.float32)
    ct = jnp.asarray(rng.normal(size=(batch, units)), jnp.float32)
    tx = optax.adam(1e-3)
    weights = jnp.zeros((features, units))

    def step(state: Any, x: jax.Array, ct: jax.Array) -> Any:
        weights, opt_state = state
        updates, opt_state = tx.update(x.T @ ct, opt_state)
        return optax.apply_updates(weights, updates), opt_state

    return {"step": (step, ((weights, tx.init(weights)), x, ct))}


def two_dense(batch: int, width: int) -> dict[str, Any]:
    """Two wide layers, whose weights are read by the gradient and updated."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, width)), jnp.float32)
    weights = [jnp.asarray(rng.normal(size=(width, width)) / width, jnp.float32) for _ in "ab"]

    def step(weights: Any, x: jax.Array) -> Any:
        def loss(weights: Any) -> jax.Array:
            return jnp.sum((jnp.tanh(x @ weights[0]) @ weights[1]) ** 2)

        return jax.tree.map(lambda w, g: w - 1e-6 * g, weights, jax.grad(loss)(weights))

    return {"step": (step, (weights, x))}


class Step:
    """A step that donates its state, and keeps the state that it returns."""

    def __init__(self, fn: Callable[..., Any], inputs: Any) -> None:
        self.fn = jax.jit(fn, donate_argnums=0)
        self.state = jax.tree.map(jnp.array, inputs[0])

    def __call__(self, *args: jax.Array) -> Any:
        """The state after one more step."""
        self.state = self.fn(self.state, *args)
        return self.state


def interleaved(one: Any, other: Any, inputs: tuple[jax.Array, ...]) -> tuple[float, float]:
    """Median milliseconds of both, run in turn after one warm-up each."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(ROUNDS + 1):
        for fn, kept in zip((one, other), times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(fn(*inputs))
            if round_:
                kept.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


if __name__ == "__main__":
    main()
