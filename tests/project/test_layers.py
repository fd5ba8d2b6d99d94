"""Every import of fastgpu, held to the table of layers in docs/architecture.md."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
LAYER = {
    "__version__": 0,
    "errors": 0,
    "config": 0,
    "hardware": 0,
    "ir": 1,
    "models": 1,
    "importers": 1,
    "optimizers": 1,
    "transforms": 2,
    "compile": 3,
    "training": 4,
    "tuning": 5,
    "benchmarking": 5,
    "exporters": 6,
    "keras_integration": 6,
    "__main__": 7,
    "cli": 7,
    "report": 7,
}
# Files that are run as programs, in a process of their own.
PROGRAMS = (
    "benchmarking/worker.py",
    "cli/demo/keras_script.py",
    "cli/demo/tensorflow_script.py",
    "exporters/reload_savedmodel.py",
)
# Optional packages, and the only files that may import them (all but typer inside functions).
OPTIONAL = {
    "keras": ("importers/keras/", *PROGRAMS),
    "tensorflow": ("exporters/savedmodel.py", *PROGRAMS),
    "optuna": ("tuning/",),
    "matplotlib": ("compile/plan.py", "tuning/", "report/"),
    "sklearn": ("cli/demo",),
    "torch": ("importers/torch/",),
    "onnx": ("importers/onnx/",),
    "google.protobuf": ("importers/onnx/",),
    "ray": ("tuning/",),
    "typer": ("cli/",),
}
# Their names move between JAX versions.
VERSION_SENSITIVE = ("jax.core", "jax.extend.core", "jax.interpreters")


class Import(NamedTuple):
    file: str
    line: int
    name: str
    at_import_time: bool

    def __str__(self) -> str:
        return f"fastgpu/{self.file}:{self.line} {self.name}"


def imports_of(source: str, file: str) -> list[Import]:
    return list(_imports(ast.parse(source), file, at_import_time=True))


def _imports(node: ast.AST, file: str, at_import_time: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(file, node.lineno, alias.name, at_import_time)
    elif isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        for alias in node.names:
            yield Import(file, node.lineno, f"{module}.{alias.name}", at_import_time)
    elif isinstance(node, ast.Attribute) and _dotted(node).startswith("jax."):
        yield Import(file, node.lineno, _dotted(node), at_import_time)
    elif isinstance(node, ast.Call) and _imported_by_call(node):
        yield Import(file, node.lineno, _imported_by_call(node), at_import_time)
    inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    inside |= isinstance(node, ast.If) and _dotted(node.test) == "TYPE_CHECKING"
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, file, at_import_time and not inside)


def _imported_by_call(node: ast.Call) -> str:
    by_name = _dotted(node.func).split(".")[-1] in ("require", "import_module")
    if by_name and node.args and isinstance(node.args[0], ast.Constant):
        return str(node.args[0].value)
    return ""


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def under(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def broken_rules(found: Import) -> list[str]:
    part = found.file.split("/")[0].removesuffix(".py")
    broken = []
    if under(found.name, "fastgpu") and part != "__init__":
        target = found.name.removeprefix("fastgpu").lstrip(".").split(".")[0]
        here, there = LAYER[part], LAYER.get(target, 7)
        if not (there < here or target == part or here == there == 0 or here == 7):
            broken.append(f"{found}: layer {here} imports layer {there}")
    if found.name.startswith("."):
        broken.append(f"{found}: relative import; write fastgpu.…")
    if under(found.name, "jax._src") or under(found.name, "jaxlib"):
        broken.append(f"{found}: a private module of JAX")
    if any(under(found.name, name) for name in VERSION_SENSITIVE) and (
        found.file != "ir/compat.py"
    ):
        broken.append(f"{found}: belongs into ir/compat.py")
    for package, files in OPTIONAL.items():
        if under(found.name, package):
            if not found.file.startswith(files):
                broken.append(f"{found}: {package} may be imported only in {files}")
            if found.at_import_time and package != "typer" and found.file not in PROGRAMS:
                broken.append(f"{found}: import {package} inside a function")
    return broken


def test_every_import_keeps_to_the_table() -> None:
    files = sorted((ROOT / "fastgpu").rglob("*.py"))
    assert len(files) > 20
    found = [
        found
        for file in files
        for found in imports_of(file.read_text(), file.relative_to(ROOT / "fastgpu").as_posix())
    ]
    assert [rule for each in found for rule in broken_rules(each)] == []


def test_every_part_has_a_layer() -> None:
    parts = {path.stem for path in (ROOT / "fastgpu").iterdir() if not path.name.startswith("__")}
    assert parts - {"py"} <= set(LAYER)


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("ir/trace.py", "from fastgpu.transforms import optimize", "layer 1 imports layer 2"),
        ("models/vit.py", "def f():\n from fastgpu import ir", "layer 1 imports layer 1"),
        ("config.py", "import fastgpu.ir.trace", "layer 0 imports layer 1"),
        ("training/loop.py", "import fastgpu as fgpu", "layer 4 imports layer 7"),
        ("training/loop.py", "from .state import TrainState", "relative import"),
        ("training/loop.py", "from jax._src import core", "private module"),
        ("transforms/a.py", "import jax\njax.core.jaxpr_as_fun(j)", "belongs into ir/compat.py"),
        ("transforms/a.py", "from jax.extend import core", "belongs into ir/compat.py"),
        ("importers/keras/a.py", "import keras", "inside a function"),
        ("models/a.py", "def f():\n import keras.ops", "keras may be imported only"),
        ("training/a.py", "def f():\n require('tensorflow', 'x')", "tensorflow may be imported"),
    ],
)
def test_the_rules_bite(file: str, source: str, complaint: str) -> None:
    rules = [rule for found in imports_of(source, file) for rule in broken_rules(found)]
    assert rules and complaint in rules[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("training/loop.py", "from fastgpu.training.state import TrainState"),
        ("transforms/a.py", "from fastgpu import ir"),
        ("config.py", "from fastgpu.hardware.backend import backend_started"),
        ("ir/compat.py", "from jax.extend import core"),
        ("exporters/savedmodel.py", "def f():\n require('tensorflow', 'tensorflow')"),
    ],
)
def test_the_rules_allow_what_the_table_allows(file: str, source: str) -> None:
    assert [rule for found in imports_of(source, file) for rule in broken_rules(found)] == []
