"""A training step of Flax models: `jax.jit` around optax written by hand, and `fastgpu.train_step`.

    python benchmarks/flax_models.py --json benchmarks/results/flax_models.json

takes about 10 minutes on two cores. Both sides train the same linen module from the same weights
with Adam and donate their state; they run in turn in one process. `loss_deviation` is the largest
relative difference of the first 20 losses, dropout off.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fastgpu as fgpu
from fastgpu.models import GPT, MLP, GPTConfig, MLPConfig, ViT, ViTConfig


class LSTMClassifier(nn.Module):
    """The last state of an LSTM over token embeddings."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits [N, 2] of tokens [N, T]."""
        states: Any = nn.RNN(nn.OptimizedLSTMCell(256))(nn.Embed(10_000, 128)(x))
        return nn.Dense(2)(states[:, -1])


def tokens(shape: tuple[int, ...], words: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, words, shape).astype(np.int32)


def images(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def models() -> dict[str, tuple[nn.Module, np.ndarray, np.ndarray]]:
    """Module, inputs and labels by name."""
    gpt = GPTConfig(vocab_size=8192, context=256, width=512, depth=6, heads=8, dropout=0.0)
    vit = ViTConfig(
        image_size=96, width=384, depth=12, heads=6, mlp_width=1536, num_classes=100, dropout=0.0
    )
    mlp = MLPConfig(hidden=(1024, 1024), num_classes=10)
    return {
        "GPT, 6 layers of 512, 8x256 tokens": (
            GPT(gpt),
            tokens((8, 256), 8192),
            tokens((8, 256), 8192),
        ),
        "ViT-S, 96x96, batch 16": (ViT(vit), images((16, 96, 96, 3)), tokens((16,), 100)),
        "LSTM of 256, 32x128 tokens": (
            LSTMClassifier(),
            tokens((32, 128), 10_000),
            tokens((32,), 2),
        ),
        "MLP 784-1024-1024-10, batch 256": (MLP(mlp), images((256, 784)), tokens((256,), 10)),
    }


def by_hand(module: nn.Module, tx: optax.GradientTransformation) -> Callable[..., Any]:
    def loss_fn(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        logits: Any = module.apply({"params": params}, inputs, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params: Any, opt_state: Any, inputs: jax.Array, labels: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, inputs, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def compare(module: nn.Module, inputs: np.ndarray, labels: np.ndarray, options: Any) -> dict:
    tx = optax.adam(1e-4)
    batch = {"inputs": jnp.asarray(inputs), "labels": jnp.asarray(labels)}
    variables = jax.jit(module.init)(jax.random.key(0), batch["inputs"])
    plain = by_hand(module, tx)
    step = fgpu.train_step(fgpu.supervised_loss(module), tx)
    # Donated, so each side has weights of its own.
    params = jax.tree.map(jnp.array, variables["params"])
    mine = [params, tx.init(params)]
    ours = [fgpu.TrainState.create(jax.tree.map(jnp.array, variables), tx, rng=0)]

    def run_plain() -> Any:
        mine[0], mine[1], loss = plain(mine[0], mine[1], batch["inputs"], batch["labels"])
        return jax.block_until_ready(loss)

    def run_ours() -> Any:
        ours[0], metrics = step(ours[0], batch)
        return jax.block_until_ready(metrics["loss"])

    compile_seconds = [timed(run)[0] for run in (run_plain, run_ours)]
    losses = [(float(run_plain()), float(run_ours())) for _ in range(options.loss_steps)]
    seconds: list[list[float]] = [[], []]
    for _ in range(options.rounds):
        for run, kept in zip((run_plain, run_ours), seconds, strict=True):
            kept.append(statistics.median(timed(run)[0] for _ in range(options.steps)))
    ratios = [plain / ours for plain, ours in zip(*seconds, strict=True)]
    return {
        "flax_ms": statistics.median(seconds[0]) * 1e3,
        "fastgpu_ms": statistics.median(seconds[1]) * 1e3,
        "ratio": statistics.median(ratios),
        "spread": max(ratios) - min(ratios),
        "flax_compile_seconds": compile_seconds[0],
        "fastgpu_compile_seconds": compile_seconds[1],
        "loss_deviation": max((abs(a - b) / abs(a) for a, b in losses), default=0.0),
    }


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="run the models whose name has this text")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a side in a round")
    parser.add_argument("--loss-steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    fgpu.configure(device="cpu", cache=False, quiet=True)
    rows = {}
    for name, (module, inputs, labels) in models().items():
        if options.only in name:
            rows[name] = compare(module, inputs, labels, options)
            figures = ", ".join(f"{key} {value:.4g}" for key, value in rows[name].items())
            print(f"{name}: {figures}", flush=True)
    ratios = [row["ratio"] for row in rows.values()]
    print(f"geometric mean {statistics.geometric_mean(ratios):.2f}x")
    if options.json:
        report = {"machine": platform.processor(), "jax": jax.__version__, "models": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
