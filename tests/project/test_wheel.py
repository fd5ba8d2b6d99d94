"""The wheel, built and installed into an environment that has only the base dependencies."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
OPTIONAL = ("keras", "tensorflow", "optuna", "matplotlib", "sklearn", "torch", "onnx", "pytest")


def run(*command: str | Path, cwd: Path) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The `bin` folder of the new environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fastgpu", source / "fastgpu", ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("fastgpu-*.whl")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    scripts = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    pip = (scripts / "python", "-m", "pip", "install", "-q")
    run(*pip, "-c", ROOT / "constraints.txt", wheel, cwd=folder)
    yield scripts
    shutil.rmtree(folder / "venv")


def test_it_holds_only_the_base_dependencies_and_imports(installed: Path, tmp_path: Path) -> None:
    run(
        installed / "python",
        "-c",
        f"""
import importlib.util, pathlib
import fastgpu as fgpu
assert "site-packages" in fgpu.__file__
assert [name for name in {OPTIONAL} if importlib.util.find_spec(name)] == []
assert (pathlib.Path(fgpu.__file__).parent / "py.typed").exists()
for name in fgpu.__all__:
    getattr(fgpu, name)
""",
        cwd=tmp_path,
    )


def test_optimize_works_there(installed: Path, tmp_path: Path) -> None:
    run(
        installed / "python",
        "-c",
        """
import jax, jax.numpy as jnp, numpy as np
import fastgpu as fgpu
fgpu.configure(device="cpu", cache=False)
f = lambda x: jnp.sin(x) * jnp.sin(x)
np.testing.assert_allclose(jax.jit(fgpu.optimize(f))(jnp.arange(3.0)), f(jnp.arange(3.0)), 1e-6)
""",
        cwd=tmp_path,
    )


def test_the_command_works_there(installed: Path, tmp_path: Path) -> None:
    help_text = run(installed / "fastgpu", "--help", cwd=tmp_path)
    for command in ("env", "import", "inspect", "tune", "train", "benchmark", "export", "demo"):
        assert command in help_text


def test_a_keras_file_is_imported_there(installed: Path, tmp_path: Path) -> None:
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, activation="tanh")])
    model.save(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(size=(4, 5)).astype("float32")
    np.savez(tmp_path / "expected.npz", x=x, y=model.predict(x, verbose=0))
    run(
        installed / "python",
        "-c",
        """
import numpy as np
import fastgpu as fgpu
m = fgpu.from_keras("model.keras")
expected = np.load("expected.npz")
y = m.module.apply(m.variables, expected["x"])
np.testing.assert_allclose(y, expected["y"], atol=1e-6)  # float32, five products
""",
        cwd=tmp_path,
    )


def test_a_missing_extra_is_named_there(installed: Path, tmp_path: Path) -> None:
    run(
        installed / "python",
        "-c",
        """
from fastgpu.errors import MissingExtraError, require
try:
    require("optuna", "tune")
except MissingExtraError as error:
    assert "pip install 'fastgpu[tune]'" in str(error)
else:
    raise AssertionError("optuna is here")
""",
        cwd=tmp_path,
    )
