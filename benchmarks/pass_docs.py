"""Writes `docs/passes.md` from the passes themselves and the figures of the last benchmarks.

    python benchmarks/pass_docs.py

reads `benchmarks/results/lowerings.json` and `gpu_memory.json`, which `lowerings.py` and
`gpu_memory.py` write.
"""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

from fastgpu.transforms import PASSES, Pass

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# Modules that are not called as their pass is.
_MODULES = {
    "inline": "inline",
    "cse": "common_subexpressions",
    "fold": "constant_folding",
    "dce": "dead_code",
}
_PLATFORMS = {"cpu": "CPU", "cuda": "GPU", "tpu": "TPU"}
_STAGES = {
    "forward": "on any program",
    "joint": "on forward and backward together",
    "step": "on a whole training step",
}
_HEAD = """# The passes

What each pass does, where it is on, and what it buys. Written by `python benchmarks/pass_docs.py`
from the passes and from `benchmarks/results`; times are medians of 9 interleaved runs on two CPU
cores (`benchmarks/lowerings.py`), bytes are the H100 compiler's (`benchmarks/gpu_memory.py`).

`fastgpu inspect MODEL --operations` shows whose code computes each operation of a model,
`--before PASS` and `--after PASS` the program around a pass, `--disable PASS --diff` what it does.
"""


def text() -> str:
    """The page."""
    rows = json.loads((RESULTS / "lowerings.json").read_text())["rows"]
    memory = json.loads((RESULTS / "gpu_memory.json").read_text())["rows"]
    parts = [_HEAD, *(_section(step, rows, memory) for step in PASSES)]
    left = [row for row in rows if not row["code"]]
    if left:
        parts.append(
            "## Left to XLA\n\nMeasured the other way, too, and no faster.\n\n" + times(left)
        )
    return "\n".join(parts)


def _section(step: Pass, rows: list[dict[str, Any]], memory: list[dict[str, Any]]) -> str:
    name = _MODULES.get(step.name)
    path = f"fastgpu.transforms.{name or f'dataflow.{step.name}'}"
    about = inspect.cleandoc(importlib.import_module(path).__doc__ or "")
    where = ", ".join(_PLATFORMS[platform] for platform in step.platforms)
    section = f"## `{step.name}`\n\n{step.why[0].upper()}{step.why[1:]}. "
    asked = "" if step.default else " Only when asked for by name."
    section += f"On {where}; {_STAGES[step.stage]}.{asked}\n\n{about}\n"
    own = [row for row in rows if step.name in row["code"].split(", ")]
    if own:
        section += f"\n{times(own)}"
    if step.name == "attention":
        section += f"\n{sizes([row for row in memory if 'attention' in row['program']])}"
    return section


def times(rows: list[dict[str, Any]]) -> str:
    """A table of milliseconds."""
    lines = ["| operation | part | XLA ms | fastgpu ms | |", "|---|---|---:|---:|---:|"]
    for row in rows:
        xla, ours = row["xla_ms"], row["fastgpu_ms"]
        lines.append(
            f"| {row['operation']} | {row['part']} | {xla:.2f} | {ours:.2f} | {xla / ours:.1f}x |"
        )
    return "\n".join(lines) + "\n"


def sizes(rows: list[dict[str, Any]]) -> str:
    """A table of temporaries."""
    lines = ["| gradient | XLA MiB | fastgpu MiB | |", "|---|---:|---:|---:|"]
    for row in rows:
        plain, ours = (row[name] / 2**20 for name in ("plain_bytes", "fastgpu_bytes"))
        lines.append(f"| {row['program']} | {plain:.0f} | {ours:.0f} | {row['ratio']:.1%} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "passes.md").write_text(text())
