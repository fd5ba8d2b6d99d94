"""The command as a script uses it: a process, its exit code, what it prints and leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import fastgpu as fgpu
import fastgpu.cli
from fastgpu.cli.run_folder import read_variables
from fastgpu.errors import FastGPUError

COMMANDS = ("env", "import", "inspect", "tune", "train", "benchmark", "export", "demo")


def fastgpu_command(*arguments: object, cwd: Path, status: int = 0) -> tuple[str, str]:
    """Run `fastgpu ...`; returns what it printed to stdout and stderr."""
    result = subprocess.run(
        [sys.executable, "-m", "fastgpu", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"XDG_CACHE_HOME": str(cwd)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds model.keras, and data.npz with clusters that a small model can tell apart."""
    import keras

    folder = tmp_path_factory.mktemp("cli")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    model.save(folder / "model.keras")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 96)
    inputs = rng.normal(size=(96, 4)).astype(np.float32) + 3 * np.eye(3, 4)[labels]
    np.savez(folder / "data.npz", inputs=inputs.astype(np.float32), labels=labels)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = CliRunner().invoke(fastgpu.cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: fastgpu {command}" in result.output


def test_env_is_for_people_and_for_scripts(tmp_path: Path) -> None:
    text, _ = fastgpu_command("env", cwd=tmp_path)
    assert text.startswith(f"fastgpu {fgpu.__version__}\nfastgpu runs on cpu")
    data = json.loads(fastgpu_command("env", "--json", cwd=tmp_path)[0])
    assert data["versions"]["jax"] and data["extras"]["keras"] is True


def test_import_reports_every_layer(folder: Path) -> None:
    out, _ = fastgpu_command("import", "model.keras", "--json", cwd=folder)
    report = json.loads(out)
    assert report["parameter_count"] == 4 * 8 + 8 + 8 * 3 + 3
    assert {entry["status"] for entry in report["entries"]} == {"mapped"}


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("import", "missing.keras"), 1, "missing.keras"),
        (("import", "data.npz"), 1, "expected:"),
        (("inspect", "resnet19"), 1, "neither a file nor a model"),
        (("inspect", "mlp"), 1, "add --shape"),
        (("train", "model.keras", "model.keras", "--out", "r"), 1, "cannot be read"),
    ],
)
def test_a_failure_is_one_clear_line_and_an_exit_code(
    arguments: tuple[str, ...], status: int, said: str, folder: Path
) -> None:
    out, err = fastgpu_command(*arguments, cwd=folder, status=status)
    assert out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith("fastgpu: ") and said in line
    assert not (folder / "r").exists()


def test_inspect_shows_the_passes(folder: Path) -> None:
    out, _ = fastgpu_command("inspect", "model.keras", "--batch-size", 2, "--json", cwd=folder)
    assert [row["pass"] for row in json.loads(out)["passes"]][:2] == ["inline", "cse"]


def test_train_leaves_a_run_that_can_be_resumed_and_exported(folder: Path) -> None:
    train = ("train", "model.keras", "data.npz", "--out", "run", "--eval-data", "data.npz")
    train += ("--learning-rate", "0.02", "--json")
    first = json.loads(fastgpu_command(*train, "--epochs", 2, cwd=folder)[0])
    assert first["steps"] == 2 * 3
    assert {"config.json", "metrics.jsonl", "checkpoints", "variables.npz"} <= set(
        os.listdir(folder / "run")
    )

    resumed = json.loads(fastgpu_command(*train, "--epochs", 6, cwd=folder)[0])
    assert resumed["steps"] == 6 * 3
    assert resumed["last"]["eval_accuracy"] > 0.8

    model = fgpu.from_keras(folder / "model.keras")
    variables = read_variables(folder / "run", model.variables)
    with np.load(folder / "data.npz") as data:
        scores = fgpu.evaluate(
            fgpu.supervised_loss(model.module), variables, dict(data), batch_size=32
        )
    # what was saved is what was measured, in float32
    assert scores["loss"] == pytest.approx(resumed["last"]["eval_loss"], rel=1e-5)

    _, err = fastgpu_command(*train, "--batch-size", 8, cwd=folder, status=1)
    assert "holds a run with other settings; expected: batch_size=32; got: batch_size=8" in err

    report = json.loads(
        fastgpu_command("export", "model.keras", "out", "--run", "run", "--json", cwd=folder)[0]
    )
    assert (folder / "out" / "saved_model.pb").exists()
    assert report["trainable_variables"] == 4
    _, err = fastgpu_command("export", "model.keras", "out", cwd=folder, status=1)
    assert len(err.strip().splitlines()) == 1 and "out" in err


def test_a_native_model_is_trained_and_measured(folder: Path) -> None:
    model = ("mlp", "data.npz", "--set", "num_classes=3")
    fastgpu_command("train", *model, "--out", "native", "--epochs", 1, cwd=folder)
    out, _ = fastgpu_command("benchmark", *model, "--rounds", 1, "--steps", 1, "--json", cwd=folder)
    assert [row["side"] for row in json.loads(out)["rows"]] == ["fastgpu", "unoptimized"]
    _, err = fastgpu_command(
        "export", "mlp", "o", "--set", "num_classes=4", "--run", "native", cwd=folder, status=1
    )
    assert "is of another model" in err and not (folder / "o").exists()


def test_tune_finds_a_configuration_to_train_with(folder: Path) -> None:
    tune = ("tune", "model.keras", "data.npz", "--storage", "tune.db", "--epochs", 1, "--json")
    result = json.loads(fastgpu_command(*tune, "--trials", 3, cwd=folder)[0])
    assert set(result["best_config"]) == {"learning_rate", "weight_decay"}
    assert len(result["trials"]) == 3
    resumed = json.loads(fastgpu_command(*tune, "--trials", 4, cwd=folder)[0])
    assert resumed["trials"][:3] == result["trials"]


def test_an_unexpected_error_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise ZeroDivisionError("division by zero\nand more")

    monkeypatch.setattr(fastgpu.cli, "app", fail)
    monkeypatch.delenv("FASTGPU_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop:
        fastgpu.cli.main([])
    assert stop.value.code == 1
    message = "fastgpu: ZeroDivisionError: division by zero; FASTGPU_DEBUG=1 shows where\n"
    assert capsys.readouterr().err == message

    monkeypatch.setenv("FASTGPU_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        fastgpu.cli.main([])


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (FastGPUError("no", expected="a", got="b"), 1, "fastgpu: no; expected: a; got: b\n"),
        (KeyboardInterrupt("after step 3; saved x"), 130, "interrupted after step 3; saved x"),
    ],
)
def test_exit_codes(
    error: BaseException,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(fastgpu.cli, "app", fail)
    with pytest.raises(SystemExit) as stop:
        fastgpu.cli.main([])
    assert stop.value.code == status
    assert said in capsys.readouterr().err


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["nonsense"], ["train", "model.keras"], ["env", "--nonsense"]):
        with pytest.raises(SystemExit) as stop:
            fastgpu.cli.main(arguments)
        assert stop.value.code == 2
        assert "Error:" in capsys.readouterr().err
