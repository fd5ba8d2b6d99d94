"""`tune`: draw a configuration, run the objective, tell the study, until there are enough trials.

Trial n draws with a random generator seeded by (`seed`, n) alone, so that a study that was stopped
between two trials goes on with the very trials it would have had.
"""

import math
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Console

from fastgpu.errors import NonFiniteError, TuningError, require
from fastgpu.tuning.plot import save_plot
from fastgpu.tuning.result import INTERRUPTED, TrialRow, TuneResult, format_value
from fastgpu.tuning.space import Constant, Dimension, parse
from fastgpu.tuning.study import open_study

if TYPE_CHECKING:
    import optuna

Objective = Callable[[dict[str, Any], "Trial"], Any]
# Nothing has worked, and this many trials raised: the objective is wrong, not the configurations.
_GIVE_UP_AFTER = 3


class Trial:
    """What the objective is given beside its configuration, to report on the way."""

    def __init__(self, trial: "optuna.Trial") -> None:
        self._trial = trial

    @property
    def number(self) -> int:
        """The place of this trial in the study, from 0."""
        return self._trial.number

    def report(self, step: int, value: Any) -> None:
        """Tell the study the `value` (a scalar) reached at `step` (epoch or training step).

        Raises `optuna.TrialPruned`, which should pass through the objective, when the value is
        worse than the median of earlier trials at this step; and `NonFiniteError` when it is NaN
        or infinite, which ends the trial as failed.
        """
        self._trial.report(_finite(value, f"the value at step {step}"), int(step))
        if self._trial.should_prune():
            raise require("optuna", "tune").TrialPruned(f"pruned at step {step}")


def tune(
    objective: Objective,
    space: Mapping[str, Any],
    *,
    trials: int = 20,
    direction: Literal["minimize", "maximize"] = "minimize",
    storage: str | Path | None = None,
    study: str = "tune",
    seed: int = 0,
    timeout: float | None = None,
    plot: str | Path | None = None,
    progress: bool = True,
) -> TuneResult:
    """Search `space` for the configuration with the best `objective(config, trial)`.

    Tree-structured Parzen estimator (Bergstra et al., 2011) with median pruning, by optuna.

    Args:
      objective: `(config, trial) -> number`. `config` has a value for every name in `space`.
        `trial.report(step, value)` on the way lets bad trials end early.
      space: name -> `("log", low, high)`, `("uniform", low, high)`, `("int", low, high)` with both
        bounds included, a list of options, or a constant.
      trials: how many there are in the end. Every trial that began counts, also one that failed or
        was killed; a resumed study makes up the difference.
      direction: what is better.
      storage: an SQLite file such as "runs/tune.db", made if need be, to resume from; in memory if
        None. One process at a time may use it.
      study: the name of the study in the storage, which can hold several.
      seed: of the search. The objective seeds itself.
      timeout: seconds after which this call starts no further trial.
      plot: where the PNG goes; by default beside the storage, and nowhere without one.
      progress: whether to print a line per trial, and the table, to stderr.

    A trial whose objective raises, or returns NaN or infinity, is marked failed and the search
    goes on. SIGINT marks the running trial failed and raises `KeyboardInterrupt`; the same call
    again resumes.

    Raises `TuningError` if the space cannot be read, if no trial succeeded (after three, when all
    of them raised), or if the stored study searched something else; `FileError` if the storage or
    plot cannot be used.

    >>> def objective(config, trial):
    ...     return (config["x"] - 1) ** 2 + config["offset"]
    >>> result = tune(objective, {"x": ("uniform", -5, 5), "offset": 2}, trials=30, progress=False)
    >>> abs(result.best_config["x"] - 1) < 0.5, result.best_config["offset"]
    (True, 2)
    """
    _check_arguments(trials, direction, timeout)
    require("matplotlib", "tune")
    dimensions = parse(space)
    path = _storage_path(storage)
    plot_path = Path(plot) if plot is not None else _plot_path(path, study)
    with open_study(path, study, direction, dimensions) as opened:
        try:
            _search(objective, dimensions, opened, trials, seed, timeout, _printer(progress))
        except KeyboardInterrupt as stop:
            stop.add_note(f"stopped in trial {len(opened.trials)} of {trials} of study {study!r}")
            if path is not None:
                stop.add_note(f"the same call goes on with the study in {path}")
            raise
        result = _result(opened, dimensions, direction, path, plot_path)
    if plot_path is not None:
        save_plot(plot_path, result, dimensions)
    _printer(progress)(result)
    return result


def _search(
    objective: Objective,
    dimensions: Mapping[str, Dimension],
    study: "optuna.Study",
    trials: int,
    seed: int,
    timeout: float | None,
    say: Callable[[Any], None],
) -> None:
    samplers, pruners = require("optuna.samplers", "tune"), require("optuna.pruners", "tune")
    # A short search cannot spend its first ten trials, optuna's default, on random draws.
    startup = max(4, min(10, trials // 4))
    study.pruner = pruners.MedianPruner(n_startup_trials=startup)
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    errors: list[Exception] = []
    while (
        number := len(study.get_trials(deepcopy=False))
    ) < trials and time.monotonic() < deadline:
        study.sampler = samplers.TPESampler(
            seed=_trial_seed(seed, number), n_startup_trials=startup
        )
        error = _run_trial(objective, dimensions, study)
        say(_line(study, trials))
        if error is not None and not isinstance(error, NonFiniteError):
            errors.append(error)
        if len(errors) == _GIVE_UP_AFTER and not _any_trial(study, "COMPLETE", "PRUNED"):
            raise _nothing_succeeded(study) from errors[-1]
    if not _any_trial(study, "COMPLETE"):
        raise _nothing_succeeded(study) from (errors[-1] if errors else None)


def _run_trial(
    objective: Objective, dimensions: Mapping[str, Dimension], study: "optuna.Study"
) -> Exception | None:
    """One trial, told to the study whatever happens; the exception if it failed."""
    optuna = require("optuna", "tune")
    states = optuna.trial.TrialState
    trial = study.ask()
    try:
        config = {name: dimension.suggest(trial, name) for name, dimension in dimensions.items()}
        value = _finite(objective(config, Trial(trial)), "the objective's value")
    except optuna.TrialPruned:
        study.tell(trial, state=states.PRUNED)
    except Exception as error:
        trial.set_user_attr("error", _first_line(error))
        study.tell(trial, state=states.FAIL)
        _release(error)
        return error
    except BaseException:
        trial.set_user_attr("error", INTERRUPTED)
        study.tell(trial, state=states.FAIL)
        raise
    else:
        study.tell(trial, value)
    return None


def _finite(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TuningError(
            f"{what} is no number",
            expected="a number, or an array with one element",
            got=type(value).__name__,
            fix="return the validation loss or score, for example float(metrics['loss'])",
        ) from error
    if not math.isfinite(number):
        raise NonFiniteError(f"{what} is {number}")
    return number


def _result(
    study: "optuna.Study",
    dimensions: Mapping[str, Dimension],
    direction: Literal["minimize", "maximize"],
    storage: Path | None,
    plot: Path | None,
) -> TuneResult:
    constants = {name: d.value for name, d in dimensions.items() if isinstance(d, Constant)}
    rows = tuple(TrialRow.of(trial, constants) for trial in study.get_trials(deepcopy=False))
    best = rows[study.best_trial.number]
    return TuneResult(
        best_config={name: best.config[name] for name in dimensions},
        best_value=study.best_value,
        best_number=best.number,
        direction=direction,
        study=study.study_name,
        searched=tuple(name for name in dimensions if name not in constants),
        trials=rows,
        storage=storage,
        plot=plot,
    )


def _nothing_succeeded(study: "optuna.Study") -> TuningError:
    rows = [TrialRow.of(trial, {}) for trial in study.get_trials(deepcopy=False)]
    ends = Counter(row.error or row.state for row in rows)
    return TuningError(
        f"no trial of study {study.study_name!r} succeeded",
        expected="at least one trial that returns a finite number",
        got="; ".join(f"{count} times {end}" for end, count in ends.most_common(5)),
        fix="call the objective once with a configuration of your own to see where it fails, "
        "or narrow the space",
    )


def _any_trial(study: "optuna.Study", *states: str) -> bool:
    trials = study.get_trials(deepcopy=False)
    return any(trial.state.name in states for trial in trials)


def _line(study: "optuna.Study", trials: int) -> str:
    row = TrialRow.of(study.get_trials(deepcopy=False)[-1], {})
    config = " ".join(f"{name}={format_value(value)}" for name, value in row.config.items())
    end = row.error or format_value(row.value)
    best = format_value(study.best_value) if _any_trial(study, "COMPLETE") else "-"
    return (
        f"trial {row.number} (of {trials}): {config} {row.state} {end} "
        f"best={best} {row.seconds:.1f} s"
    )


def _trial_seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def _release(error: BaseException | None) -> None:
    """Drop what the frames of `error` hold: it may be a training state, on the device."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _printer(progress: bool) -> Callable[[Any], None]:
    # One line per trial in a log file, whatever its width; a table fits itself to the terminal.
    console = Console(stderr=True, quiet=not progress, highlight=False)
    return lambda what: console.print(what, markup=False, soft_wrap=isinstance(what, str))


def _storage_path(storage: str | Path | None) -> Path | None:
    if storage is None:
        return None
    if "://" in str(storage):
        raise TuningError(
            "`storage` is a URL",
            expected='the path of an SQLite file, such as "runs/tune.db"',
            got=repr(storage),
            fix="give a path; fastgpu.tune resumes from SQLite only",
        )
    return Path(storage)


def _plot_path(storage: Path | None, study: str) -> Path | None:
    if storage is None:
        return None
    name = re.sub(r"[^\w.-]+", "_", study)
    return storage.with_name(
        f"{storage.stem}-{name}.png" if name != "tune" else f"{storage.stem}.png"
    )


def _check_arguments(trials: int, direction: str, timeout: float | None) -> None:
    if trials < 1:
        raise ValueError(f"`trials` is a count of at least 1, not {trials}")
    if direction not in ("minimize", "maximize"):
        raise ValueError(f"`direction` is 'minimize' or 'maximize', not {direction!r}")
    if timeout is not None and timeout <= 0:
        raise ValueError(f"`timeout` is a number of seconds above 0, not {timeout}")
