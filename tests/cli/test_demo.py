"""`fastgpu demo`: the whole path on real data, and what it does with the folder it is given."""

import json
import os
import subprocess
import sys

import pytest

import fastgpu.cli.demo as demo
from fastgpu.errors import FastGPUError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "fastgpu", "demo", "--out", out]
    environment = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


@pytest.mark.slow
def test_the_demo_reaches_its_accuracy_in_jax_and_in_tensorflow(finished):
    out, _ = finished
    result = json.loads((out / "demo.json").read_text())
    assert result["accuracy_before"] < result["accuracy_after"]
    assert result["accuracy_after"] >= 0.98
    assert result["accuracy_in_tensorflow"] == pytest.approx(result["accuracy_after"])
    assert result["import_difference"] < 1e-6
    sides = {row["side"] for row in result["benchmark"]["rows"]}
    assert sides == {"fastgpu", "unoptimized", "keras-jax", "keras-tensorflow"}


@pytest.mark.slow
def test_the_demo_prints_six_steps_one_table_and_files_that_exist(finished):
    out, printed = finished
    steps = ("prepare", "import", "tune", "optimize", "fine-tune and measure", "deploy")
    places = [printed.index(f"{number} · {step}") for number, step in enumerate(steps, 1)]
    assert places == sorted(places)
    table = printed[printed.index("the result") :]
    for words in ("test accuracy, fine-tuned", "Keras fit on TensorFlow", "compiled peak memory"):
        assert words in table
    for name in ("digits.keras", "digits.npz", "tune.db", "run", "saved_model", "demo.json"):
        assert (out / name).exists() and name in table


class _Stopped(Exception):
    """Raised in place of the first step."""


@pytest.fixture
def only_the_folder(monkeypatch):
    def prepare(out):
        raise _Stopped

    monkeypatch.setattr(demo, "prepare", prepare)


@pytest.mark.usefixtures("only_the_folder")
def test_an_earlier_demo_is_replaced_even_if_it_was_stopped(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(_Stopped):
        demo.run(out)
    (out / "left_over").write_text("")
    with pytest.raises(_Stopped):
        demo.run(out)
    assert [path.name for path in out.iterdir()] == ["demo.json"]


@pytest.mark.usefixtures("only_the_folder")
def test_a_folder_with_other_files_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for target in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(FastGPUError, match="not the folder of an earlier demo") as caught:
            demo.run(target)
        assert "to do: name another folder" in str(caught.value)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_failing_script_says_its_last_words(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("raise ValueError('no digits today')")
    with pytest.raises(FastGPUError, match="got: ValueError: no digits today"):
        demo._run_script(str(script))
