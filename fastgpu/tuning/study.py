"""A study on disk: opened by one process at a time, resumed only if it is the same search."""

import json
import sqlite3
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpu.errors import FileError, TuningError, require
from fastgpu.tuning.space import Dimension

if TYPE_CHECKING:
    import optuna


@contextmanager
def open_study(
    path: Path | None, name: str, direction: str, dimensions: Mapping[str, Dimension]
) -> "Generator[optuna.Study]":
    """The study `name` in the SQLite file `path`, new or resumed; in memory when `path` is None.

    Trials that a killed process left running are marked failed: the file is locked while it is
    open, so nobody can be working on them. Raises `FileError` for a file that is in use, cannot be
    written, or is no database; `TuningError` when the study in it searches something else.
    """
    optuna = require("optuna", "tune")
    with _quiet(optuna.logging), _opened(path) as storage:
        study = optuna.create_study(
            study_name=name, storage=storage, direction=direction, load_if_exists=True
        )
        _claim(study, direction, dimensions)
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        yield study


@contextmanager
def _quiet(logging: Any) -> Generator[None]:
    """Without optuna's own lines, one per study and trial; its errors still come through."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _opened(path: Path | None) -> "Generator[optuna.storages.BaseStorage]":
    if path is None:
        yield require("optuna.storages", "tune").InMemoryStorage()
        return
    with _locked(path):
        storage = _connect(path)
        try:
            yield storage
        finally:
            storage.remove_session()
            storage.engine.dispose()


@contextmanager
def _locked(path: Path) -> Generator[None]:
    """Hold `path` + ".lock" as an exclusive SQLite transaction.

    The operating system drops the lock with the process, however that ends, on every platform.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(f"{path}.lock", timeout=0, isolation_level=None)
    except (OSError, sqlite3.Error) as error:
        raise _unwritable(path, error) from error
    with closing(connection):
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise _unwritable(path, error) from error
            raise FileError(
                f"{path} is in use",
                expected="one process at a time",
                got="another one that is tuning with this storage",
                fix="wait for it, stop it, or give another storage",
            ) from error
        yield


def _connect(path: Path) -> "optuna.storages.RDBStorage":
    optuna, sqlalchemy = require("optuna", "tune"), require("sqlalchemy", "tune")
    # An optuna database holds this header from its first byte on; a new file is still empty.
    header = path.read_bytes()[:16] if path.exists() else b""
    if header and header != b"SQLite format 3\x00":
        raise FileError(
            f"{path} is no SQLite database",
            expected="a file that fastgpu.tune made, or a new name",
            got=f"a file that starts with {header!r}",
            fix="give another storage",
        )
    url = sqlalchemy.engine.URL.create("sqlite", database=str(path)).render_as_string()
    try:
        return optuna.storages.RDBStorage(url)
    except (sqlalchemy.exc.SQLAlchemyError, RuntimeError) as error:
        raise FileError(
            f"{path} cannot be opened as an optuna storage",
            expected=f"a database of optuna {optuna.__version__}",
            got=str(error).splitlines()[0],
            fix="give another storage, or install the optuna that wrote it",
        ) from error


def _claim(study: "optuna.Study", direction: str, dimensions: Mapping[str, Dimension]) -> None:
    """Record what a new study searches; raise if an old one searched something else."""
    now = {name: str(dimension) for name, dimension in dimensions.items()}
    recorded = study.user_attrs.get("space")
    if recorded is None and not study.trials:
        study.set_user_attr("space", json.dumps(now))
        recorded = json.dumps(now)
    before = json.loads(recorded) if recorded else {}
    old_direction = study.direction.name.lower()
    differences = [
        f"{key!r} was {before.get(key, 'absent')}, is {now.get(key, 'absent')}"
        for key in before | now
        if before.get(key) != now.get(key)
    ]
    if old_direction != direction:
        differences.append(f"direction was {old_direction}, is {direction}")
    if differences:
        raise TuningError(
            f"study {study.study_name!r} cannot be resumed: it searched something else",
            expected="the same space and direction as before",
            got="; ".join(differences),
            fix='put the old ones back, or start another with study="..." or another storage',
        )


def _unwritable(path: Path, error: Exception) -> FileError:
    return FileError(
        f"{path} cannot be written",
        expected="a folder that this user may write to",
        got=str(error),
        fix="give another storage, or none to keep the study in memory",
    )
