"""`benchmark`: sides that do the same work, measured in turns within one run.

The one warning: ratios hold, times are those of this machine in this minute.
"""

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from fastgpu.benchmarking.environment import environment
from fastgpu.benchmarking.in_process import FunctionSide, StepSide, no_compilation_cache
from fastgpu.benchmarking.keras_files import file_of, without_dropout
from fastgpu.benchmarking.optimizers import optax_optimizer
from fastgpu.benchmarking.processes import processes, save_batch
from fastgpu.benchmarking.report import BenchmarkReport, Row
from fastgpu.errors import FastGPUError, MissingExtraError
from fastgpu.training import TrainStep, train_step
from fastgpu.transforms import optimize

KERAS_SIDES = {"keras-jax": "keras", "keras-tensorflow": "tensorflow"}  # side: its extra
KERAS_LOSSES = (
    "softmax_cross_entropy_with_integer_labels",
    "softmax_cross_entropy",
    "sigmoid_binary_cross_entropy",
    "squared_error",
)


def benchmark(
    source: Any,
    *args: Any,
    against: Sequence[str] | None = None,
    loss: str = "softmax_cross_entropy_with_integer_labels",
    optimizer: str = "adam",
    learning_rate: float = 1e-3,
    rounds: int = 5,
    steps: int = 4,
    loss_steps: int = 20,
    name: str | None = None,
) -> BenchmarkReport:
    """Measure fastgpu beside what it replaces: step time, throughput, compile time, memory.

    Args:
      source, args: what is measured.
        `benchmark(fn, *args)`: any function of pytrees, against itself unoptimized.
        `benchmark(step, state, batch)`: a `train_step`, against the same without passes. `state`
        stays alive.
        `benchmark("model.keras", batch)`: a training step on a Keras file (or live Keras model),
        against Keras's `fit` too; every side in a process of its own. `batch` is
        `{"inputs": array or tuple of arrays, "labels": array}`.
      against: out of "unoptimized", "keras-jax", "keras-tensorflow". By default all that the
        source allows and that are installed.
      loss, optimizer, learning_rate: for Keras sources: an optax loss that Keras has too, and
        "sgd", "momentum" or "adam", with the constants of Keras.
      rounds, steps: in each round every side does `steps` timed steps, in turn.
      loss_steps: how many losses from the same weights are recorded, dropout switched off for it.
      name: the report's title.

    Keras runs as users run it: `fit` on arrays in memory, `jit_compile="auto"`; steps are timed
    between the ends of batches, after the first. Compilation caches are off while it measures.

    Raises:
      FastGPUError: an unknown side, or a process that ended early, with its last words.

    >>> import jax.numpy as jnp
    >>> report = benchmark(lambda x: jnp.sin(x) @ x, jnp.ones((8, 8)), rounds=2, steps=1)
    >>> [row.side for row in report.rows]
    ['fastgpu', 'unoptimized']
    """
    if isinstance(source, str | Path) or hasattr(source, "get_config"):
        sides = _chosen(against, ("unoptimized", *KERAS_SIDES))
        title = name or (Path(source).name if isinstance(source, str | Path) else source.name)
        spec = {"loss": loss, "optimizer": optimizer, "learning_rate": learning_rate}
        _check_training(spec)
        return _compare_files(source, args, sides, spec, rounds, steps, loss_steps, title)
    _chosen(against, ("unoptimized",))
    title = name or getattr(source, "__name__", type(source).__name__)
    with no_compilation_cache():
        if isinstance(source, TrainStep):
            return _compare_steps(source, args, rounds, steps, loss_steps, title)
        pair = [
            FunctionSide("fastgpu", optimize(source), args),
            FunctionSide("unoptimized", source, args),
        ]
        rows, _ = _measure(pair, rounds, steps, items=1, loss_steps=0)
        return BenchmarkReport(title, rows, {}, environment())


def _chosen(against: Sequence[str] | None, possible: tuple[str, ...]) -> list[str]:
    """The sides to measure, fastgpu first."""
    missing = {
        side: extra
        for side, extra in KERAS_SIDES.items()
        if not all(map(importlib.util.find_spec, {"keras", extra}))
    }
    if against is None:
        return ["fastgpu", *(side for side in possible if side not in missing)]
    for side in against:
        if side not in possible:
            raise FastGPUError(
                f"benchmark cannot measure against {side!r}",
                expected=f"sides out of {', '.join(possible)} for such a source",
                fix="pass a Keras file or model to compare with Keras",
            )
        if side in missing:
            raise MissingExtraError(
                f"{side!r} cannot be measured: a package is not installed",
                fix=f"pip install 'fastgpu[keras,{missing[side]}]'",
            )
    return ["fastgpu", *against]


def _check_training(spec: dict[str, Any]) -> None:
    optax_optimizer(spec["optimizer"], spec["learning_rate"])
    if spec["loss"] not in KERAS_LOSSES:
        raise FastGPUError(
            f"the loss {spec['loss']!r} has no equal in Keras here",
            expected=", ".join(KERAS_LOSSES),
            fix="build a step with fastgpu.train_step and call benchmark(step, state, batch)",
        )


def _compare_files(
    source: Any,
    args: tuple[Any, ...],
    sides: list[str],
    spec: dict[str, Any],
    rounds: int,
    steps: int,
    loss_steps: int,
    title: str,
) -> BenchmarkReport:
    if len(args) != 1:
        raise FastGPUError(
            "benchmark of a Keras model takes one batch",
            expected="benchmark(source, {'inputs': x, 'labels': y})",
            got=f"{len(args)} arguments after the source",
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = file_of(source, folder)
        spec |= {
            "model": str(model),
            "model_without_dropout": str(without_dropout(model, folder)),
            "batch": str(folder / "batch.npz"),
        }
        items = save_batch(args[0], folder / "batch.npz")
        specs = [
            spec | {"side": side, "passes": () if side == "unoptimized" else "default"}
            for side in sides
        ]
        with processes(specs, folder) as running:
            where = running[0].environment()
            rows, losses = _measure(running, rounds, steps, items, loss_steps)
    return BenchmarkReport(title, rows, losses, where)


def _compare_steps(
    step: TrainStep, args: tuple[Any, ...], rounds: int, steps: int, loss_steps: int, title: str
) -> BenchmarkReport:
    if len(args) != 2:
        raise FastGPUError(
            "benchmark of a training step takes a state and a batch",
            expected="benchmark(step, state, batch)",
            got=f"{len(args)} arguments after the step",
        )
    state, batch = args
    plain = train_step(step.loss_fn, step.optimizer, passes=())
    optimized = train_step(step.loss_fn, step.optimizer, passes=step.passes, target=step.target)
    sides = [
        StepSide("fastgpu", optimized, state, batch),
        StepSide("unoptimized", plain, state, batch),
    ]
    items = len(jax.tree.leaves(batch)[0])
    rows, losses = _measure(sides, rounds, steps, items, loss_steps)
    return BenchmarkReport(title, rows, losses, environment())


class _Side(Protocol):
    name: str
    resident_bytes: int | None

    def first_step(self) -> dict[str, Any]: ...
    def steps(self, count: int) -> list[float]: ...
    def losses(self, count: int) -> list[float]: ...


def _measure(
    sides: Sequence[_Side], rounds: int, steps: int, items: int, loss_steps: int
) -> tuple[list[Row], dict[str, list[float]]]:
    """Compile every side, then let them take turns; every second round in the other order."""
    first = {side.name: side.first_step() for side in sides}
    losses = {side.name: side.losses(loss_steps) for side in sides if loss_steps}
    seconds: dict[str, list[list[float]]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            seconds[side.name].append(side.steps(steps))
    rows = [
        Row(side.name, seconds[side.name], items, **first[side.name], resident_bytes=peak)
        for side, peak in ((side, side.resident_bytes) for side in sides)
    ]
    return rows, losses
