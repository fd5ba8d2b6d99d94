"""Writes `docs/keras_layers.md` from the table of layers and the last conformance run.

    python benchmarks/keras_layer_docs.py

reads `benchmarks/results/keras_conformance.json`, which `keras_conformance.py` writes.
"""

import dataclasses
import inspect
import json
from collections import Counter, defaultdict
from pathlib import Path

from fastgpu.importers.keras.layers import OPERATIONS, REFUSED, TABLE, Layer
from fastgpu.importers.keras.layers.activations import ACTIVATIONS
from fastgpu.importers.keras.layers.layer import ANY
from fastgpu.importers.keras.layers.tf_operations import TF_FUNCTIONS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "keras_conformance.json"
_HEAD = """# Keras layers

What `from_keras` does with every layer class. Written by `python benchmarks/keras_layer_docs.py`
from the table in `fastgpu/importers/keras/layers` and the last run of
`benchmarks/keras_conformance.py`.

A class or an option that is not listed is refused by name, before any weight is read. A class of
your own gets a rule with `@fastgpu.register_keras_layer("my_package>Scale")`, or for one import
through `custom_objects`.
"""


def text() -> str:
    """The page."""
    parts = [_HEAD, _conformance(), "## Covered\n", *_groups()]
    parts.append("## Refused\n")
    parts += ["| class | why |", "|---|---|"]
    parts += [f"| {name} | {why} |" for name, why in sorted(REFUSED.items())]
    parts.append("\n## keras.ops inside functional graphs\n")
    parts.append(", ".join(f"`{name}`" for name in sorted(OPERATIONS)))
    parts.append("\n## TensorFlow functions recorded by Keras 2\n")
    parts.append("As `TFOpLambda` and `SlicingOpLambda`:\n")
    parts.append(", ".join(f"`tf.{name}`" for name in sorted(TF_FUNCTIONS)))
    parts.append("\n## Activations\n")
    parts.append(", ".join(f"`{name}`" for name in sorted(ACTIVATIONS)))
    return "\n".join(parts) + "\n"


def _conformance() -> str:
    """How many of the cases of Keras's own tests come out equal."""
    report = json.loads(RESULTS.read_text())
    totals = Counter(report["totals"])
    counted = sum(totals.values()) - totals["not reproduced by Keras"]
    equal, refused = totals["equal"], totals["refused"]
    return (
        f"Keras {report['keras']}'s own layer tests give {sum(totals.values())} one-layer models; "
        f"Keras itself saves, loads and\nreproduces {counted} of them. Of these {equal} "
        f"({report['share']:.1%}) are imported with equal outputs (float32, within 1e-5\nof the "
        f"largest), {refused} are refused by name, {counted - equal - refused} "
        "differ or fail.\n"
    )


def _groups() -> list[str]:
    """The classes by the module of their rule, in the order of the table."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, rule in TABLE.items():
        groups[rule.__module__.rpartition(".")[2]].append(_row(name, rule))
    parts = []
    for group, rows in groups.items():
        parts += [f"### {group.replace('_', ' ')}\n", "| class | rule | refused |", "|---|---|---|"]
        parts += [*rows, ""]
    return parts


def _row(name: str, rule: type[Layer]) -> str:
    """A class, what its rule says first, and the options whose other values are refused."""
    about = inspect.cleandoc(rule.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    known = {field.name for field in dataclasses.fields(rule)} | set(rule.nested)
    limits = [
        f"`{option}` other than {', '.join(f'`{value}`' for value in allowed)}"
        for option, allowed in sorted(rule.fixed.items())
        if allowed is not ANY and option not in known
    ]
    return f"| {name} | {about} | {'; '.join(limits)} |"


if __name__ == "__main__":
    (ROOT / "docs" / "keras_layers.md").write_text(text())
