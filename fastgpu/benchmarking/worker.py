"""One side of a comparison in a process of its own; run as a script with one JSON argument.

Each side has its process because Keras takes one backend per process, and because resident memory
belongs to a process. It reads requests and writes replies as lines of JSON, so that the sides of a
comparison take turns. This file imports nothing of fastgpu at its top: a process that measures
Keras must hold Keras alone.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol


class Side(Protocol):
    """What is measured."""

    def first_step(self) -> dict[str, Any]:
        """Compile; returns compile_seconds and peak_bytes."""
        ...

    def steps(self, count: int) -> list[float]:
        """Do `count` steps; returns the seconds of each."""
        ...

    def losses(self, count: int) -> list[float]:
        """The losses of the first `count` steps from the initial weights, without dropout."""
        ...


class FastGPUSide:
    """`fastgpu.train_step` on an imported Keras file."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self._batch = load_batch(spec["batch"])
        self._step, self._state = self._build(spec["model"])

    def _build(self, path: str) -> tuple[Any, Any]:
        from fastgpu.benchmarking.optimizers import optax_optimizer
        from fastgpu.importers import from_keras
        from fastgpu.training import TrainState, supervised_loss, train_step

        imported = from_keras(path)
        tx = optax_optimizer(self._spec["optimizer"], self._spec["learning_rate"])
        loss = supervised_loss(imported.module, self._spec["loss"], metrics=())
        step = train_step(loss, tx, passes=self._spec["passes"])
        return step, TrainState.create(imported.variables, tx, rng=0)

    def first_step(self) -> dict[str, Any]:
        """Compile by ahead-of-time lowering, then do the first call."""
        from fastgpu.compile import memory_report

        start = time.perf_counter()
        compiled = self._step.lower(self._state, self._batch).compile()
        compile_seconds = time.perf_counter() - start
        self.steps(1)
        return {
            "compile_seconds": compile_seconds,
            "peak_bytes": memory_report(compiled).peak_bytes,
        }

    def steps(self, count: int) -> list[float]:
        """Each step waits for its loss, as Keras's callbacks make Keras do."""
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self._state, metrics = self._step(self._state, self._batch)
            metrics["loss"].block_until_ready()
            seconds.append(time.perf_counter() - start)
        return seconds

    def losses(self, count: int) -> list[float]:
        """On the copy of the file whose dropout rates are 0."""
        path = self._spec["model_without_dropout"]
        step, state = self._build(path)
        if path == self._spec["model"]:
            step = self._step  # which is compiled
        curve = []
        for _ in range(count):
            state, metrics = step(state, self._batch)
            curve.append(float(metrics["loss"]))
        return curve


class KerasSide:
    """Keras's own `fit`, with the settings that `compile` has by default."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import numpy as np

        self._np = np
        self._spec = spec
        batch = load_batch(spec["batch"])
        self._x, self._y = batch["inputs"], batch["labels"]
        self._size = len(self._y)
        self._model = self._build(spec["model"])
        self._model.optimizer.build(self._model.trainable_variables)
        variables = (*self._model.variables, *self._model.optimizer.variables)
        self._initial = [(variable, variable.numpy()) for variable in variables]

    def _build(self, path: str) -> Any:
        import keras

        model: Any = keras.saving.load_model(path, compile=False, safe_mode=True)
        rate = self._spec["learning_rate"]
        optimizer = {
            "sgd": lambda: keras.optimizers.SGD(rate),
            "momentum": lambda: keras.optimizers.SGD(rate, momentum=0.9),
            "adam": lambda: keras.optimizers.Adam(rate),
        }[self._spec["optimizer"]]()
        model.compile(optimizer, loss=self._loss(keras, model))
        return model

    def _loss(self, keras: Any, model: Any) -> Any:
        activation = getattr(model.layers[-1], "activation", None)
        is_softmax = isinstance(model.layers[-1], keras.layers.Softmax)
        probabilities = is_softmax or activation in (
            keras.activations.softmax,
            keras.activations.sigmoid,
        )
        return {
            "softmax_cross_entropy_with_integer_labels": (
                lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=not probabilities)
            ),
            "softmax_cross_entropy": (
                lambda: keras.losses.CategoricalCrossentropy(from_logits=not probabilities)
            ),
            "sigmoid_binary_cross_entropy": (
                lambda: keras.losses.BinaryCrossentropy(from_logits=not probabilities)
            ),
            "squared_error": keras.losses.MeanSquaredError,
        }[self._spec["loss"]]()

    def first_step(self) -> dict[str, Any]:
        """The first `fit` compiles; what it takes longer than a step is compile time."""
        start = time.perf_counter()
        self._fit(self._model, batches=1)
        first = time.perf_counter() - start
        return {"compile_seconds": first - self.steps(1)[0], "peak_bytes": None}

    def steps(self, count: int) -> list[float]:
        """From the end of one batch to the end of the next; a first batch only starts the clock."""
        import keras

        ends: list[float] = []

        class Clock(keras.callbacks.Callback):
            def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
                float(logs["loss"])  # waits for the step
                ends.append(time.perf_counter())

        self._fit(self._model, batches=count + 1, callbacks=[Clock()])
        return [after - before for before, after in itertools.pairwise(ends)]

    def losses(self, count: int) -> list[float]:
        """Epochs of one batch: the loss that Keras shows is then that of one step."""
        path = self._spec["model_without_dropout"]
        if path == self._spec["model"]:
            model = self._model  # which is compiled
            for variable, value in self._initial:
                variable.assign(value)
        else:
            model = self._build(path)
        return [float(loss) for loss in self._fit(model, epochs=count).history["loss"]]

    def _fit(self, model: Any, batches: int = 1, **settings: Any) -> Any:
        np = self._np

        def repeated(array: Any) -> Any:
            return np.concatenate([array] * batches)

        x = self._x
        x = tuple(map(repeated, x)) if isinstance(x, tuple) else repeated(x)
        y = repeated(self._y)
        return model.fit(x, y, batch_size=self._size, shuffle=False, verbose=0, **settings)


def load_batch(path: str) -> dict[str, Any]:
    """The batch that the measuring process saved."""
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        inputs = [arrays[f"input_{i}"] for i in range(len(arrays.files) - 1)]
        one = len(inputs) == 1
        return {"inputs": inputs[0] if one else tuple(inputs), "labels": arrays["labels"]}


def forget_peak() -> None:
    """Start a new measurement of the highest resident memory (Linux; elsewhere nothing)."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def peak_resident_bytes() -> int | None:
    """The highest resident memory of this process since `forget_peak`; None off Linux."""
    try:
        with open("/proc/self/status") as file:
            status = dict(line.split(":", 1) for line in file)
    except OSError:
        return None
    return int(status["VmHWM"].split()[0]) * 1024


def answer(side: Side, request: dict[str, Any]) -> dict[str, Any]:
    """Do what one request asks for."""
    if request["do"] == "environment":
        from fastgpu.benchmarking.environment import environment

        return environment()
    if request["do"] == "losses":
        return {"losses": side.losses(request["count"])}
    if request["do"] == "first_step":
        return side.first_step()
    forget_peak()
    seconds = side.steps(request["count"])
    return {"seconds": seconds, "resident_bytes": peak_resident_bytes()}


def main(spec: dict[str, Any]) -> None:
    """Serve requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what frameworks print must not mix with the replies
    build: Callable[[dict[str, Any]], Side]
    build = KerasSide if spec["side"].startswith("keras-") else FastGPUSide
    side = build(spec)
    replies.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        replies.write(json.dumps(answer(side, json.loads(line))) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
