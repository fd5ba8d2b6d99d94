"""The record of a run: rows of metrics, checkpoints, and what it says while it runs."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fastgpu.errors import CheckpointError
from fastgpu.training import checkpoint
from fastgpu.training.metrics import Interval, MetricsFiles, Row, line, metrics_path, read_rows

Notes = dict[str, Any]


def restored(
    run_dir: Path, resume: Literal["auto", "never"], state: Any, notes: Notes
) -> tuple[Any, Notes]:
    """State and notes to start from: the newest checkpoint's, or those given if there is none.

    Raises `CheckpointError`, having changed nothing, if `run_dir` cannot be written, holds a run
    although `resume` is "never", or holds one of another model, optimizer or data.
    """
    checkpoint.require_writable(run_dir)
    if resume == "never":
        if checkpoint.saved_steps(run_dir) or metrics_path(run_dir).exists():
            raise CheckpointError(
                f"{run_dir} holds a run already",
                expected="a new or empty run_dir, because of resume='never'",
                got=f"checkpoints of the steps {checkpoint.saved_steps(run_dir)}",
                fix="pass resume='auto' to go on with that run, or another run_dir",
            )
        return state, notes
    found = checkpoint.restore(run_dir, state)
    if found is None:
        return state, notes
    if found[1]["data"] != json.loads(json.dumps(notes["data"])):
        raise CheckpointError(
            f"the run in {run_dir} was trained on other batches",
            expected=str(found[1]["data"]),
            got=str(notes["data"]),
            fix="pass the data, batch_size and seed of that run, or another run_dir",
        )
    return found


class Record:
    """Rows, files, checkpoints and terminal of one `fit`. Use as a context manager."""

    def __init__(
        self,
        run_dir: Path | None,
        notes: Notes,
        *,
        start_step: int,
        last_step: int | None,
        keep: int,
        nonfinite: str,
        progress: bool,
        on_row: Callable[[Row], None] | None,
    ) -> None:
        self.run_dir, self.notes = run_dir, notes
        self.start_step, self.last_step = start_step, last_step
        self.keep, self.progress, self.on_row = keep, progress, on_row
        self.interval = Interval(nonfinite)
        self.rows: list[Row] = []
        self._files: MetricsFiles | None = None
        self._checkpoints: checkpoint.CheckpointWriter | None = None

    def __enter__(self) -> "Record":
        with contextlib.ExitStack() as stack:
            self._console = Console(stderr=True, quiet=not self.progress, soft_wrap=True)
            self._bar = stack.enter_context(self._progress_bar())
            if self.run_dir is not None:
                self._checkpoints = stack.enter_context(
                    checkpoint.CheckpointWriter(self.run_dir, self.keep, after=self.start_step)
                )
                self._files = stack.enter_context(
                    MetricsFiles(self.run_dir, self.notes["metrics_size"], self.start_step)
                )
                self.rows = read_rows(self.run_dir)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def say(self, text: str) -> None:
        """A line on the terminal."""
        self._console.print(text, highlight=False, markup=False)

    def add(self, step: int, metrics: dict[str, Any], batch: Any) -> None:
        """Take note of one step: for the next row, and on the progress bar."""
        shape = next((np.shape(leaf) for leaf in jax.tree.leaves(batch)), ())
        self.interval.add(step, metrics, examples=shape[0] if shape else 1)
        self._bar.update(self._task, completed=step - self.start_step)

    def evaluated(self, step: int) -> bool:
        """Whether the last rows have an evaluation of this step."""
        rows = [row for row in self.rows[-2:] if row["step"] == step]
        return any(name.startswith("eval_") for row in rows for name in row)

    def write(self, row: Row) -> None:
        """Keep a row: in `rows`, on the terminal, in the files; then hand it to `on_row`."""
        self.rows.append(row)
        self.say(line(row, self.last_step))
        if self._files is not None:
            self._files.write(row)
        if self.on_row is not None:
            self.on_row(row)

    def save(self, state: Any, step: int, epoch: int, batch: int) -> Path | None:
        """Write a checkpoint of the place (epoch, batch), unless there is no run directory.

        A loss that is not finite raises `NonFiniteError` before that.
        """
        self.interval.settle()
        if self._checkpoints is None or self._files is None:
            return None
        place = {"epoch": epoch, "batch": batch, "metrics_size": self._files.size}
        return self._checkpoints.save(step, state, {**self.notes, **place})

    def _progress_bar(self) -> Progress:
        columns = TextColumn("{task.completed}/{task.total}"), BarColumn(), TimeElapsedColumn()
        bar = Progress(
            *columns,
            console=self._console,
            transient=True,
            disable=not (self.progress and self._console.is_terminal),
        )
        total = None if self.last_step is None else self.last_step - self.start_step
        self._task = bar.add_task("training", total=total)
        return bar
