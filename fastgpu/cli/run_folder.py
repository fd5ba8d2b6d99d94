"""What `fastgpu train` leaves behind, so that `fastgpu export --run` can pick it up.

config.json       what was asked for
metrics.jsonl     one row per log line
tensorboard/      the same for TensorBoard
checkpoints/      to resume from
variables.npz     the trained variables, one array per leaf
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fastgpu.errors import FileError, WeightsError

CONFIG = "config.json"
VARIABLES = "variables.npz"


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write `config.json`, or check that the run in `folder` was started with the same one.

    Raises `FileError` if it was not, or if the folder cannot be written.
    """
    text = json.dumps(config, indent=1, default=str)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / CONFIG).exists():
            _replace(folder / CONFIG, text.encode())
            return
    except OSError as error:
        raise FileError(
            f"{folder} cannot be written",
            expected="a folder for the run",
            got=str(error),
            fix="give another --out",
        ) from error
    before, now = read_config(folder), json.loads(text)
    changed = [name for name in now if before.get(name) != now[name] and name != "epochs"]
    if changed:
        raise FileError(
            f"{folder} holds a run with other settings",
            expected=", ".join(f"{name}={before.get(name)!r}" for name in changed),
            got=", ".join(f"{name}={now[name]!r}" for name in changed),
            fix="repeat the settings to resume that run, or give another --out",
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a run; raises `FileError` if `folder` is not one."""
    try:
        return json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise FileError(
            f"{folder} is not a run folder",
            expected=f"a folder that fastgpu train made, with {CONFIG}",
            got=str(error),
        ) from error


def write_variables(folder: Path, variables: Any) -> Path:
    """Write every leaf under its path, such as "params/dense/kernel", all or nothing."""
    path = folder / VARIABLES
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, allow_pickle=False, **_leaves(jax.device_get(variables)))
    os.replace(partial, path)
    return path


def read_variables(folder: Path, like: Any) -> Any:
    """The trained variables, in the structure of `like`.

    Raises `FileError` if there are none, `WeightsError` if they are of another model.
    """
    path = folder / VARIABLES
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise FileError(
            f"{path} cannot be read",
            expected="the variables of a finished run",
            got=str(error),
            fix="let fastgpu train finish; the same command resumes it",
        ) from error
    expected = _leaves(like)
    for name in (*expected, *found):
        here, there = (_type(leaves.get(name)) for leaves in (expected, found))
        if here != there:
            raise WeightsError(
                f"{path} is of another model: {name!r} differs",
                expected=here,
                got=there,
                fix="give the MODEL and --set that the run was started with",
            )
    leaves = [found[name].view(leaf.dtype) for name, leaf in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _leaves(tree: Any) -> dict[str, Any]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in paths}


def _type(leaf: Any) -> str:
    # NumPy files know no bfloat16: its bytes come back as a void type of the same size
    return "nothing" if leaf is None else f"{leaf.dtype.itemsize * 8}-bit{list(leaf.shape)}"


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    os.replace(partial, path)
