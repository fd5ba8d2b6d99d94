"""What `import fastgpu` offers, what it costs, and whether it is documented."""

import importlib
import inspect
import re
import subprocess
import sys
from types import ModuleType

import pytest

import fastgpu

DOCUMENTED_MODULES = ("errors", "hardware", "ir", "models", "optimizers", "transforms")


CUDA_NOTICE = r"cudart_stub|absl::InitializeLog"


def run(program: str) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120
    )
    # `import jax` itself logs that a machine with the CUDA plugin has no GPU.
    lines = [line for line in result.stderr.splitlines() if not re.search(CUDA_NOTICE, line)]
    assert (result.returncode, result.stdout, lines) == (0, "", [])


def test_importing_fastgpu_starts_no_backend_and_imports_nothing_optional() -> None:
    run(
        """
import sys
import fastgpu
heavy = {"jax", "tensorflow", "keras", "optuna", "h5py", "typer", "matplotlib", "torch", "onnx"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
for name in fastgpu.__all__:
    getattr(fastgpu, name)
optional = {"tensorflow", "keras", "optuna", "typer", "matplotlib", "torch", "sklearn", "ray"}
optional |= {"onnx"}
assert not optional & set(sys.modules), optional & set(sys.modules)
from fastgpu.hardware.backend import backend_started
assert not backend_started()
"""
    )


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fastgpu.nonsense  # noqa: B018


def public_names() -> list[tuple[str, object]]:
    modules: list[tuple[str, ModuleType]] = [("fastgpu", fastgpu)]
    modules += [
        (f"fastgpu.{name}", importlib.import_module(f"fastgpu.{name}"))
        for name in DOCUMENTED_MODULES
    ]
    return [
        (f"{module_name}.{name}", getattr(module, name))
        for module_name, module in modules
        for name in getattr(module, "__all__", ())
    ]


def test_every_public_function_and_class_has_a_docstring_with_an_example() -> None:
    missing = []
    for name, value in public_names():
        if not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        doc = inspect.getdoc(value) or ""
        inherited = inspect.isclass(value) and value.__doc__ is None
        is_error = inspect.isclass(value) and issubclass(value, Exception)
        if inherited or not doc or (">>>" not in doc and not is_error):
            missing.append(name)
    assert missing == []
