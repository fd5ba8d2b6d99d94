"""An export counts when a process without JAX gives the live function's numbers."""

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fastgpu.errors import ExportError
from fastgpu.exporters import reload_savedmodel
from fastgpu.exporters.report import Check
from fastgpu.exporters.signatures import BATCH, InputSpec, named_outputs

# Two versions of XLA sum in another order: the error grows with depth, relative to the output.
_TOLERANCES = (("bf16", 3e-2), ("f16", 5e-3), ("f32", 1e-4), ("f64", 1e-9))
_FIRST_OPEN_SIZE = 32


@dataclass(frozen=True)
class Call:
    """One call of one signature: inputs by name, and what the live function gave for them."""

    signature: str
    sizes: dict[str, int]
    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]


def live_calls(
    signature: str,
    fn: Callable[..., Any],
    variables: Any,
    specs: Sequence[InputSpec],
    sample: Sequence[np.ndarray] | None,
    batch_sizes: Sequence[int],
) -> list[Call]:
    """Call the live `fn` once per batch size, on `sample` or on random inputs from a fixed seed.

    Raises `ExportError` when an output is nothing but NaN: then there is nothing to compare.
    """
    rng = np.random.default_rng(0)
    calls = []
    for index, batch in enumerate(batch_sizes):
        sizes = _sizes(specs, sample, batch, _FIRST_OPEN_SIZE + 8 * index)
        if sample is None:
            inputs = [_random_input(spec, sizes, rng) for spec in specs]
        else:
            inputs = [
                np.resize(array, (sizes[BATCH], *array.shape[1:]))
                if spec.shape[:1] == (BATCH,)
                else array
                for spec, array in zip(specs, sample, strict=True)
            ]
        expected = named_outputs(jax.device_get(jax.jit(fn)(variables, *inputs)))
        expected = {name: np.asarray(value) for name, value in expected.items()}
        for name, value in expected.items():
            if _is_float(value) and value.size and np.isnan(value.astype(np.complex128)).all():
                raise ExportError(
                    f"output {name!r} of signature {signature!r} is nothing but NaN",
                    expected="numbers that a reloaded copy can be compared with",
                    got="NaN everywhere, from " + ("random inputs" if sample is None else "sample"),
                    fix="pass sample=(arrays with real inputs of the model)",
                )
        named = {spec.name: value for spec, value in zip(specs, inputs, strict=True)}
        calls.append(Call(signature, sizes, named, expected))
    return calls


def reloaded_outputs(folder: Path, calls: Sequence[Call], work: Path, *, on_cpu: bool) -> list:
    """The outputs by name of the same `calls`, made by TensorFlow in a process without JAX.

    Raises `ExportError` with TensorFlow's own words when it cannot load or run the model.
    """
    settings = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "2"}
    if on_cpu:
        settings["CUDA_VISIBLE_DEVICES"] = "-1"
    try:
        return outputs_of_script(
            reload_savedmodel.__file__,
            folder,
            [(call.signature, call.inputs) for call in calls],
            work,
            settings,
        )
    except ScriptError as error:
        raise ExportError(
            "the exported model does not run in TensorFlow",
            expected="a process without JAX to load it and call every signature",
            got=last_words(error.stderr),
            fix="the operation named above has no form that TensorFlow's XLA knows; replace it",
        ) from None


class ScriptError(Exception):
    """A reloading script ended with an error; `stderr` is what it wrote."""

    def __init__(self, stderr: str) -> None:
        super().__init__(stderr)
        self.stderr = stderr


def outputs_of_script(
    script: str, folder: Path, calls: Sequence[Any], work: Path, settings: dict[str, str]
) -> list[dict[str, np.ndarray]]:
    """What `script`, in a process of its own, writes about `calls` to the export in `folder`.

    `settings` are added to the environment. Raises `ScriptError` when the process fails.
    """
    questions, answers = work / "calls.pickle", work / "results.pickle"
    questions.write_bytes(pickle.dumps(calls))
    # -P: the script's own folder must not be searched for modules.
    command = [sys.executable, "-P", script, folder, questions, answers]
    environment = {**os.environ, **settings}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise ScriptError(process.stderr)
    return pickle.loads(answers.read_bytes())


def compare(call: Call, got: dict[str, np.ndarray], tolerance: float) -> Check:
    """The errors of one reloaded call. Raises `ExportError` when one exceeds `tolerance`.

    Floats: the largest difference over the output's largest magnitude. Integers and booleans have
    to be equal.
    """
    if got.keys() != call.expected.keys():
        raise ExportError(
            f"the reloaded signature {call.signature!r} has other outputs",
            expected=", ".join(call.expected),
            got=", ".join(got),
        )
    worst_error, worst_relative, agreements = 0.0, 0.0, []
    for name, expected in call.expected.items():
        error, relative = _difference(expected, got[name])
        allowed = tolerance if _is_float(expected) else 0.0
        if not relative <= allowed:
            raise ExportError(
                f"the reloaded model gives other numbers: output {name!r} of signature"
                f" {call.signature!r} at {call.sizes}",
                expected=f"a relative error of at most {allowed:.1e}",
                got=f"{relative:.1e} (largest difference {error:.1e})",
                fix="nothing was written; pass tolerance=... if this error is acceptable",
            )
        worst_error, worst_relative = max(worst_error, error), max(worst_relative, relative)
        if _is_float(expected) and expected.ndim > 1 and expected.shape[-1] > 1 and expected.size:
            agreements.append(np.mean(expected.argmax(-1) == got[name].argmax(-1)))
    agreement = float(min(agreements)) if agreements else None
    return Check(call.sizes, worst_error, worst_relative, agreement)


def default_tolerance(stablehlo: str) -> float:
    """The tolerance of the coarsest float type that a lowered module computes in.

    >>> default_tolerance("stablehlo.add : tensor<3xf32>"), default_tolerance("tensor<2x3xbf16>")
    (0.0001, 0.03)
    """
    return next(
        (b for kind, b in _TOLERANCES if f"<{kind}>" in stablehlo or f"x{kind}>" in stablehlo),
        _TOLERANCES[-1][1],
    )


def _sizes(
    specs: Sequence[InputSpec], sample: Sequence[np.ndarray] | None, batch: int, other: int
) -> dict[str, int]:
    """A size for every symbol: the batch asked for, others from the sample or by default."""
    sizes: dict[str, int] = {}
    for index, spec in enumerate(specs):
        for axis, symbol in enumerate(spec.shape):
            if isinstance(symbol, str) and symbol not in sizes:
                known = other if sample is None else sample[index].shape[axis]
                sizes[symbol] = batch if symbol == BATCH else known
    return sizes


def _random_input(spec: InputSpec, sizes: dict[str, int], rng: np.random.Generator) -> np.ndarray:
    shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
    if np.issubdtype(spec.dtype, np.integer) or spec.dtype == np.bool_:
        # Two values only: they may be indices, and the smallest table has two rows.
        return rng.integers(0, 2, shape).astype(spec.dtype)
    return rng.normal(size=shape).astype(spec.dtype)


def _is_float(value: np.ndarray) -> bool:
    return jax.numpy.issubdtype(value.dtype, np.inexact)


def _difference(expected: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """Largest difference, and the same over the largest magnitude; infinite when types differ."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return np.inf, np.inf
    a, b = expected.astype(np.complex128), got.astype(np.complex128)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return 0.0, 0.0
    with np.errstate(invalid="ignore"):
        error = float(np.nan_to_num(np.where(same, 0, np.abs(a - b)), nan=np.inf).max())
    finite = np.abs(a[np.isfinite(a)])
    return error, error / max(float(finite.max(initial=0)), float(np.finfo(np.float32).tiny))


def last_words(stderr: str) -> str:
    """The line of a traceback that says what was wrong."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if not re.match(r"\[\[|File |\^|WARNING|[IWE]\d{4} ", line)]
    return (telling or lines or ["no message"])[-1][:400]
