"""README and the other documents mention only files, targets and commands that exist."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^|\n\n)((?:    [^\n]*\n)+)")


def code_lines(text: str) -> list[str]:
    blocks = FENCE.findall(text) + INDENTED.findall(FENCE.sub("", text))
    inline = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in [*lines, *inline]]


@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.name)
def document(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_links_and_paths_lead_to_files(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    assert [link for link in links if not (document.parent / link).exists()] == []
    folders = "fastgpu|tests|examples|benchmarks|docs"
    named = re.findall(rf"(?<![\w/.]){'(?:' + folders + ')'}/[\w./*-]+", text)
    paths = {path.rstrip(".") for path in named if "*" not in path}
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        match.group(1)
        for line in code_lines(document.read_text())
        if (match := re.match(r"make ([a-z][\w-]*)$", line))
    }
    assert named <= targets


def test_fastgpu_commands_and_their_options_exist(document: Path) -> None:
    import typer

    from fastgpu.cli import app

    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    for line in code_lines(document.read_text()):
        if not line.startswith("fastgpu "):
            continue
        words = shlex.split(line)
        if words[1].startswith("-"):
            continue
        assert words[1] in commands, line
        options = {name for p in commands[words[1]].params for name in (*p.opts, *p.secondary_opts)}
        asked = {word.split("=")[0] for word in words[2:] if word.startswith("-")}
        assert asked <= options | {"--help"}, line


def test_the_makefile_and_ci_run_the_same_tests() -> None:
    ci = ROOT / ".ci" / "run"
    assert ci.read_text().rstrip().endswith("make test")
    assert ci.stat().st_mode & 0o111


@pytest.mark.parametrize(
    ("script", "page"),
    [("pass_docs", "passes"), ("keras_layer_docs", "keras_layers"), ("onnx_docs", "onnx")],
)
def test_generated_pages_are_what_the_code_says(script: str, page: str) -> None:
    """Each is written by its script: python benchmarks/pass_docs.py and so on."""
    spec = importlib.util.spec_from_file_location(script, ROOT / f"benchmarks/{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / f"docs/{page}.md").read_text() == module.text()
