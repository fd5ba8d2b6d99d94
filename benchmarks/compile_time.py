"""How long a first step takes: tracing, passes, compiling; and a second process with the cache.

    python benchmarks/compile_time.py [gpt48] [vit24] [resnet152] [--rounds 3]

Deep models on small inputs, `train_step` with Adam, as it is ("plain": no passes), with the default
passes, and with `roll` besides. Every measurement is a process of its own; in a round all sides of
a model take turns, first with an empty compilation cache, then a second process each with the cache
that the first one left. Writes medians and ratios to `benchmarks/results/compile_time.json`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "compile_time.json"
MODELS = ("gpt48", "vit24", "resnet152")
SIDES = ("plain", "default", "roll")


def measure(model: str, side: str, cache: str) -> dict[str, float]:
    """Seconds of one first step in this process."""
    import fastgpu as fgpu
    from fastgpu.transforms import also, inspect

    fgpu.configure(device="cpu", cache=cache, keras=False, quiet=True)
    step, state, batch = training(model, {"plain": (), "roll": also("roll")}.get(side, "default"))
    start = time.perf_counter()
    lowered = step.lower(state, batch)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ready = time.perf_counter()
    state, metrics = compiled(state, batch)
    metrics["loss"].block_until_ready()
    done = time.perf_counter()
    steps = []
    for _ in range(5):
        begun = time.perf_counter()
        state, metrics = compiled(state, batch)
        metrics["loss"].block_until_ready()
        steps.append(time.perf_counter() - begun)
    passes = inspect(
        lambda params, rest: step.loss_fn(params, *rest)[0],
        state.params,
        (state.model_state, batch, state.rng),
        passes=step.passes,
    ).passes
    return {
        "trace_seconds": traced - start,
        "compile_seconds": ready - traced,
        "first_step_seconds": done - start,
        "passes_seconds": sum(row.seconds for row in passes),
        "step_seconds": statistics.median(steps),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def training(model: str, passes: Any) -> tuple[Any, Any, Any]:
    """A step, a state of zeros (nothing is compiled to draw weights) and a batch."""
    import jax
    import jax.numpy as jnp
    import optax

    import fastgpu as fgpu
    from fastgpu.models.gpt import GPT, GPTConfig
    from fastgpu.models.resnet import ResNet, ResNetConfig
    from fastgpu.models.vit import ViT, ViTConfig

    images, labels = jnp.zeros((2, 64, 64, 3)), jnp.zeros(2, jnp.int32)
    if model == "gpt48":
        module: Any = GPT(GPTConfig(vocab_size=512, context=64, width=64, depth=48, heads=4))
        images = labels = jnp.zeros((2, 64), jnp.int32)
    elif model == "vit24":
        size = {"image_size": 64, "width": 128, "heads": 4, "mlp_width": 512}
        module = ViT(ViTConfig(depth=24, num_classes=10, **size))
    else:
        sizes = (3, 8, 36, 3)
        module = ResNet(ResNetConfig(stage_sizes=sizes, bottleneck=True, num_classes=10))
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    loss = fgpu.supervised_loss(module, loss="softmax_cross_entropy_with_integer_labels")
    optimizer = optax.adam(1e-3)
    step = fgpu.train_step(loss, optimizer, passes=passes)
    state = fgpu.TrainState.create(variables, optimizer, rng=jax.random.key(1))
    return step, state, {"inputs": images, "labels": labels}


def compare(models: list[str], rounds: int) -> dict[str, Any]:
    """Medians of every model and side, and their ratios to the plain side."""
    rows = []
    for model in models:
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(rounds):
            for side in SIDES:
                with tempfile.TemporaryDirectory() as cache:
                    first, second = (_in_process(model, side, cache) for _ in range(2))
                first["second_process_seconds"] = second["first_step_seconds"]
                found[side].append(first)
        medians = {
            side: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            for side, runs in found.items()
        }
        plain = medians["plain"]
        for side, figures in medians.items():
            share = figures["passes_seconds"] / figures["compile_seconds"]
            ratios = {name: figures[name] / plain[name] for name in plain if plain[name]}
            rows.append(
                {"model": model, "side": side, **figures, "passes_share": share, "ratio": ratios}
            )
            print(
                f"{model:<10} {side:<8} compile {figures['compile_seconds']:6.1f} s"
                f" ({ratios['compile_seconds']:.2f}x)  first step"
                f" {figures['first_step_seconds']:6.1f} s ({ratios['first_step_seconds']:.2f}x)"
                f"  passes {share:5.1%}  second process {figures['second_process_seconds']:5.1f} s"
                f"  step {1e3 * figures['step_seconds']:.0f} ms",
                flush=True,
            )
    return {"rounds": rounds, "rows": rows}


def _in_process(model: str, side: str, cache: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", model, side, cache]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "SIDE", "CACHE"))
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    if unknown := set(arguments.models) - set(MODELS):
        parser.error(f"unknown models {sorted(unknown)}; known are {', '.join(MODELS)}")
    RESULTS.write_text(json.dumps(compare(arguments.models, arguments.rounds), indent=1) + "\n")


if __name__ == "__main__":
    main()
