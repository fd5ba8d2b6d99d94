"""Checkpoints of a run: the state, its place in the data, all or nothing.

Written with orbax into `run_dir/checkpoints/<step>/`. Leaves are saved under their paths, so that
any pytree of parameters and any optimizer's state can be read back, and a checkpoint can be opened
with orbax alone. orbax writes beside the final folder and renames it when everything is on disk: a
run killed while saving leaves the checkpoint before it.
"""

import json
import logging
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from fastgpu.errors import CheckpointError
from fastgpu.training.leaves import first_difference, leaf_types

_log = logging.getLogger("fastgpu")
_FOLDER = "checkpoints"
_CHECKSUMS = "checksums.json"


def require_writable(run_dir: Path) -> None:
    """Make `run_dir`, or raise `CheckpointError` if files cannot be written there."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise CheckpointError(
            f"the run directory {run_dir} cannot be written",
            expected="a folder that this user may write, or a place to make one",
            got=f"{type(error).__name__}: {error.strerror or error}",
            fix="pass another run_dir, or change the folder's permissions",
        ) from error


def saved_steps(run_dir: Path) -> list[int]:
    """The steps that `run_dir` has a checkpoint of, newest first."""
    folder = run_dir / _FOLDER
    # orbax gives a folder its bare number only when everything in it is on disk.
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def restore(run_dir: Path, state: Any) -> tuple[Any, dict[str, Any]] | None:
    """The newest readable checkpoint in the form of `state`, and the notes saved with it.

    None if there is no checkpoint. One that cannot be read is skipped with a warning. Changes no
    file. Raises `CheckpointError` if none can be read, or if the checkpoint holds leaves of other
    shapes or dtypes than `state`: then it is another run's.
    """
    steps = saved_steps(run_dir)
    failures = []
    for step in steps:
        try:
            _require_intact(_folder(run_dir, step))
            notes = read_notes(run_dir, step)
            _require_same_leaves(run_dir, step, notes["leaves"], state)
            return _read_state(run_dir, step, state), notes
        except CheckpointError:
            raise
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
            reason = str(error).splitlines()[0] if str(error) else ""
            failures.append(f"step {step}: {type(error).__name__} {reason[:200]}")
            text = "a checkpoint in %s cannot be read, trying an older one: %s"
            _log.warning(text, run_dir, failures[-1])
    if failures:
        raise CheckpointError(
            f"no checkpoint in {run_dir / _FOLDER} can be read",
            expected="at least one complete checkpoint",
            got="; ".join(failures),
            fix="restore the folder from a copy, or start again in another run_dir",
        )
    return None


def read_notes(run_dir: Path, step: int) -> dict[str, Any]:
    """What was saved beside the state."""
    notes = _read(run_dir, step, notes=ocp.args.JsonRestore())["notes"]
    if not isinstance(notes, dict) or "leaves" not in notes:
        raise ValueError("the notes beside the state are missing")
    return notes


class CheckpointWriter:
    """Saves into `run_dir`, keeping the newest `keep` checkpoints. Use as a context manager.

    `after` is the step that the run starts from: checkpoints of later steps, which could not be
    read, are moved aside to `<step>.unreadable`.
    """

    def __init__(self, run_dir: Path, keep: int, after: int) -> None:
        for step in saved_steps(run_dir):
            if step > after:
                _move_aside(_folder(run_dir, step))
        self.path = run_dir.resolve() / _FOLDER
        for unfinished in self.path.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.path, options=options)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self._manager.close()

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> Path:
        """Write a checkpoint, unless that step has one; returns its folder."""
        if self._manager.latest_step() != step:
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(_arrays(state)),
                notes=ocp.args.JsonSave({**notes, "leaves": leaf_types(state)}),
            )
            try:
                self._manager.save(step, args=args)
                _write_checksums(self.path / str(step))
            except OSError as error:
                raise CheckpointError(
                    f"the checkpoint of step {step} cannot be written to {self.path}",
                    got=f"{type(error).__name__}: {error}",
                    fix="free some space; the checkpoints before it are as they were",
                ) from error
        return self.path / str(step)


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir.resolve() / _FOLDER / str(step)


def _checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of the files of the arrays and notes: orbax would not see a flipped bit."""
    files = [path for item in ("state", "notes") for path in (folder / item).rglob("*")]
    return {p.relative_to(folder).as_posix(): _crc32(p) for p in sorted(files) if p.is_file()}


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(2**24):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _write_checksums(folder: Path) -> None:
    temporary = folder / f"{_CHECKSUMS}.tmp"
    temporary.write_text(json.dumps(_checksums(folder)))
    temporary.rename(folder / _CHECKSUMS)


def _require_intact(folder: Path) -> None:
    """Raise `ValueError` naming the file that is missing or differs from what was saved."""
    if not (folder / _CHECKSUMS).exists():  # killed before they were written: the files are whole
        return
    expected, got = json.loads((folder / _CHECKSUMS).read_text()), _checksums(folder)
    for name, checksum in expected.items():
        if got.get(name) != checksum:
            raise ValueError(f"{name} is {'damaged' if name in got else 'missing'}")


def _read(run_dir: Path, step: int, **items: Any) -> Any:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(_folder(run_dir, step), args=ocp.args.Composite(**items))


def _arrays(state: Any) -> dict[str, np.ndarray]:
    """Leaves by path on the host: a random key as its words, and no empty array (orbax refuses)."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        if array.size:
            arrays[jax.tree_util.keystr(path)] = array
    return arrays


def _read_state(run_dir: Path, step: int, state: Any) -> Any:
    template = {path: np.empty_like(array) for path, array in _arrays(state).items()}
    arrays = _read(run_dir, step, state=ocp.args.StandardRestore(template))["state"]

    def read(path: Any, leaf: Any) -> Any:
        array = arrays.get(jax.tree_util.keystr(path))
        if array is None:
            return leaf
        device = leaf.sharding if isinstance(leaf, jax.Array) and leaf.committed else None
        if not _is_key(leaf):
            return jax.device_put(array, device, may_alias=False)
        key = jax.random.wrap_key_data(jax.numpy.asarray(array), impl=jax.random.key_impl(leaf))
        return jax.device_put(key, device)

    return jax.tree_util.tree_map_with_path(read, state)


def _require_same_leaves(run_dir: Path, step: int, saved: dict[str, str], state: Any) -> None:
    difference = first_difference(saved, leaf_types(state))
    if difference is not None:
        path, before, now = difference
        raise CheckpointError(
            f"the checkpoint of step {step} in {run_dir} is of another run: state{path} differs",
            expected=f"{now}, as in the state given",
            got=f"{before} in the checkpoint",
            fix="pass another run_dir, or the model and optimizer that wrote this one",
        )


def _move_aside(folder: Path) -> None:
    target = folder.with_name(f"{folder.name}.unreadable")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.unreadable-{number}")
    folder.rename(target)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
