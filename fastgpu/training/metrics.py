"""What a run tells about itself: one line per interval, a JSON-lines file, TensorBoard."""

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from fastgpu.errors import NonFiniteError

Row = dict[str, Any]


class Interval:
    """Metrics of the steps since the last row, and the time they took.

    Metrics stay on the device until `settle`, so that no step waits for another's numbers.
    """

    def __init__(self, nonfinite: str) -> None:
        self._nonfinite = nonfinite
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self._settled: list[dict[str, float]] = []
        self._last_finite: str = "none"
        self.restart_clock()

    def restart_clock(self) -> None:
        """Time from here: what came before (compiling, evaluating, saving) is not step time."""
        self._start = time.perf_counter()
        self._steps = self._examples = 0

    def add(self, step: int, metrics: dict[str, Any], examples: int) -> None:
        """Take note of one step; its metrics may not be computed yet."""
        scalars = {name: value for name, value in metrics.items() if np.ndim(value) == 0}
        self._pending.append((step, scalars))
        self._steps += 1
        self._examples += examples

    def settle(self) -> None:
        """Wait for the metrics of all steps so far; raise `NonFiniteError` if a loss is not one."""
        for step, metrics in jax.device_get(self._pending):
            loss = float(metrics.get("loss", 0.0))
            if not math.isfinite(loss) and self._nonfinite == "raise":
                raise NonFiniteError(
                    f"the loss is {loss} at step {step}",
                    expected=f"a finite loss; the last one was {self._last_finite}",
                    got=str(loss),
                    fix="lower the learning rate, clip gradients (optax.clip_by_global_norm), or "
                    "look at the inputs; fit(..., nonfinite='ignore') goes on",
                )
            self._last_finite = f"{loss:.6g} at step {step}"
            self._settled.append({name: float(value) for name, value in metrics.items()})
        self._pending.clear()

    def row(self, step: int, epoch: int, state: Any) -> Row | None:
        """The means since the last row, and speed and memory; None if there was no step.

        Starts the next interval.
        """
        self.settle()
        if not self._settled:
            return None
        seconds = time.perf_counter() - self._start
        names = {name: None for metrics in self._settled for name in metrics}
        row: Row = {"step": step, "epoch": epoch}
        for name in names:
            row[name] = float(np.mean([m[name] for m in self._settled if name in m]))
        rate = learning_rate(getattr(state, "opt_state", None))
        if rate is not None:
            row["learning_rate"] = rate
        if self._steps:
            row["examples_per_second"] = self._examples / seconds
            row["step_ms"] = 1000 * seconds / self._steps
        row["memory_bytes"] = memory_bytes()
        self._settled.clear()
        self.restart_clock()
        return row


def learning_rate(opt_state: Any) -> float | None:
    """The learning rate, if the optimizer's state has it (`optax.inject_hyperparams`).

    >>> tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    >>> learning_rate(tx.init({"w": jax.numpy.ones(2)})), learning_rate(())
    (0.5, None)
    """
    try:
        rate = optax.tree_utils.tree_get(opt_state, "learning_rate")
    except KeyError:  # several parts of the optimizer have one each
        return None
    return None if rate is None or np.ndim(rate) else float(rate)


def memory_bytes() -> int:
    """Bytes in use on the first device at the peak, or the process's peak on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def line(row: Row, last_step: int | None) -> str:
    """One row for a terminal.

    >>> line({"step": 20, "epoch": 1, "loss": 0.25, "step_ms": 100.0, "memory_bytes": 2**30}, 50)
    'step 20/50 | epoch 1 | loss 0.25 | 100 ms/step | eta 0:00:03 | 1.00 GiB'
    """
    units = {
        "examples_per_second": "{:.4g} examples/s",
        "step_ms": "{:.4g} ms/step",
    }
    parts = [
        f"step {row['step']}" + (f"/{last_step}" if last_step else ""),
        f"epoch {row['epoch']}",
    ]
    for name, value in row.items():
        if name not in ("step", "epoch", "memory_bytes"):
            parts.append(units.get(name, name + " {:.4g}").format(value))
    if last_step and "step_ms" in row:
        seconds = (last_step - row["step"]) * row["step_ms"] / 1000
        parts.append(
            f"eta {int(seconds // 3600)}:{int(seconds // 60 % 60):02}:{int(seconds % 60):02}"
        )
    if "memory_bytes" in row:
        parts.append(f"{row['memory_bytes'] / 2**30:.2f} GiB")
    return " | ".join(parts)


class MetricsFiles:
    """`metrics.jsonl` and `tensorboard/` in a run directory. Use as a context manager.

    `size` is the length in bytes that `metrics.jsonl` had when the checkpoint was saved that the
    run goes on from: rows after it will be written again, so they are cut off.
    """

    def __init__(self, run_dir: Path, size: int, after_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._path = metrics_path(run_dir)
        self._path.touch()
        os.truncate(self._path, min(size, self._path.stat().st_size))
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=after_step + 1)

    def __enter__(self) -> "MetricsFiles":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()
        self._board.close()

    def write(self, row: Row) -> None:
        """Append a row: to the file as one line of JSON (a number that is none as null)."""
        clean = {k: v if math.isfinite(v) else None for k, v in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, row["step"])
        self._board.flush()

    @property
    def size(self) -> int:
        """The length of `metrics.jsonl` in bytes."""
        return self._path.stat().st_size


def metrics_path(run_dir: Path) -> Path:
    """The JSON-lines file of a run."""
    return run_dir / "metrics.jsonl"


def read_rows(run_dir: Path) -> list[Row]:
    """The rows of `metrics.jsonl`."""
    return [json.loads(text) for text in metrics_path(run_dir).read_text().splitlines()]
