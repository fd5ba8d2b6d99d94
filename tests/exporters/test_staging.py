"""A target folder appears whole or not at all."""

import os
import stat
import tempfile
from pathlib import Path

import pytest

from fastgpu.errors import ExportError
from fastgpu.exporters.staging import staged_folder


def _publish(target, text="new", overwrite=False):
    with staged_folder(target, overwrite=overwrite, marker="model") as work:
        (work / "new").mkdir()
        (work / "new" / "model").write_text(text)
        (work / "scratch").write_text("not part of it")


def test_the_folder_appears_with_its_missing_parents(tmp_path):
    _publish(tmp_path / "a" / "b")
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["model"]
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_when_the_block_fails(tmp_path, error):
    with (
        pytest.raises(error),
        staged_folder(tmp_path / "a" / "b", overwrite=False, marker="model") as work,
    ):
        (work / "new").mkdir()
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_not_an_earlier_export_is_never_touched(tmp_path, kind, overwrite):
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("precious")
    elif kind == "folder":
        target.mkdir()
        (target / "thesis.tex").write_text("precious")
    else:
        target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match="to do: choose another path"):
        _publish(target, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["target"]
    if kind == "folder":
        assert os.listdir(target) == ["thesis.tex"]


def test_an_earlier_export_is_replaced_only_on_request(tmp_path):
    _publish(tmp_path / "out", "old")
    with pytest.raises(ExportError, match="overwrite=True"):
        _publish(tmp_path / "out")
    assert (tmp_path / "out" / "model").read_text() == "old"
    _publish(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_replacement_puts_the_old_one_back(tmp_path, monkeypatch):
    _publish(tmp_path / "out", "old")
    rename = os.rename

    def fails_on_new(source, destination):
        if Path(source).name == "new":
            raise OSError(28, "No space left on device")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fails_on_new)
    with pytest.raises(ExportError, match="No space left"):
        _publish(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_parent_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write") as caught:
        _publish(tmp_path / "file" / "out")
    assert "got: Not a directory" in str(caught.value)


@pytest.fixture
def read_only_folder():
    """A folder that the test's effective user may not write to; root's rights are laid down."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IRGRP | stat.S_IXGRP | 0o005)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.rmdir()


def test_a_read_only_folder_is_a_clear_error(read_only_folder):
    with pytest.raises(ExportError, match="cannot write") as caught:
        _publish(read_only_folder / "out")
    message = str(caught.value)
    assert f"expected: '{read_only_folder}' to be a folder that this user may write to" in message
    assert "got: Permission denied" in message and "to do:" in message
    assert os.listdir(read_only_folder) == []
