"""What a search found: the best configuration, and a row for every trial."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import optuna
    from rich.table import Table

State = Literal["complete", "pruned", "failed"]
_STATES: dict[str, State] = {"COMPLETE": "complete", "PRUNED": "pruned"}
INTERRUPTED = "the run ended during this trial"


@dataclass(frozen=True)
class TrialRow:
    """One trial: its configuration, how it ended, and the value it reached.

    `value` is what the objective returned, or the last reported value of a pruned trial, or None
    of a failed one, whose `error` says why. `step` is the last step reported.
    """

    number: int
    state: State
    value: float | None
    config: dict[str, Any]
    step: int | None
    seconds: float
    error: str | None

    @classmethod
    def of(cls, trial: "optuna.trial.FrozenTrial", constants: Mapping[str, Any]) -> "TrialRow":
        """The row of an optuna trial; `constants` were part of its configuration too."""
        state = _STATES.get(trial.state.name, "failed")
        error = trial.user_attrs.get("error", INTERRUPTED) if state == "failed" else None
        return cls(
            number=trial.number,
            state=state,
            value=None if error else trial.value,
            config={**constants, **trial.params},
            step=trial.last_step,
            seconds=trial.duration.total_seconds() if trial.duration else 0.0,
            error=error,
        )


@dataclass(frozen=True)
class TuneResult:
    """The outcome of `tune`: `best_config` is ready to train with. Prints as a table.

    `searched` names what was not constant. `storage` and `plot` are the files written, or None.
    """

    best_config: dict[str, Any]
    best_value: float
    best_number: int
    direction: Literal["minimize", "maximize"]
    study: str
    searched: tuple[str, ...]
    trials: tuple[TrialRow, ...]
    storage: Path | None
    plot: Path | None

    def table(self) -> "Table":
        """The trials as a rich table: the best first, failures last and explained below it."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        # Text, because rich would read the brackets of a plain string as markup.
        title, caption = Text(self._title()), Text(self._caption())
        table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, min_width=len(title))
        table.title_justify = table.caption_justify = "left"
        for column in ("trial", "state", "value", *self.searched, "step", "s"):
            justify = "left" if column == "state" else "right"
            table.add_column(Text(column), justify=justify, no_wrap=True)
        for row in sorted(self.trials, key=self._rank):
            drawn = [row.config.get(name) for name in self.searched]
            values = [row.number, row.state, row.value, *drawn, row.step, f"{row.seconds:.1f}"]
            style = "bold green" if row.number == self.best_number else None
            table.add_row(*(Text(format_value(value)) for value in values), style=style)
        return table

    def to_json(self) -> str:
        """The result as JSON text, without NaN; paths are strings.

        >>> result = TuneResult({"lr": 0.1}, 0.5, 0, "minimize", "tune", ("lr",), (), None, None)
        >>> json.loads(result.to_json())["best_config"]
        {'lr': 0.1}
        """
        return json.dumps(asdict(self), indent=2, allow_nan=False, default=str)

    def __rich__(self) -> "Table":
        return self.table()

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()

    def _title(self) -> str:
        ends = [row.state for row in self.trials]
        counts = ", ".join(
            f"{ends.count(state)} {state}" for state in ("complete", "pruned", "failed")
        )
        return f"{self.study}: {counts}; {self.direction}d to {format_value(self.best_value)}"

    def _caption(self) -> str:
        failed = [row for row in self.trials if row.error is not None]
        return "\n".join(f"trial {row.number} failed: {row.error}" for row in failed)

    def _rank(self, row: TrialRow) -> tuple[int, float]:
        sign = 1 if self.direction == "minimize" else -1
        order = ("complete", "pruned", "failed").index(row.state)
        return order, sign * (row.value if row.value is not None else 0.0)


def format_value(value: Any) -> str:
    """A number in three digits, anything else as it is, nothing as a dash.

    >>> format_value(0.00012345), format_value("relu"), format_value(None)
    ('0.000123', 'relu', '-')
    """
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
