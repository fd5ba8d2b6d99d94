"""`export_saved_model`: a module or function and its variables as a TensorFlow SavedModel."""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from fastgpu.errors import ExportError, require
from fastgpu.exporters import verification
from fastgpu.exporters.lowering import cpu_if, host_array, lower, output_specs
from fastgpu.exporters.report import REPORT_FILE, ExportReport, SignatureReport
from fastgpu.exporters.signatures import (
    InputSpec,
    Signature,
    inference_function,
    input_specs,
    named_outputs,
    sample_arrays,
    symbolic_arguments,
)
from fastgpu.exporters.staging import staged_folder
from fastgpu.exporters.tensorflow_ops import refuse_unknown_calls, runnable_in_tensorflow

DEFAULT_SIGNATURE = "serving_default"


@dataclass(frozen=True)
class _Lowered:
    """A signature that TensorFlow can run, as far as its lowered program shows."""

    name: str
    fn: Callable[..., Any]
    specs: tuple[InputSpec, ...]
    sample: tuple[Any, ...] | None
    outputs: dict[str, str]
    version: int
    tolerance: float


def export_saved_model(
    module_or_fn: nn.Module | Callable[..., Any],
    variables: Any,
    path: str | os.PathLike[str],
    *,
    inputs: Any = None,
    signatures: Mapping[str, Signature | nn.Module | Callable[..., Any]] | None = None,
    platforms: Sequence[str] = ("cpu", "cuda"),
    batch_sizes: Sequence[int] = (1, 3),
    sample: Any = None,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a SavedModel at `path` that runs in TensorFlow without JAX, and prove that it does.

    `module_or_fn` is a linen module, called as `module.apply(variables, *inputs)`, or a function
    `fn(variables, *inputs)`; it becomes the signature `serving_default`. `signatures` adds others
    by name: functions, or `Signature(fn, inputs, sample)`. `inputs` has one entry per input: a
    shape (float32), a pair `(shape, dtype)`, a `jax.ShapeDtypeStruct`, or an example array; a dict
    gives the inputs their names. `None` as the first size is the batch, one symbol for all inputs;
    elsewhere it is a symbol of its own, and a string is a symbol with a name (equal names, equal
    sizes). Imported modules know their inputs.

    `variables` become `tf.Variable`s, never constants: those in a collection `params` (or all, when
    there are no collections) trainable, others not. Outputs are named by their dict keys, or
    `output_0`, `output_1`, ... by position.

    Operations that TensorFlow's older XLA does not know are rewritten (`tensorflow_ops`). The
    folder is then reloaded in a process where JAX cannot be imported and called once for each of
    `batch_sizes`, on `sample` (arrays) or random inputs, and compared with the live function: the
    largest difference over the output's largest magnitude must stay within `tolerance` (by default
    1e-4 in float32, 3e-2 in bfloat16). `path` appears only after that, in one step, with the report
    as `fastgpu_export.json` in it. The model is for inference: it has no gradient.

    Raises `ExportError`, and leaves nothing behind, when `path` exists (`overwrite=True` replaces
    an earlier export, and only that), when its folder is read-only, when an operation cannot run
    in TensorFlow, or when the numbers differ; `MissingExtraError` without TensorFlow.

    >>> report = export_saved_model(model.module, state.variables, "out/")  # doctest: +SKIP
    >>> print(report)  # doctest: +SKIP
    out: SavedModel, 0.05 MB, 8 variables (6 trainable), platforms cpu, cuda, verified in 9.1 s
    ...
    """
    started = time.perf_counter()
    tf = require("tensorflow", "tensorflow")
    target, platforms = Path(os.path.abspath(path)), tuple(platforms)
    variables = jax.tree.map_with_path(host_array, variables)
    with staged_folder(target, overwrite=overwrite, marker="saved_model.pb") as work:
        lowered = [
            _lower(name, signature, variables, platforms)
            for name, signature in _all_signatures(
                Signature(module_or_fn, inputs, sample), signatures or {}
            ).items()
        ]
        _check_calling_convention(lowered[0].version)
        with cpu_if(platforms):
            calls = {
                s.name: verification.live_calls(
                    s.name, s.fn, variables, s.specs, s.sample, batch_sizes
                )
                for s in lowered
            }
        weights = _tf_variables(tf, variables)
        _write(tf, lowered, weights, platforms, work / "new")
        checks = _verify(work, lowered, calls, tolerance, on_cpu="cpu" in platforms)
        report = ExportReport(
            format="SavedModel",
            path=target,
            signatures=tuple(
                SignatureReport(
                    s.name, {i.name: str(i) for i in s.specs}, s.outputs, checks[s.name]
                )
                for s in lowered
            ),
            platforms=platforms,
            calling_convention_version=lowered[0].version,
            variables=len(jax.tree.leaves(weights)),
            trainable_variables=sum(v.trainable for v in jax.tree.leaves(weights)),
            bytes=sum(file.stat().st_size for file in (work / "new").rglob("*") if file.is_file()),
            seconds=time.perf_counter() - started,
        )
        (work / "new" / REPORT_FILE).write_text(report.to_json())
    return report


def _all_signatures(default: Signature, others: Mapping[str, Any]) -> dict[str, Signature]:
    found = {DEFAULT_SIGNATURE: default}
    for name, given in others.items():
        if name == DEFAULT_SIGNATURE or not name.isidentifier():
            raise ExportError(
                f"a signature cannot be named {name!r}",
                expected=f"an identifier other than {DEFAULT_SIGNATURE!r}",
                got=repr(name),
            )
        signature = given if isinstance(given, Signature) else Signature(given)
        if signature.inputs is None and not hasattr(signature.fn, "input_specs"):
            signature = signature.with_inputs_of(default)
        found[name] = signature
    return found


def _lower(name: str, signature: Signature, variables: Any, platforms: tuple[str, ...]) -> _Lowered:
    """Lower as for the export, only to look at the result before anything is written."""
    specs = input_specs(signature.fn, signature.inputs)
    sample = sample_arrays(specs, signature.inputs, signature.sample)
    fn = inference_function(signature.fn)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    exported = lower(
        name, runnable_in_tensorflow(fn), (shapes, *symbolic_arguments(specs)), platforms
    )
    stablehlo = exported.mlir_module()
    refuse_unknown_calls(stablehlo)
    return _Lowered(
        name=name,
        fn=fn,
        specs=specs,
        sample=sample,
        outputs={name: str(spec) for name, spec in output_specs(exported).items()},
        version=exported.calling_convention_version,
        tolerance=verification.default_tolerance(stablehlo),
    )


def _check_calling_convention(version: int) -> None:
    xla = require("tensorflow.compiler.tf2xla.python.xla", "tensorflow")
    newest = xla.call_module_maximum_supported_version()
    if version > newest:
        raise ExportError(
            "the installed TensorFlow is too old for the installed JAX",
            expected=f"calling convention {version} or newer",
            got=f"calling convention {newest}",
            fix="pip install --upgrade 'fastgpu[tensorflow]'",
        )


def _tf_variables(tf: Any, variables: Any) -> Any:
    """The same tree of `tf.Variable`s, named by path; only `params` are trainable."""
    has_collections = isinstance(variables, Mapping) and "params" in variables

    def variable(path: Any, leaf: np.ndarray) -> Any:
        name = "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        trainable = not has_collections or name.startswith("params/")
        return tf.Variable(
            leaf,
            trainable=trainable and bool(jax.numpy.issubdtype(leaf.dtype, np.inexact)),
            name=re.sub(r"[^A-Za-z0-9_./-]", "_", name).lstrip("_-/") or "variable",
        )

    return jax.tree.map_with_path(variable, variables)


def _write(
    tf: Any, lowered: Sequence[_Lowered], weights: Any, platforms: tuple[str, ...], folder: Path
) -> None:
    root = tf.Module()
    root.model_variables = jax.tree.leaves(weights)
    functions = {s.name: _tf_function(tf, s, weights, platforms) for s in lowered}
    tf.saved_model.save(root, os.fspath(folder), signatures=functions)


def _tf_function(tf: Any, signature: _Lowered, weights: Any, platforms: tuple[str, ...]) -> Any:
    from jax.experimental import jax2tf

    converted = jax2tf.convert(
        runnable_in_tensorflow(signature.fn),
        polymorphic_shapes=[None, *(spec.polymorphic_shape for spec in signature.specs)],
        with_gradient=False,
        native_serialization_platforms=platforms,
    )

    def serve(*tensors: Any) -> dict[str, Any]:
        return named_outputs(converted(weights, *tensors))

    return tf.function(
        serve,
        autograph=False,
        input_signature=[
            tf.TensorSpec(spec.open_shape, spec.dtype, name=spec.name) for spec in signature.specs
        ],
    )


def _verify(
    work: Path,
    lowered: Sequence[_Lowered],
    calls: Mapping[str, Sequence[verification.Call]],
    tolerance: float | None,
    *,
    on_cpu: bool,
) -> dict[str, tuple[verification.Check, ...]]:
    flat = [(s, call) for s in lowered for call in calls[s.name]]
    results = verification.reloaded_outputs(
        work / "new", [call for _, call in flat], work, on_cpu=on_cpu
    )
    checks: dict[str, list[verification.Check]] = {s.name: [] for s in lowered}
    for (s, call), got in zip(flat, results, strict=True):
        bound = s.tolerance if tolerance is None else tolerance
        checks[s.name].append(verification.compare(call, got, bound))
    return {name: tuple(found) for name, found in checks.items()}
