"""The demo: a colleague's Keras checkpoint, from the file to a verified SavedModel, in six steps.

Each step is one function, and reads as a user would write it. The test images are looked at to
report accuracy only; choices are made on the validation images.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table

import fastgpu as fgpu
from fastgpu.benchmarking import BenchmarkReport
from fastgpu.cli.demo import keras_script, tensorflow_script
from fastgpu.errors import FastGPUError
from fastgpu.importers import Imported

RESULT_FILE = "demo.json"
BATCH_SIZE = 64
Data = dict[str, dict[str, np.ndarray]]


def run(out: Path) -> dict[str, Any]:
    """Do the six steps, print what they find, and write it to `out/demo.json` too.

    An `out` left by an earlier demo is replaced. Raises `FastGPUError` when `out` is anything else.
    """
    started = time.perf_counter()
    console = Console(highlight=False)
    _empty_folder(out)

    console.rule("[bold]1 · prepare: a Keras model that a colleague hands over", align="left")
    data = prepare(out)
    console.rule("[bold]2 · import: the same predictions, without Keras", align="left")
    imported, difference = import_model(out, data)
    console.rule("[bold]3 · tune: learning rate and weight decay on validation data", align="left")
    best = tune(out, imported, data)
    console.rule("[bold]4 · optimize: what the passes do to the program", align="left")
    optimize(imported, data)
    console.rule("[bold]5 · fine-tune and measure", align="left")
    state, before, after = fine_tune(out, imported, data, best)
    measured = measure(out, data)
    console.rule("[bold]6 · deploy: a SavedModel, run by TensorFlow alone", align="left")
    deployed = deploy(out, imported, state, data)

    result = {
        "accuracy_before": before,
        "accuracy_after": after,
        "accuracy_in_tensorflow": deployed,
        "import_difference": difference,
        "best_config": best,
        "benchmark": measured.to_json(),
        "seconds": time.perf_counter() - started,
    }
    (out / RESULT_FILE).write_text(json.dumps(result, indent=1))
    console.rule("[bold]the result", align="left")
    console.print(_table(result, measured))
    console.print(f"The files are in {out.absolute()}", soft_wrap=True)
    return result


def prepare(out: Path) -> Data:
    """Run the colleague's script, which is plain Keras, in a process of its own."""
    fgpu.configure()
    print(_run_script(keras_script.__file__, out, KERAS_BACKEND="jax"))
    with np.load(out / "digits.npz") as arrays:
        return {
            split: {"inputs": arrays[f"{split}_images"], "labels": arrays[f"{split}_labels"]}
            for split in ("train", "validation", "test")
        }


def import_model(out: Path, data: Data) -> tuple[Imported, float]:
    """Import the file and compare with what Keras itself predicted."""
    imported = fgpu.from_keras(out / "digits.keras")
    print(str(imported.report).splitlines()[0])
    predictions = fgpu.predict(imported.module, imported.variables, data["test"]["inputs"])
    difference = float(np.abs(predictions - np.load(out / "keras_predictions.npy")).max())
    print(f"largest difference from Keras's own predictions: {difference:.1e}")
    return imported, difference


def tune(out: Path, imported: Imported, data: Data) -> dict[str, Any]:
    """A few short trials. The optimizer's settings live in its state: one compiled step for all."""

    def optimizer(learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
        return optax.inject_hyperparams(optax.adamw)(learning_rate, weight_decay=weight_decay)

    step = fgpu.train_step(fgpu.supervised_loss(imported.module), optimizer(0.0, 0.0))

    def objective(config: dict[str, Any], trial: Any) -> float:
        state = fgpu.TrainState.create(imported.variables, optimizer(**config), rng=0)
        for epoch in range(3):
            state, _ = fgpu.fit(
                step,
                state,
                data["train"],
                epochs=1,
                batch_size=BATCH_SIZE,
                seed=epoch,
                progress=False,
            )
            scores = fgpu.evaluate(step, state, data["validation"], batch_size=BATCH_SIZE)
            trial.report(epoch, scores["loss"])
        return scores["loss"]

    space = {"learning_rate": ("log", 1e-4, 1e-2), "weight_decay": ("log", 1e-5, 1e-1)}
    found = fgpu.tune(objective, space, trials=8, storage=out / "tune.db", study="digits")
    return found.best_config


def optimize(imported: Imported, data: Data) -> None:
    """Show the passes at work on the loss; `train_step` runs them by itself."""
    import jax

    loss = fgpu.supervised_loss(imported.module)
    state = fgpu.TrainState.create(imported.variables, optax.identity(), rng=0)
    batch = {name: array[:BATCH_SIZE] for name, array in data["train"].items()}
    print(fgpu.transforms.inspect(loss, state.params, state.model_state, batch, state.rng))
    plain = loss(state.params, state.model_state, batch, state.rng)[0]
    fast = fgpu.optimize(loss)(state.params, state.model_state, batch, state.rng)[0]
    print(f"loss as written {jax.device_get(plain):.6f}, optimized {jax.device_get(fast):.6f}")


def fine_tune(
    out: Path, imported: Imported, data: Data, best: dict[str, Any]
) -> tuple[fgpu.TrainState, float, float]:
    """Train on from the imported weights; the test accuracy before and after."""
    epochs = 20
    steps = epochs * (len(data["train"]["labels"]) // BATCH_SIZE)
    schedule = optax.cosine_decay_schedule(best["learning_rate"], steps)
    tx = optax.adamw(schedule, weight_decay=best["weight_decay"])
    step = fgpu.train_step(fgpu.supervised_loss(imported.module), tx)
    state = fgpu.TrainState.create(imported.variables, tx, rng=0)
    before = fgpu.evaluate(step, state, data["test"], batch_size=BATCH_SIZE)["accuracy"]
    state, _ = fgpu.fit(
        step,
        state,
        data["train"],
        epochs=epochs,
        batch_size=BATCH_SIZE,
        eval_data=data["validation"],
        run_dir=out / "run",
        log_every=steps,  # one line per epoch
    )
    after = fgpu.evaluate(step, state, data["test"], batch_size=BATCH_SIZE)["accuracy"]
    print(f"test accuracy {before:.4f} before, {after:.4f} after")
    return state, before, after


def measure(out: Path, data: Data) -> BenchmarkReport:
    """The same training step by Keras's `fit`, on JAX and on TensorFlow, and by fastgpu."""
    batch = {name: array[:BATCH_SIZE] for name, array in data["train"].items()}
    report = fgpu.benchmark(out / "digits.keras", batch, steps=10)
    print(report)
    return report


def deploy(out: Path, imported: Imported, state: fgpu.TrainState, data: Data) -> float:
    """Export, and let a process that has TensorFlow alone compute the test accuracy."""
    sample = data["test"]["inputs"]
    folder = out / "saved_model"
    print(fgpu.export_saved_model(imported.module, state.variables, folder, sample=sample))
    accuracy = float(_run_script(tensorflow_script.__file__, folder, out / "digits.npz"))
    print(f"test accuracy in TensorFlow alone: {accuracy:.4f}")
    return accuracy


def _run_script(script: str, *arguments: Path, **environment: str) -> str:
    """The output of a script in a process of its own, which must not take all of a GPU."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
        [sys.executable, "-P", script, *arguments],
        env={**os.environ, **quiet, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise FastGPUError(
            f"the script {Path(script).name} failed",
            got=(done.stderr.strip().splitlines() or ["no message"])[-1],
            fix=f"pip install 'fastgpu[demo]', or run it by hand: python {script}",
        )
    return done.stdout.strip()


def _empty_folder(out: Path) -> None:
    if out.exists() and not (out.is_dir() and _left_by_a_demo(out)):
        raise FastGPUError(
            f"{str(out)!r} is not the folder of an earlier demo",
            expected=f"no such path, an empty folder, or one with {RESULT_FILE!r} in it",
            got="a folder with other files" if out.is_dir() else "a file",
            fix="name another folder: fastgpu demo --out FOLDER",
        )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    # Written first too, so that a demo that was stopped can be repeated.
    (out / RESULT_FILE).write_text("{}")


def _left_by_a_demo(out: Path) -> bool:
    return (out / RESULT_FILE).exists() or not any(out.iterdir())


def _table(result: dict[str, Any], measured: BenchmarkReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("file")
    rows = [
        ("test accuracy, as handed over", f"{result['accuracy_before']:.2%}", "digits.keras"),
        ("test accuracy, fine-tuned", f"{result['accuracy_after']:.2%}", "run"),
        ("test accuracy, in TensorFlow", f"{result['accuracy_in_tensorflow']:.2%}", "saved_model"),
        ("largest import difference", f"{result['import_difference']:.1e}", "digits.npz"),
        ("tuned learning rate", f"{result['best_config']['learning_rate']:.2e}", "tune.db"),
        ("tuned weight decay", f"{result['best_config']['weight_decay']:.2e}", "tune.db"),
    ]
    names = {
        "fastgpu": "fastgpu",
        "unoptimized": "fastgpu, no passes",
        "keras-jax": "Keras fit on JAX",
        "keras-tensorflow": "Keras fit on TensorFlow",
    }
    for row in measured.rows:
        time_text = f"{row.median_seconds * 1e3:.2f} ms ({measured.ratios[row.side]:.1f}x)"
        rows.append((f"step time, {names[row.side]}", time_text, RESULT_FILE))
    for row in measured.rows:
        if row.peak_bytes is not None:
            peak = f"{row.peak_bytes / 2**20:.1f} MiB"
            rows.append((f"compiled peak memory, {names[row.side]}", peak, RESULT_FILE))
    rows.append(("the whole demo", f"{result['seconds']:.0f} s", RESULT_FILE))
    for what, value, file in rows:
        table.add_row(what, value, file)
    return table
