"""A training step of keras.applications: Keras `fit` on JAX, on TensorFlow, and fastgpu.

    python benchmarks/keras_applications.py --models MobileNetV2,ResNet50,EfficientNetV2B0 \
        --size 128 --batch 16 --json keras_applications.json

takes about 15 minutes on two cores; `benchmarks/results` has the figures of the last run.
Losses of the first 20 steps from the same weights, dropout off, are compared too. From
random weights float32 rounding grows with every step, between any two programs: the deviation of
the two Keras backends from each other, printed last, is the measure for ours.
"""

import argparse
import json
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import fastgpu


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="MobileNetV2,ResNet50,EfficientNetV2B0")
    parser.add_argument("--size", type=int, default=128, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--optimizer", choices=("sgd", "momentum", "adam"), default="sgd")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a side in a round")
    parser.add_argument("--loss-steps", type=int, default=20, help="0: compare no losses")
    parser.add_argument("--against", default="keras-jax,keras-tensorflow")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()

    reports = []
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{model}.keras")
            wants_pixels = build_in_a_process(model, options.size, path)
            reports.append(
                fastgpu.benchmark(
                    path,
                    random_batch(options.batch, options.size, wants_pixels),
                    against=options.against.split(","),
                    optimizer=options.optimizer,
                    learning_rate=options.learning_rate,
                    rounds=options.rounds,
                    steps=options.steps,
                    loss_steps=options.loss_steps,
                    name=f"{model}, {options.size}x{options.size}, batch {options.batch}, "
                    f"{options.optimizer}",
                )
            )
        print(reports[-1], end="\n\n", flush=True)
        if options.json:
            settings = {key: str(value) for key, value in vars(options).items()}
            figures = {"settings": settings, "reports": [r.to_json() for r in reports]}
            options.json.write_text(json.dumps(figures, indent=1) + "\n")
    for report in reports:
        ratios = ", ".join(
            f"{ratio:.2f}x {side}" for side, ratio in report.ratios.items() if side != "fastgpu"
        )
        print(f"{report.name}: {ratios}")


def build_in_a_process(model: str, size: int, path: Path) -> bool:
    """Save the seeded model to `path`; whether it scales pixels from [0, 255] itself."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(build, (model, size, path))


def build(model: str, size: int, path: Path) -> bool:
    import keras

    keras.utils.set_random_seed(0)
    built: Any = getattr(keras.applications, model)(weights=None, input_shape=(size, size, 3))
    built.save(path)
    return any(isinstance(layer, keras.layers.Rescaling) for layer in built.layers)


def random_batch(batch: int, size: int, pixels: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (batch, size, size, 3)
    images = rng.uniform(0, 255, shape) if pixels else rng.normal(size=shape)
    return {"inputs": images.astype(np.float32), "labels": rng.integers(0, 1000, batch)}


if __name__ == "__main__":
    main()
