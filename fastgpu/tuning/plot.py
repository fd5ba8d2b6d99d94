"""The picture of a study: the history of its values, and a slice along every hyperparameter."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpu.errors import FileError, require
from fastgpu.tuning.result import TrialRow, TuneResult
from fastgpu.tuning.space import Choice, Constant, Dimension, Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = {"complete": "tab:blue", "pruned": "tab:orange", "failed": "tab:red"}
_SLICES_PER_ROW = 3


def save_plot(path: Path, result: TuneResult, dimensions: Mapping[str, Dimension]) -> None:
    """Write a PNG of `result` to `path`, whole or not at all; raises `FileError` if it cannot.

    Drawn without pyplot, so that the caller's backend and open figures stay as they are.
    """
    figure_class = require("matplotlib.figure", "tune").Figure
    searched = {name: d for name, d in dimensions.items() if not isinstance(d, Constant)}
    rows = 1 + math.ceil(len(searched) / _SLICES_PER_ROW)
    figure = figure_class(figsize=(10, 3 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, _SLICES_PER_ROW)
    _draw_history(figure.add_subplot(grid[0, :]), result)
    for i, (name, dimension) in enumerate(searched.items()):
        cell = grid[1 + i // _SLICES_PER_ROW, i % _SLICES_PER_ROW]
        _draw_slice(figure.add_subplot(cell), name, dimension, result)

    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(unfinished, format="png", dpi=120)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise FileError(
            f"{path} cannot be written",
            expected="a folder that this user may write to",
            got=str(error),
            fix="give another plot path",
        ) from error


def _draw_history(axes: "Axes", result: TuneResult) -> None:
    for state in ("complete", "pruned"):
        rows = [row for row in result.trials if row.state == state and row.value is not None]
        values = [_value(row) for row in rows]
        axes.scatter([row.number for row in rows], values, c=_COLORS[state], label=state)
    # A failed trial has no value: a cross at the bottom shows that it ran.
    failed = [row.number for row in result.trials if row.state == "failed"]
    floor = axes.get_xaxis_transform()
    axes.plot(
        failed, [0.02] * len(failed), "x", c=_COLORS["failed"], transform=floor, label="failed"
    )
    better = min if result.direction == "minimize" else max
    complete = [row for row in result.trials if row.state == "complete"]
    best = [better(map(_value, complete[: i + 1])) for i in range(len(complete))]
    axes.step([row.number for row in complete], best, where="post", c="gray", label="best so far")
    axes.set(xlabel="trial", ylabel="value", title=result.study)
    _scale_values(axes, result)
    axes.legend()


def _draw_slice(axes: "Axes", name: str, dimension: Dimension, result: TuneResult) -> None:
    position: Any = float
    if isinstance(dimension, Choice):
        position = dimension.options.index
        axes.set_xticks(range(len(dimension.options)), [str(o) for o in dimension.options])
    for row in result.trials:
        if row.value is not None and name in row.config:
            axes.scatter(position(row.config[name]), row.value, c=_COLORS[row.state])
    if isinstance(dimension, Float) and dimension.log:
        axes.set_xscale("log")
    axes.axvline(position(result.best_config[name]), c="gray", lw=1, ls=":")
    axes.set(xlabel=name, ylabel="value")
    _scale_values(axes, result)


def _scale_values(axes: "Axes", result: TuneResult) -> None:
    """Losses that span more than a decade and a half are read in the logarithm."""
    values = [row.value for row in result.trials if row.value is not None]
    if min(values) > 0 and max(values) / min(values) > 30:
        axes.set_yscale("log")


def _value(row: TrialRow) -> float:
    assert row.value is not None
    return row.value
