"""A folder that appears whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastgpu.errors import ExportError


@contextmanager
def staged_folder(target: Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """Yield an empty working folder; its subfolder `new` becomes `target` when the block succeeds.

    The working folder lies beside the target, on the same file system, so that the last step is
    one rename. It is removed in every case. With `overwrite`, an existing target that holds a file
    named `marker` is replaced, and put back if the rename fails.

    Raises `ExportError` when the target exists (and is not such a folder), or when its parent is
    not a folder that can be written to.
    """
    _check_replaceable(target, overwrite, marker)
    anchor = next(p for p in target.parents if os.path.lexists(p))
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=anchor))
    except OSError as error:
        raise ExportError(
            f"cannot write {str(target)!r}",
            expected=f"{str(anchor)!r} to be a folder that this user may write to",
            got=error.strerror or str(error),
            fix="choose a path in a folder of yours, or change its permissions",
        ) from error
    try:
        yield work
        _publish(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_replaceable(target: Path, overwrite: bool, marker: str) -> None:
    if not os.path.lexists(target):
        return
    kind = "folder" if target.is_dir() else "file"
    if not overwrite:
        raise ExportError(
            f"the export target {str(target)!r} exists",
            expected="a path at which there is nothing yet",
            got=f"an existing {kind}",
            fix="choose another path, or pass overwrite=True to replace an earlier export",
        )
    if target.is_symlink() or not target.is_dir() or not _is_export(target, marker):
        raise ExportError(
            f"the export target {str(target)!r} is not an earlier export",
            expected=f"an empty folder, or one with a {marker!r} in it",
            got=f"another {kind}",
            fix="choose another path; overwrite=True replaces earlier exports only",
        )


def _is_export(folder: Path, marker: str) -> bool:
    names = os.listdir(folder)
    return not names or marker in names


def _publish(work: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    previous = work / "previous"
    if target.exists():
        os.rename(target, previous)
    try:
        os.rename(work / "new", target)
    except OSError as error:
        if previous.exists():
            os.rename(previous, target)
        raise ExportError(
            f"cannot put the export in its place at {str(target)!r}",
            got=error.strerror or str(error),
            fix="see that no other process writes to this path, and export again",
        ) from error
