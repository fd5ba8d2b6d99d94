"""`fastgpu.tune`: search, pruning, failures, resuming after a kill, and what it leaves on disk."""

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import numpy as np
import optuna
import pytest
from rich.table import Table

from fastgpu.errors import FileError, NonFiniteError, TuningError
from fastgpu.tuning import TuneResult, tune

SPACE = {
    "learning_rate": ("log", 1e-5, 1e-1),
    "weight_decay": ("uniform", 0, 0.1),
    "layers": ("int", 1, 4),
    "activation": ["relu", "gelu"],
    "epochs": 3,
}


def bowl(config, trial):
    """Best at a learning rate of 1e-3, no decay, gelu: 0."""
    return (
        (math.log10(config["learning_rate"]) + 3) ** 2
        + config["weight_decay"]
        + (config["activation"] == "relu")
    )


def search(objective, space=SPACE, **settings) -> TuneResult:
    return tune(objective, space, **{"trials": 6, "progress": False} | settings)


# --- the search -----------------------------------------------------------------------------


def test_it_finds_a_better_configuration_than_the_first():
    result = search(bowl, trials=30)
    assert result.best_value < 0.2 and result.best_value < result.trials[0].value
    assert result.best_config["activation"] == "gelu"
    assert 1e-4 < result.best_config["learning_rate"] < 1e-2


def test_the_best_configuration_is_complete_and_gives_the_best_value():
    result = search(bowl)
    config = result.best_config
    assert list(config) == list(SPACE)
    assert [type(value) for value in config.values()] == [float, float, int, str, int]
    assert bowl(config, None) == result.best_value == min(row.value for row in result.trials)
    assert result.trials[result.best_number].config == config


def test_every_drawn_value_lies_in_its_dimension():
    for row in search(bowl, trials=12).trials:
        assert 1e-5 <= row.config["learning_rate"] <= 1e-1
        assert 0 <= row.config["weight_decay"] <= 0.1
        assert row.config["layers"] in (1, 2, 3, 4)
        assert row.config["activation"] in ("relu", "gelu")
        assert row.config["epochs"] == 3


def test_the_seed_decides_every_draw():
    first, again, other = (
        [row.config for row in search(bowl, trials=12, seed=seed).trials] for seed in (0, 0, 1)
    )
    assert first == again != other


def test_maximize():
    result = search(lambda config, trial: -bowl(config, trial), direction="maximize")
    assert result.best_value == max(row.value for row in result.trials)


def test_values_may_be_arrays_of_one_element():
    assert search(lambda config, trial: np.float32(2)).best_value == 2.0


def test_bad_trials_are_pruned_and_good_ones_are_not():
    def objective(config, trial):
        for epoch in range(5):
            trial.report(epoch, config["x"] + 1 / (epoch + 1))
        return config["x"]

    result = search(objective, {"x": ("uniform", 0, 1)}, trials=20)
    pruned = [row for row in result.trials if row.state == "pruned"]
    assert pruned and result.trials[result.best_number].step == 4
    assert all(row.number >= 4 and row.step is not None and row.step < 4 for row in pruned)
    assert min(row.value for row in pruned) > result.best_value


def test_pruning_is_optunas_exception():
    def objective(config, trial):
        if trial.number >= 4:
            with pytest.raises(optuna.TrialPruned):
                trial.report(0, 10.0)
            raise optuna.TrialPruned
        trial.report(0, 1.0)
        return 1.0

    ends = [row.state for row in search(objective).trials]
    assert ends == ["complete"] * 4 + ["pruned"] * 2


def test_a_timeout_starts_no_further_trial(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("fastgpu.tuning.search.time.monotonic", lambda: next(clock))
    assert len(search(bowl, trials=100, timeout=25).trials) == 2


# --- trials that fail -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_fails_its_trial_only(value):
    result = search(lambda config, trial: value if trial.number == 1 else 1.0)
    assert [row.state for row in result.trials].count("failed") == 1
    assert (result.trials[1].value, result.trials[1].state) == (None, "failed")
    assert result.trials[1].error == f"NonFiniteError: the objective's value is {value}"


def test_a_report_that_is_not_finite_ends_its_trial():
    def objective(config, trial):
        trial.report(0, 1.0)
        trial.report(1, math.nan if trial.number == 0 else 0.5)
        return 0.5

    row = search(objective).trials[0]
    assert (row.state, row.step) == ("failed", 0)
    assert row.error == "NonFiniteError: the value at step 1 is nan"


def test_an_exception_fails_its_trial_only():
    def objective(config, trial):
        if trial.number in (0, 1, 3):
            raise MemoryError("4 GiB\nwere asked for")
        return 1.0

    result = search(objective)
    assert [row.state[0] for row in result.trials] == list("ffcfcc")
    assert result.trials[0].error == "MemoryError: 4 GiB"


def test_a_failed_trial_keeps_nothing_alive():
    """Its exception holds the frames of the objective, and they may hold a training state."""
    states = []

    def objective(config, trial):
        state = np.zeros(1000)
        assert all(earlier() is None for earlier in states)
        states.append(weakref.ref(state))
        if trial.number == 0:
            try:
                raise ValueError("not enough memory")
            except ValueError as error:
                raise RuntimeError("the trial failed") from error
        return 1.0

    rows = search(objective).trials
    assert [row.error for row in rows] == ["RuntimeError: the trial failed", *[None] * 5]


def test_a_study_whose_trials_all_raise_ends_after_three():
    def objective(config, trial):
        return config["lerning_rate"]

    with pytest.raises(TuningError) as e:
        search(objective, trials=100)
    assert str(e.value) == (
        "no trial of study 'tune' succeeded\n"
        "  expected: at least one trial that returns a finite number\n"
        "  got: 3 times KeyError: 'lerning_rate'\n"
        "  to do: call the objective once with a configuration of your own to see where it fails, "
        "or narrow the space"
    )
    assert isinstance(e.value.__cause__, KeyError)


def test_a_study_that_always_diverges_is_tried_to_the_end():
    with pytest.raises(TuningError, match="got: 6 times NonFiniteError"):
        search(lambda config, trial: math.nan)


def test_an_objective_without_a_value_is_told_what_to_return():
    with pytest.raises(TuningError, match="3 times TuningError: the objective's value is no numb"):
        search(lambda config, trial: None)


# --- the space ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (("log", 0, 1), "expected: bounds above 0, for a logarithm"),
        (("log", 1, 1e-3), "expected: low < high"),
        (("uniform", 0.5, 0.5), "expected: low < high"),
        (("uniform", 0), "two finite numbers"),
        (("uniform", 0, math.inf), "two finite numbers"),
        (("int", "1", "4"), "two finite numbers"),
        (("int", 0.5, 4), "expected: whole bounds"),
        (("unifrom", 0, 1), "to do: write 'uniform'"),
        (("relu", "gelu"), "for a choice among values write a list"),
        ((), "for a choice among values write a list"),
        ([], "expected: a list of strings, numbers, bools or None"),
        ([[1, 2], [3]], "expected: a list of strings, numbers, bools or None"),
        (["relu", "relu"], "expected: options that differ"),
        ({"nested": 1}, "let the objective hold other objects"),
        (np.tanh, "let the objective hold other objects"),
        (math.nan, "let the objective hold other objects"),
    ],
)
def test_a_dimension_that_cannot_be_read_is_refused(spec, message):
    with pytest.raises(TuningError) as e:
        search(bowl, {"rate": spec, "x": ("uniform", 0, 1)})
    text = str(e.value)
    assert text.startswith("space['rate'] cannot be read\n") and message in text
    assert f"got: {spec!r}" in text and "to do: " in text


@pytest.mark.parametrize("space", [{}, {"epochs": 3}])
def test_a_space_without_a_choice_is_refused(space):
    with pytest.raises(TuningError, match="leaves nothing to search"):
        search(bowl, space)


def test_options_may_be_of_every_plain_kind():
    options = [None, True, 1.5, 2, "two"]
    result = search(lambda config, trial: 1.0, {"x": options, "y": True}, trials=15)
    assert {repr(row.config["x"]) for row in result.trials} <= {repr(each) for each in options}
    assert result.best_config["y"] is True


@pytest.mark.parametrize(
    "settings", [{"trials": 0}, {"direction": "down"}, {"timeout": 0}], ids=str
)
def test_arguments_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        search(bowl, **settings)


# --- storage --------------------------------------------------------------------------------


def test_a_resumed_study_goes_on_to_the_total(tmp_path):
    whole = search(bowl, trials=12)
    storage = tmp_path / "runs" / "tune.db"
    search(bowl, trials=5, storage=storage)
    resumed = search(bowl, trials=12, storage=storage)
    # Each trial is seeded by its number: stopped or not, the draws are the same.
    assert [row.config for row in resumed.trials] == [row.config for row in whole.trials]
    assert resumed.best_config == whole.best_config


def test_a_finished_study_is_read_without_running(tmp_path):
    storage = tmp_path / "tune.db"
    before = search(bowl, storage=storage)

    def objective(config, trial):
        raise AssertionError("nothing is left to run")

    after = search(objective, trials=4, storage=storage)
    assert (after.best_config, len(after.trials)) == (before.best_config, 6)


def test_a_storage_holds_several_studies(tmp_path):
    storage = tmp_path / "tune.db"
    search(bowl, storage=storage, study="one")
    result = search(bowl, {"weight_decay": ("uniform", 0, 1)} | SPACE, storage=storage, study="2/b")
    assert (result.study, len(result.trials), result.plot) == ("2/b", 6, tmp_path / "tune-2_b.png")


CHILD = """
    import os, signal, sys
    from fastgpu.tuning import tune

    def objective(config, trial):
        if trial.number == 2:
            trial.report(0, 1.0)
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        return config["x"]

    tune(objective, {"x": ("uniform", 0, 1)}, trials=6, storage=sys.argv[1])
"""


def run_until_signal(storage: Path, name: str) -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(CHILD)
    return subprocess.run(
        [sys.executable, "-c", code, str(storage), name],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "100"},
    )


def resume(storage: Path) -> TuneResult:
    return search(lambda config, trial: config["x"], {"x": ("uniform", 0, 1)}, storage=storage)


def test_a_killed_study_resumes_and_its_dead_trial_is_failed(tmp_path):
    storage = tmp_path / "tune.db"
    assert run_until_signal(storage, "SIGKILL").returncode == -signal.SIGKILL
    result = resume(storage)
    assert [row.state[0] for row in result.trials] == list("ccfccc")
    assert result.trials[2].error == "the run ended during this trial"
    assert result.trials[2].value is None


def test_an_interrupted_study_stops_cleanly_and_resumes(tmp_path):
    storage = tmp_path / "tune.db"
    stopped = run_until_signal(storage, "SIGINT")
    assert stopped.returncode == -signal.SIGINT
    assert "KeyboardInterrupt\nstopped in trial 3 of 6 of study 'tune'\n" in stopped.stderr
    assert f"the same call goes on with the study in {storage}" in stopped.stderr
    with sqlite3.connect(storage) as database:
        states = database.execute("select state from trials order by number").fetchall()
    assert [state for (state,) in states] == ["COMPLETE", "COMPLETE", "FAIL"]
    assert [row.state[0] for row in resume(storage).trials] == list("ccfccc")


def test_progress_is_one_line_per_trial_then_the_table(capsys):
    search(lambda config, trial: 0.5, {"x": ("int", 1, 1000), "k": 2}, trials=2, progress=True)
    out, err = capsys.readouterr()
    first, second, title, *_ = err.splitlines()
    assert out == ""
    assert first.startswith("trial 0 (of 2): x=") and "complete 0.5 best=0.5" in first
    assert second.startswith("trial 1 (of 2): x=")
    assert title.strip() == "tune: 2 complete, 0 pruned, 0 failed; minimized to 0.5"


def test_nothing_is_printed_without_progress_and_optunas_logging_is_left_alone(capsys):
    before = optuna.logging.get_verbosity()
    search(bowl)
    assert capsys.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == before


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"layers": ("int", 1, 8)}, "'layers' was int 1 to 4, is int 1 to 8"),
        ({"epochs": 4}, "'epochs' was always 3, is always 4"),
        ({"momentum": ("uniform", 0, 1)}, "'momentum' was absent, is uniform 0.0 to 1.0"),
        ({"activation": ["relu"]}, "'activation' was one of ['relu', 'gelu'], is one of ['relu']"),
    ],
)
def test_another_space_cannot_resume_a_study(tmp_path, change, difference):
    storage = tmp_path / "tune.db"
    search(bowl, trials=1, storage=storage)
    with pytest.raises(TuningError) as e:
        search(bowl, SPACE | change, storage=storage)
    assert f"\n  got: {difference}\n  to do: put the old ones back" in str(e.value)
    assert len(search(bowl, trials=2, storage=storage).trials) == 2


def test_another_direction_cannot_resume_a_study(tmp_path):
    storage = tmp_path / "tune.db"
    search(bowl, trials=1, storage=storage)
    with pytest.raises(TuningError, match="direction was minimize, is maximize"):
        search(bowl, storage=storage, direction="maximize")


def test_a_study_that_optuna_made_is_not_taken_over(tmp_path):
    storage = tmp_path / "tune.db"
    study = optuna.create_study(storage=f"sqlite:///{storage}", study_name="tune")
    study.add_trial(optuna.create_trial(value=1.0))
    with pytest.raises(TuningError, match=r"'learning_rate' was absent, is log 1e-05 to 0\.1"):
        search(bowl, storage=storage)


def test_a_storage_in_use_is_refused(tmp_path):
    storage = tmp_path / "tune.db"

    def objective(config, trial):
        if trial.number == 0:
            with pytest.raises(FileError, match=r"tune\.db is in use\n  expected: one process at"):
                search(bowl, storage=storage)
        return 1.0

    assert len(search(objective, storage=storage).trials) == 6


@pytest.mark.parametrize("content", [b"not a database", b"SQLite format 3\0 cut short"])
def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path, content):
    storage = tmp_path / "tune.db"
    storage.write_bytes(content)
    with pytest.raises(FileError, match=r"tune\.db (is no SQLite|cannot be opened)"):
        search(bowl, storage=storage)
    assert storage.read_bytes() == content


def test_a_read_only_folder_is_refused():
    """/proc is one in which not even root may make a file."""
    with pytest.raises(FileError) as e:
        search(bowl, storage="/proc/tune.db")
    assert str(e.value) == (
        "/proc/tune.db cannot be written\n"
        "  expected: a folder that this user may write to\n"
        "  got: unable to open database file\n"
        "  to do: give another storage, or none to keep the study in memory"
    )


def test_a_folder_that_cannot_be_made_is_refused_before_any_trial(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(FileError, match=r"cannot be written(.|\n)*to do: give another storage"):
        search(bowl, storage=tmp_path / "runs" / "tune.db")


def test_a_url_is_refused():
    with pytest.raises(TuningError, match="expected: the path of an SQLite file"):
        search(bowl, storage="sqlite:///tune.db")


def test_names_that_a_url_would_misread_are_fine(tmp_path):
    storage = tmp_path / "100% of #1?.db"
    assert search(bowl, trials=2, storage=storage).storage == storage
    assert storage.exists()


# --- the result -----------------------------------------------------------------------------


def mixed(config, trial):
    trial.report(0, config["learning_rate"])
    if trial.number == 1:
        raise ValueError("no such activation")
    return config["learning_rate"]


def test_the_table_puts_the_best_first_and_explains_failures():
    result = search(mixed, trials=12)
    lines = str(result).splitlines()
    assert lines[0].startswith("tune: ") and " 1 failed; minimized to " in lines[0]
    assert lines[2].split()[:4] == ["trial", "state", "value", "learning_rate"]
    assert lines[4].split()[:2] == [str(result.best_number), "complete"]
    assert lines[-1].strip() == "trial 1 failed: ValueError: no such activation"
    assert "epochs" not in str(result) and isinstance(result.__rich__(), Table)


def test_the_table_shows_brackets_as_they_are():
    def objective(config, trial):
        if trial.number == 1:
            raise ValueError("no shape [3] [/a]")
        return 1.0

    text = str(search(objective, {"shape [px]": ["[8]", "[/16]"]}))
    assert "ValueError: no shape [3] [/a]" in text and "shape [px]" in text and "[8]" in text


def test_json_holds_everything_and_is_strict(tmp_path):
    result = search(mixed, trials=12, storage=tmp_path / "tune.db")
    read = json.loads(result.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert read["best_config"] == result.best_config
    assert read["trials"][1]["value"] is None
    assert (read["storage"], read["plot"]) == (str(result.storage), str(result.plot))


def test_the_plot_is_a_png_beside_the_storage(tmp_path):
    result = search(mixed, trials=12, storage=tmp_path / "tune.db")
    assert result.plot == tmp_path / "tune.png"
    assert result.plot.read_bytes().startswith(b"\x89PNG\r\n")
    assert {path.name for path in tmp_path.iterdir()} == {"tune.db", "tune.db.lock", "tune.png"}


def test_a_study_in_memory_leaves_no_file_unless_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert search(bowl).plot is None and list(tmp_path.iterdir()) == []
    assert search(bowl, plot="figures/lr.png").plot == Path("figures/lr.png")
    assert (tmp_path / "figures" / "lr.png").stat().st_size > 1000


def test_a_plot_that_cannot_be_written_leaves_nothing(tmp_path):
    target = tmp_path / "taken.png"
    target.mkdir()
    with pytest.raises(FileError, match="to do: give another plot path"):
        search(bowl, plot=target)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]


def test_results_are_frozen():
    with pytest.raises(AttributeError):
        search(bowl).best_value = 0.0


def test_nonfinite_losses_of_fit_count_as_divergence():
    def objective(config, trial):
        if trial.number < 4:
            raise NonFiniteError("the loss is nan at step 3")
        return 1.0

    assert search(objective).best_value == 1.0
