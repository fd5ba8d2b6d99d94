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

COMMANDS = ("env", "import", "inspect", "plan", "tune", "train", "benchmark", "export", "demo")


_PROGRAM = """
import contextlib, io, json, sys
from fastgpu.cli import main
results = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as stop:
            results.append([stop.code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


def in_one_process(*commands: tuple[object, ...], cwd: Path) -> list[tuple[int, str, str]]:
    """Run commands one after the other; returns exit code, stdout and stderr of each."""
    arguments = json.dumps([[str(word) for word in command] for command in commands])
    return json.loads(_run("-c", _PROGRAM, arguments, cwd=cwd))


def fastgpu_command(*arguments: object, cwd: Path) -> str:
    """What `fastgpu ...` prints, in a process of its own; it must succeed."""
    return _run("-m", "fastgpu", *arguments, cwd=cwd)


def _run(*arguments: object, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"XDG_CACHE_HOME": str(cwd / "cache")},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


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
    (status, text, _), (_, data, _) = in_one_process(("env",), ("env", "--json"), cwd=tmp_path)
    assert status == 0
    assert text.startswith(f"fastgpu {fgpu.__version__}\nfastgpu runs on cpu")
    assert json.loads(data)["versions"]["jax"] and json.loads(data)["extras"]["keras"] is True


def test_import_reports_every_layer_and_inspect_every_pass(folder: Path) -> None:
    (_, imported, _), (_, inspected, _) = in_one_process(
        ("import", "model.keras", "--json"),
        ("inspect", "model.keras", "--batch-size", 2, "--json"),
        cwd=folder,
    )
    report = json.loads(imported)
    assert report["parameter_count"] == 4 * 8 + 8 + 8 * 3 + 3
    assert {entry["status"] for entry in report["entries"]} == {"mapped"}
    assert [row["pass"] for row in json.loads(inspected)["passes"]][:2] == ["inline", "cse"]


def test_inspect_shows_a_pass_what_it_changes_and_whose_code_runs(folder: Path) -> None:
    common = ("inspect", "convnet", "--shape", "16,16,1", "--target", "cpu")
    (_, less, _), (_, text, _), (status, _, error) = in_one_process(
        (*common, "--disable", "max_pool", "--diff", "--operations", "--json"),
        (*common, "--before", "inline", "--after", "dce"),
        (*common, "--disable", "dce", "--after", "dce"),
        cwd=folder,
    )
    data = json.loads(less)
    assert "max_pool" not in [row["pass"] for row in data["passes"]]
    assert {"conv_general_dilated", "dot_general"} <= {r["operation"] for r in data["operations"]}
    assert "-reduce_window_max by max_pool" in data["diff"]
    assert text.count("\n\nin  ") == 2
    assert status == 1 and "no pass called 'dce' ran" in error


def test_a_failure_is_one_clear_line_and_an_exit_code(folder: Path) -> None:
    cases = {
        ("import", "missing.keras"): "missing.keras",
        ("import", "data.npz"): "expected:",
        ("inspect", "resnet19"): "neither a file nor a model",
        ("inspect", "mlp"): "add --shape",
        ("inspect", "mlp", "--shape", "4,x"): "sizes like 28,28,1",
        ("inspect", "mlp", "--shape", "4", "--set", "depth"): "--set NAME=VALUE",
        ("plan", "mlp", "--shape", "4", "--precision", "bf17"): "'bf16-mixed'",
        ("train", "model.keras", "model.keras", "--out", "r"): "cannot be read",
        ("train", "model.keras", "data.npz", "--out", "r", "--optimizer", "x"): "adamw, sgd",
        ("train", "model.keras", "data.npz", "--out", "data.npz"): "give another --out",
    }
    results = in_one_process(*cases, cwd=folder)
    for (command, said), (status, out, err) in zip(cases.items(), results, strict=True):
        assert (status, out) == (1, ""), command
        (line,) = err.strip().splitlines()
        assert line.startswith("fastgpu: ") and said in line
    assert not (folder / "r").exists()


def test_train_leaves_a_run_that_can_be_resumed_and_exported(folder: Path) -> None:
    train = ("train", "model.keras", "data.npz", "--out", "run", "--eval-data", "data.npz")
    train += ("--learning-rate", "0.02", "--json")
    first = json.loads(fastgpu_command(*train, "--epochs", 2, cwd=folder))
    assert first["steps"] == 2 * 3
    assert {"config.json", "metrics.jsonl", "checkpoints", "variables.npz"} <= set(
        os.listdir(folder / "run")
    )

    resumed = json.loads(fastgpu_command(*train, "--epochs", 6, cwd=folder))
    assert resumed["steps"] == 6 * 3
    assert resumed["last"]["eval_accuracy"] > 0.8

    model = fgpu.from_keras(folder / "model.keras")
    variables = read_variables(folder / "run", model.variables)
    with np.load(folder / "data.npz") as data:
        loss = fgpu.supervised_loss(model.module)
        scores = fgpu.evaluate(loss, variables, dict(data), batch_size=32)
    # what was saved is what was measured, in float32
    assert scores["loss"] == pytest.approx(resumed["last"]["eval_loss"], rel=1e-5)

    other, exported, again, program = in_one_process(
        (*train, "--batch-size", 8),
        ("export", "model.keras", "out", "--run", "run", "--json"),
        ("export", "model.keras", "out"),
        ("export", "model.keras", "program", "--format", "stablehlo", "--run", "run", "--json"),
        cwd=folder,
    )
    assert other[0] == 1
    assert "holds a run with other settings; expected: batch_size=32; got: batch_size=8" in other[2]
    assert json.loads(exported[1])["trainable_variables"] == 4
    assert (folder / "out" / "saved_model.pb").exists()
    assert again[0] == 1 and len(again[2].strip().splitlines()) == 1
    assert json.loads(program[1])["format"] == "StableHLO"
    with np.load(folder / "data.npz") as data:
        inputs = data["inputs"][:4]
    np.testing.assert_allclose(
        fgpu.load_stablehlo(folder / "program")(inputs)["output_0"],
        model.module.apply(variables, inputs),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_native_model_is_trained_and_measured(folder: Path) -> None:
    model = ("mlp", "data.npz", "--set", "num_classes=3")
    trained, measured, other = in_one_process(
        ("train", *model, "--out", "native", "--epochs", 1, "--precision", "fp16-mixed"),
        ("benchmark", *model, "--rounds", 1, "--steps", 1, "--json"),
        ("export", "mlp", "o", "--set", "num_classes=4", "--run", "native"),
        cwd=folder,
    )
    assert trained[0] == 0
    assert [row["side"] for row in json.loads(measured[1])["rows"]] == ["fastgpu", "unoptimized"]
    assert other[0] == 1 and "is of another model" in other[2]
    assert not (folder / "o").exists()


def test_plan_answers_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    words = (
        "plan",
        "convnet",
        "--shape",
        "32,32,3",
        "--batch-size",
        "64",
        "--set",
        "num_classes=4",
    )
    found, in_parts, cut, refused = in_one_process(
        (*words, "--target", "h100", "--json", "--save", "plan.json"),
        (*words, "--target", "h100", "--accumulate-steps", "2"),
        (*words, "--target", "l4:2", "--fsdp"),
        (*words, "--target", "h1000"),
        cwd=tmp_path,
    )
    assert found[0] == 0, found
    report = json.loads(found[1])
    assert report["fits"] is True and report["target"] == "h100"
    assert json.loads((tmp_path / "plan.json").read_text())["peak_bytes"] == report["peak_bytes"]
    assert in_parts[0] == 0 and "over 2 microbatches" in in_parts[1]
    assert cut[0] == 0 and "collectives: " in cut[1]
    assert refused[0] == 1 and "one of h100" in refused[2]


def test_tune_finds_a_configuration_to_train_with(folder: Path) -> None:
    tune = ("tune", "model.keras", "data.npz", "--storage", "tune.db", "--epochs", 1, "--json")
    three, four = (
        json.loads(out)
        for _, out, _ in in_one_process((*tune, "--trials", 3), (*tune, "--trials", 4), cwd=folder)
    )
    assert set(three["best_config"]) == {"learning_rate", "weight_decay"}
    assert len(three["trials"]) == 3
    assert four["trials"][:3] == three["trials"]


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
