"""The Keras script that everyone starts from, with `fastgpu.configure()` above it and without.

    python benchmarks/keras_script.py --json benchmarks/results/keras_script.json

takes about 25 minutes on two cores and 21 GiB of memory, which TensorFlow needs. Every run is a
process of its own, because two do not fit; the sides take turns. An epoch is what `fit` reports,
validation included; the first one compiles. Memory is the most that the process ever held. Losses
are compared in another run, on small images, from the same weights.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

SIDES = {
    "keras-tensorflow": {"KERAS_BACKEND": "tensorflow"},
    "keras-jax": {"KERAS_BACKEND": "jax"},
    "fastgpu": {},
}

SCRIPT = """
{head}
import tensorflow as tf
{data}
model = tf.keras.Sequential([
    tf.keras.layers.Conv2D(32, (3, 3), activation='relu', input_shape=({size}, {size}, 3)),
    tf.keras.layers.MaxPooling2D((2, 2)),
    tf.keras.layers.Flatten(),
    tf.keras.layers.Dense({classes}, activation='softmax')])
model.compile(optimizer='adam', loss='categorical_crossentropy', metrics=['accuracy'])
{before}
model.fit(train_data, epochs={epochs}, validation_data=val_data, verbose=0, callbacks=[figures])
model.evaluate(val_data, verbose=0)
{after}
"""

HEAD = "import fastgpu as fgpu\nfgpu.configure(quiet=True, cache=False)"

DATA = """
import json, resource, time
import numpy as np
rng = np.random.default_rng(0)
count = {batch} * {steps}
images = rng.random((count, {size}, {size}, 3), np.float32)
labels = np.eye({classes}, dtype=np.float32)[rng.integers(0, {classes}, count)]
train_data = tf.data.Dataset.from_tensor_slices((images, labels)).batch({batch})
val_data = tf.data.Dataset.from_tensor_slices((images, labels)).take({batch}).batch({batch})
"""

BEFORE = """
class Figures(tf.keras.callbacks.Callback):
    epochs, losses = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(time.perf_counter() - self.start)

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(float(logs["loss"]))

figures = Figures()
"""

SAME_WEIGHTS = """
draws = np.random.default_rng(1)
model.set_weights([draws.normal(0, 0.02, w.shape).astype("float32") for w in model.get_weights()])
"""

AFTER = """
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"epochs": figures.epochs, "losses": figures.losses, "peak_bytes": peak}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=300, help="height and width of the images")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="steps of an epoch")
    parser.add_argument("--epochs", type=int, default=3, help="the first one compiles")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loss-size", type=int, default=64, help="images for which losses compare")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    sides = options.sides.split(",")

    runs = {side: [] for side in sides}
    for turn in range(options.rounds):
        for side in sides:
            found = run(side, options, options.size, options.steps, options.epochs)
            runs[side].append(found)
            epochs = ", ".join(f"{seconds:.1f}" for seconds in found["epochs"])
            print(f"{turn} {side}: {epochs} s, {found['peak_bytes'] / 2**30:.2f} GiB", flush=True)
    losses = {
        side: run(side, options, options.loss_size, 20, 1, SAME_WEIGHTS)["losses"] for side in sides
    }

    summary = {side: summarized(side, runs, losses) for side in sides}
    for side, row in summary.items():
        print(f"{side:<17} " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    if options.json:
        settings = {key: str(value) for key, value in vars(options).items() if key != "json"}
        machine = {"processor": platform.processor(), "cores": os.cpu_count()}
        figures = {"settings": settings, "machine": machine, "summary": summary, "runs": runs}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def summarized(side: str, runs: dict, losses: dict) -> dict[str, float]:
    """Medians of a side's epochs and peaks, and fastgpu's as a part of them."""
    later = [seconds for found in runs[side] for seconds in found["epochs"][1:]]
    first = [found["epochs"][0] for found in runs[side]]
    row = {
        "epoch_seconds": statistics.median(later),
        "epoch_spread": (max(later) - min(later)) / statistics.median(later),
        "first_epoch_seconds": statistics.median(first),
        "peak_gib": statistics.median(found["peak_bytes"] for found in runs[side]) / 2**30,
    }
    if side != "fastgpu" and "fastgpu" in runs:
        ours = runs["fastgpu"]
        pairs = list(zip(ours, runs[side], strict=True))
        row["epoch_ratio"] = statistics.median(
            statistics.median(a["epochs"][1:]) / statistics.median(b["epochs"][1:])
            for a, b in pairs
        )
        row["first_epoch_ratio"] = statistics.median(
            a["epochs"][0] / b["epochs"][0] for a, b in pairs
        )
        row["peak_ratio"] = statistics.median(a["peak_bytes"] / b["peak_bytes"] for a, b in pairs)
        row["loss_deviation"] = max(
            abs(a - b) / abs(b) for a, b in zip(losses["fastgpu"], losses[side], strict=True)
        )
    return row


def run(
    side: str, options: argparse.Namespace, size: int, steps: int, epochs: int, extra=""
) -> dict:
    """The script in a process of its own."""
    values = {"size": size, "classes": options.classes, "batch": options.batch, "steps": steps}
    script = SCRIPT.format(
        head=HEAD if side == "fastgpu" else "",
        data=DATA.format(**values),
        before=BEFORE + extra,
        after=AFTER,
        epochs=epochs,
        **values,
    )
    environment = {key: value for key, value in os.environ.items() if key != "KERAS_BACKEND"}
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu", **SIDES[side]}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{side}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
