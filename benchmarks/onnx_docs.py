"""Writes `docs/onnx.md` from the table of ONNX operators and the last conformance run.

    python benchmarks/onnx_docs.py

reads `benchmarks/results/onnx_conformance.json`, which `onnx_conformance.py` writes.
"""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastgpu.importers.onnx.operators import KINDS, TABLE, Rule
from fastgpu.importers.onnx.parse import NEWEST_OPSET, OLDEST_OPSET

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "onnx_conformance.json"

_HEAD = """# ONNX models

```python
imported = fgpu.from_onnx("model.onnx")              # a path, bytes or an onnx.ModelProto
logits = imported.module.apply(imported.variables, images)
print(imported.report)                               # every node and array, and what became of it
```

Opsets {oldest} to {newest}, with `pip install 'fastgpu[onnx]'`. The module holds the graph; the
variables are the file's arrays under the file's names, split at dots and slashes:
`variables["params"]["layer1"]["conv"]["weight"]`. `fastgpu import model.onnx` prints the report;
`train`, `plan`, `inspect` and `export` take `.onnx` files as they take Keras files.

| collection | holds |
|---|---|
| `params` | floating initializers; which ones, `trainable=lambda name: ...` says otherwise |
| `batch_stats` | moving means and variances, a pair for each normalization even if shared |
| `constants` | other arrays of more than 1,024 elements: quantized weights, tables of indices |
| (the graph) | scalars, small integers, and everything that shapes are computed from |

- **Training.** `train=True` drops in `Dropout` (`rngs={{"dropout": key}}`) and normalizes by the
  batch (`mutable=["batch_stats"]`), though the file was exported for inference. There is no
  `init`: a file has values, no initializers.
- **Shapes.** What follows from shapes and constants is computed with numpy while the program is
  traced: a model with a dynamic batch is one `jax.jit` for each batch size, without a trace of
  its shape arithmetic. An input that a shape depends on (the target of a Reshape, the k of a
  TopK) is named in an error and can be fixed: `from_onnx(path, constants={{"k": 5}})`. `NonZero`,
  `Unique` and `Compress` work on what is known, and are refused elsewhere. Sizes may be symbols:
  one `jax.export`, and one SavedModel, serve every batch size.
- **Fixed sizes.** A model exported for batch 1 is run at batch 1, unless `shapes={{"x": (None, 3,
  224, 224)}}` says that nothing in it depends on that.
- **64 bits.** JAX has 32 unless `jax_enable_x64` is set: float64 and int64 arrays become 32-bit
  ones, and the report says which. Integers and floats that do not fit are refused where their
  value matters, and cut where only their order does (ends of slices, bounds).
- **Control flow.** `If` on a known condition takes one branch, on another both are traced into a
  `lax.cond`. Short loops are written out, long ones are a `lax.scan`; a loop whose number of
  steps is not known is a `lax.while_loop`, which has no reverse gradient and cannot collect
  outputs by step.
- **Functions** of the file, and operators that ONNX itself defines by other operators, become
  those.
- **What a file cannot do.** No code from it runs. External data is read only inside the model's
  folder, each byte once. Sizes are checked against what is stored; arrays of absurd size, cyclic
  graphs, names given twice, functions that call themselves and more than 500,000 nodes are
  refused before memory is taken.

This page is written by `python benchmarks/onnx_docs.py` from the table of rules and from the
tests that ship in onnx {onnx} (`benchmarks/onnx_conformance.py`): of {cases:,} cases with floats
of 16 bits or more {passed:,} pass ({share:.1%}), {asked_share:.1%} of those up to opset 24;
{refused} are refused by name, {failed} fail.
"""


def text() -> str:
    """The page."""
    results = json.loads(RESULTS.read_text())
    floats = results["float"]
    head = _HEAD.format(
        oldest=OLDEST_OPSET,
        newest=NEWEST_OPSET,
        onnx=results["onnx"],
        cases=floats["cases"],
        passed=floats["passed"],
        share=floats["share_passed"],
        asked_share=results["float_opset_7_to_24"]["share_passed"],
        refused=floats.get("refused", 0),
        failed=floats.get("failed", 0),
    )
    counts = results["operators"]
    return "\n".join([head, *_tables(counts), _refused(counts)])


def _tables(counts: dict[str, list[int]]) -> Iterator[str]:
    yield f"## The {len(TABLE)} operators\n"
    yield "Inputs that are *known* must be so while tracing; *passed* counts onnx's own cases.\n"
    for kind in KINDS:
        doc = inspect.cleandoc(kind.__doc__ or "").splitlines()[0]
        yield f"### {doc.rstrip('.')}\n"
        yield "| operator | opsets | known | passed |\n|---|---|---|---:|"
        for name in sorted(name for name, rules in TABLE.items() if _kind(rules) == kind.__name__):
            passed, cases = counts.get(name, (0, 0))
            known = ", ".join(dict.fromkeys(each for r in TABLE[name] for each in sorted(r.static)))
            share = f"{passed}/{cases}" if cases else ""
            yield f"| {name} | {_opsets(TABLE[name])} | {known} | {share} |"
        yield ""


def _kind(rules: list[Rule]) -> str:
    return rules[0].compute.__module__


def _opsets(rules: list[Rule]) -> str:
    """The ranges in which each rule of an operator holds.

    >>> _opsets(TABLE["Clip"])
    '6 to 10, 11 to 28'
    """
    starts = sorted({max(rule.since, OLDEST_OPSET) for rule in rules})
    ends = [start - 1 for start in starts[1:]] + [NEWEST_OPSET]
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))


def _refused(counts: dict[str, Any]) -> str:
    missing = sorted(
        name for name, (passed, _) in counts.items() if not passed and name not in TABLE
    )
    return (
        "## Refused by name\n\n"
        "Operators with cases in the onnx package and no rule here: text, images in files, trees,\n"
        "optimizers, shapes that depend on values, and what came after opset 24.\n\n"
        f"{', '.join(missing)}.\n"
    )


def main() -> None:
    (ROOT / "docs" / "onnx.md").write_text(text())


if __name__ == "__main__":
    main()
