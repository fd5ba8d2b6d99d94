"""Every layer test of the Keras wheel as a one-layer model, imported and compared with Keras.

    python benchmarks/keras_conformance.py [CLASS ...]

The calls of `run_layer_test` in Keras's own tests give (class, options, inputs). Of each a
functional model with random weights is saved as `.keras`, loaded by Keras again, and imported.
Cases that Keras itself does not reproduce are not counted. Writes
`benchmarks/results/keras_conformance.json`.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Thousands of small programs run once each: they need not be fast.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import importlib
import inspect
import json
import pkgutil
import sys
import tempfile
import types
import unittest
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np

from fastgpu.errors import FastGPUError, UnsupportedLayerError
from fastgpu.importers import from_keras

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "keras_conformance.json"
TOLERANCE = 1e-5


def main(wanted: list[str]) -> None:
    warnings.simplefilter("ignore")
    cases = list(collect())
    rows, seen = [], set()
    for case in cases:
        name = case[0].__name__
        key = f"{name} {sorted(map(repr, case[1].items()))} {case[2]!r}"
        if key in seen or (wanted and name not in wanted):
            continue
        seen.add(key)
        try:
            row = judge(*case)
        except Exception as error:  # Whatever Keras raises on a case it cannot save or load.
            row = {"outcome": "not reproduced by Keras", "why": brief(error)}
        rows.append({"class": name, "options": shown(case[1]), **row})
        if row["outcome"] not in ("equal", "not reproduced by Keras"):
            print(f"{row['outcome']:9} {name} {shown(case[1])} {row.get('why', '')}", flush=True)
    counted = [row for row in rows if row["outcome"] != "not reproduced by Keras"]
    totals = Counter(row["outcome"] for row in rows)
    share = sum(row["outcome"] == "equal" for row in counted) / max(1, len(counted))
    print(f"{len(rows)} cases: {dict(totals)}; {share:.1%} of what Keras reproduces is equal")
    if not wanted:
        report = {"keras": keras.__version__, "share": share, "totals": dict(totals), "rows": rows}
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")


def collect() -> Iterator[tuple[type, dict[str, Any], Any]]:
    """What the tests of Keras's layers hand to `run_layer_test`: class, options, inputs."""
    from keras.src import layers, testing

    sys.modules["conftest"] = types.ModuleType("conftest")
    sys.modules["conftest"].skip_if_backend = lambda *_: lambda test: test  # pyright: ignore
    found: list[tuple[type, dict[str, Any], Any]] = []

    def record(self: Any, layer_cls: type, init_kwargs: Any, input_shape: Any = None,
               input_dtype: Any = None, input_sparse: bool = False, input_ragged: bool = False,
               input_data: Any = None, call_kwargs: Any = None, **_: Any) -> None:  # fmt: skip
        if layer_cls.__module__.startswith("keras.src.layers") and not (
            input_sparse or input_ragged or call_kwargs or layer_cls.__module__.endswith("_test")
        ):
            parts = jax.tree.leaves(dict(init_kwargs))
            if any(type(part).__module__.endswith("_test") for part in parts):
                return  # A cell that the test itself defines.
            inputs = input_data if input_data is not None else sample(input_shape, input_dtype)
            found.append((layer_cls, dict(init_kwargs), inputs))

    setattr(testing.TestCase, "run_layer_test", record)  # noqa: B010
    for module in pkgutil.walk_packages(layers.__path__, "keras.src.layers."):
        if not module.name.endswith("_test"):
            continue
        # Some tests import what only Keras's data pipelines need.
        stand_in = sys.modules.setdefault("grain", types.ModuleType("grain"))
        try:
            tests = importlib.import_module(module.name)
        except Exception as error:  # A test may need packages that are not installed.
            print(f"left out {module.name}: {brief(error)}")
            continue
        finally:
            if not hasattr(stand_in, "__file__"):
                sys.modules.pop("grain", None)
        for _, case in inspect.getmembers(tests, inspect.isclass):
            if issubclass(case, unittest.TestCase) and case.__module__ == module.name:
                _run(case)
    yield from found


def _run(case: type[unittest.TestCase]) -> None:
    """The methods that call `run_layer_test`; what else they check does not matter here."""
    source = inspect.getsource(case)
    for name in unittest.defaultTestLoader.getTestCaseNames(case):
        base = name.split("__")[0].rstrip("0123456789_")
        text = source[source.index(f"def {base}") :] if f"def {base}" in source else source
        if "run_layer_test" not in text.split("\n    def ", 2)[0]:
            continue
        with np.errstate(all="ignore"):
            case(name).run(unittest.TestResult())


def sample(shape: Any, dtype: Any) -> Any:
    """Seeded inputs of a nest of shapes."""
    rng = np.random.default_rng(0)
    if isinstance(shape, dict):
        # Arguments of the call: "query_shape" is the shape of the argument "query".
        return {name.removesuffix("_shape"): sample(size, dtype) for name, size in shape.items()}
    if isinstance(shape, list) or (isinstance(shape, tuple) and isinstance(shape[0], tuple)):
        return [sample(size, dtype) for size in shape]
    dtype = str(dtype or "float32")
    if "int" in dtype:
        return rng.integers(0, 3, shape).astype(dtype)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    return rng.normal(0, 1, shape).astype(dtype)


def judge(layer_class: type, options: dict[str, Any], inputs: Any) -> dict[str, Any]:
    """Build, save, reload in Keras, import, and compare."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    arrays = jax.tree.map(np.asarray, inputs)
    symbols = jax.tree.map(lambda x: keras.Input(batch_shape=x.shape, dtype=str(x.dtype)), arrays)
    layer = layer_class(**options)
    outputs = layer(**symbols) if isinstance(symbols, dict) else layer(symbols)
    model: Any = keras.Model(symbols, outputs)
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if "float" in str(weight.dtype) and "count" not in weight.path:
            weight.assign(np.abs(rng.normal(0, 0.5, weight.shape)) + 0.1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.keras"
        model.save(path)
        golden = model(arrays, training=False)
        loaded: Any = keras.models.load_model(path, safe_mode=False)
        again = loaded(arrays, training=False)
        if not agree(again, golden, TOLERANCE):
            return {"outcome": "not reproduced by Keras", "why": "other outputs when reloaded"}
        try:
            imported = from_keras(path)
            got = imported.module.apply(imported.variables, *jax.tree.leaves(arrays))
        except UnsupportedLayerError as error:
            return {"outcome": "refused", "why": str(error).split("got: ")[1].split("\n")[0]}
        except FastGPUError as error:
            return {"outcome": "error", "why": brief(error)}
        except Exception as error:
            return {"outcome": "crash", "why": brief(error)}
    return {"outcome": "equal" if agree(got, golden, TOLERANCE) else "different"}


def agree(got: Any, want: Any, tolerance: float) -> bool:
    """Equal shapes, and values within a tolerance of the largest."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    if len(got) != len(want):
        return False
    for g, w in zip(got, want, strict=True):
        g, w = np.asarray(g, "float64"), np.asarray(w, "float64")
        if g.shape != w.shape or not np.array_equal(np.isnan(g), np.isnan(w)):
            return False
        g, w = np.nan_to_num(g), np.nan_to_num(w)
        if g.size and np.abs(g - w).max() > tolerance * max(1.0, np.abs(w).max()):
            return False
    return True


def shown(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={str(value)[:60]}" for key, value in options.items())


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


if __name__ == "__main__":
    main(sys.argv[1:])
