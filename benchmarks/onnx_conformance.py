"""Runs the operator tests that ship in the onnx package through `from_onnx`, and counts.

    python benchmarks/onnx_conformance.py [--only NAME] [--out FILE]

A case passes if every output is within the case's own tolerance; it is refused if fastgpu names
what it does not have; anything else is a failure. Inputs that shapes depend on are given as
constants. Writes `benchmarks/results/onnx_conformance.json`.
"""

import argparse
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.errors import FastGPUError, UnsupportedLayerError
from fastgpu.importers.onnx import from_onnx
from fastgpu.importers.onnx.files import open_model
from fastgpu.importers.onnx.parse import Parser
from fastgpu.importers.onnx.static import Static

RESULTS = Path(__file__).parent / "results" / "onnx_conformance.json"
FLOATS = ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16")
# Outputs that are random by definition: only their shapes and types can be compared.
RANDOM = ("bernoulli", "training_dropout", "random")


class Outcome(NamedTuple):
    """What became of one case: "passed", "refused" or "failed", and why."""

    name: str
    operator: str
    opset: int
    floating: bool
    status: str
    why: str


def cases(kind: str = "node") -> list[Any]:
    """The cases of the installed onnx package."""
    from onnx.backend.test import loader

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sorted(loader.load_model_tests(kind=kind), key=lambda case: case.name)


def loaded(case: Any) -> tuple[Any, list[tuple[list[Any], list[Any]]]]:
    """A case's model and its pairs of inputs and outputs."""
    import onnx

    if case.model is not None:
        return case.model, case.data_sets
    folder = Path(case.model_dir)
    model = onnx.load(folder / "model.onnx")
    pairs = []
    for data in sorted(folder.glob("test_data_set_*")):
        pairs.append((list(_stored(data, "input")), list(_stored(data, "output"))))
    return model, pairs


def _stored(folder: Path, kind: str) -> Iterator[np.ndarray]:
    import onnx

    for i in range(len(list(folder.glob(f"{kind}_*.pb")))):
        tensor = onnx.TensorProto()
        tensor.ParseFromString((folder / f"{kind}_{i}.pb").read_bytes())
        yield onnx.numpy_helper.to_array(tensor)


def inputs_for_shapes(model: Any) -> set[str]:
    """The inputs that shapes depend on."""
    name, proto, external = open_model(model)
    graph, inputs = Parser(proto, name, external).model(proto.graph, {})
    needed = Static(graph).names[graph]
    return {each.name for each in inputs if each.name in needed}


def check(case: Any) -> Outcome:
    """Run one case; those with float64 in them with JAX's 64 bits."""
    model, pairs = loaded(case)
    node = model.graph.node[0]
    main = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    about = (case.name, node.op_type, main, is_floating(model))
    try:
        with jax.enable_x64("DOUBLE" in element_types(model)):
            why = _run(case, model, pairs)
    except UnsupportedLayerError as error:
        return Outcome(*about, "refused", _reason(error, case.name))
    except FastGPUError as error:
        return Outcome(*about, "failed", f"{type(error).__name__}: {error.one_line()}")
    except Exception as error:
        return Outcome(*about, "failed", f"crashed: {type(error).__name__}: {error}"[:300])
    return Outcome(*about, "failed" if why else "passed", why)


def _run(case: Any, model: Any, pairs: list[tuple[list[Any], list[Any]]]) -> str:
    """Import and apply a case's model; what differs."""
    fixed = inputs_for_shapes(model)
    stored = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in stored]
    for inputs, outputs in pairs:
        given = dict(zip(names, map(_array, inputs), strict=False))
        imported = from_onnx(model, constants={name: given.get(name) for name in fixed})
        free = [given.get(name) for name in names if name not in fixed]
        apply = jax.jit(imported.module.apply)
        found = apply(imported.variables, *free, rngs={"dropout": jax.random.key(0)})
        found = found if len(imported.module.output_names) > 1 else (found,)
        if why := difference(case, found, list(map(_array, outputs))):
            return why
    return ""


def _reason(error: FastGPUError, name: str) -> str:
    """What was refused, without what differs from case to case."""
    summary = error.summary.replace(name, "the model")
    return f"{summary}: {error.got}" if error.got else summary


def element_types(model: Any) -> set[str]:
    """The types of a model's inputs and outputs, by ONNX's names."""
    import onnx

    return {
        onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        if value.type.WhichOneof("value") == "tensor_type"
        else "SEQUENCE"
        for value in (*model.graph.input, *model.graph.output)
    }


def is_floating(model: Any) -> bool:
    """Whether a case computes with floats of 16 bits or more, and with nothing more exotic."""
    kinds = element_types(model)
    exotic = {"SEQUENCE", "STRING", "INT4", "UINT4", "INT2", "UINT2"}
    small = any(kind.startswith(("FLOAT8", "FLOAT4", "FLOAT6")) for kind in kinds)
    return bool(kinds.intersection(FLOATS)) and not small and not kinds & exotic


def _array(value: Any) -> Any:
    """A value of a case: arrays of few bits come as protobuf."""
    import onnx

    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return [_array(part) for part in value] if isinstance(value, list) else value


def difference(case: Any, found: Any, expected: list[Any]) -> str:
    """Where outputs differ; empty if they do not."""
    if len(found) != len(expected):
        return f"{len(found)} outputs, expected {len(expected)}"
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if isinstance(theirs, list):
            why = difference(case, ours, theirs)
        elif ours is None or theirs is None:
            why = "" if ours is theirs else "one is absent"
        else:
            why = _array_difference(case, np.asarray(ours), np.asarray(theirs))
        if why:
            return f"output {i}: {why}"
    return ""


def _array_difference(case: Any, ours: np.ndarray, theirs: np.ndarray) -> str:
    if ours.shape != theirs.shape:
        return f"shape {ours.shape}, expected {theirs.shape}"
    expected = np.dtype(jax.dtypes.canonicalize_dtype(theirs.dtype))
    if ours.dtype != expected:
        return f"{ours.dtype}, expected {expected}"
    if any(word in case.name for word in RANDOM):
        return ""
    wide = np.complex128 if np.iscomplexobj(theirs) else np.float64
    a, b = ours.astype(wide), theirs.astype(wide)
    # Sums in another order differ by two roundings of the largest number in the array.
    largest = float(np.max(np.abs(b[np.isfinite(b)]), initial=1))
    rounding = float(jnp.finfo(expected).eps) if jnp.issubdtype(expected, jnp.floating) else 0.0
    atol = max(case.atol, 2 * rounding * largest)
    if np.allclose(a, b, rtol=max(case.rtol, rounding), atol=atol, equal_nan=True):
        return ""
    return f"largest difference {np.nanmax(np.abs(a - b)):.3g}"


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Counts, refusals by reason, and failures."""
    import onnx

    def counted(group: list[Outcome]) -> dict[str, Any]:
        counts = Counter(outcome.status for outcome in group)
        passed = counts["passed"] / max(len(group), 1)
        return {"cases": len(group), **counts, "share_passed": round(passed, 4)}

    floats = [outcome for outcome in outcomes if outcome.floating]
    asked = [outcome for outcome in floats if outcome.opset <= 24]
    refused: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.status == "refused":
            refused.setdefault(outcome.why, []).append(outcome.name)
    operators: dict[str, list[int]] = {}
    for outcome in outcomes:
        if not outcome.name.endswith("_expanded"):
            counts = operators.setdefault(outcome.operator, [0, 0])
            counts[0] += outcome.status == "passed"
            counts[1] += 1
    return {
        "onnx": onnx.__version__,
        "all": counted(outcomes),
        "float": counted(floats),
        "float_opset_7_to_24": counted(asked),
        "operators": dict(sorted(operators.items())),
        "refused": dict(sorted(refused.items())),
        "failed": {o.name: o.why for o in outcomes if o.status == "failed"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run cases whose name contains this")
    parser.add_argument("--kinds", default="node,simple,pytorch-converted,pytorch-operator")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    chosen = [case for kind in options.kinds.split(",") for case in cases(kind)]
    outcomes = [check(case) for case in chosen if options.only in case.name]
    found = summary(outcomes)
    if not options.only:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(
        json.dumps({k: v for k, v in found.items() if k not in ("refused", "operators")}, indent=1)
    )


if __name__ == "__main__":
    main()
