"""`export_stablehlo`: a module or function and its variables as one StableHLO program."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fastgpu import __version__
from fastgpu.errors import ExportError
from fastgpu.exporters import reload_stablehlo, verification
from fastgpu.exporters.lowering import (
    LARGEST_PROGRAM,
    array_spec,
    cpu_if,
    host_array,
    lower,
    output_specs,
)
from fastgpu.exporters.manifest import (
    MANIFEST_FILE,
    PLATFORMS,
    PROGRAM_FILE,
    WEIGHTS_FILE,
    Manifest,
    describe_file,
)
from fastgpu.exporters.report import REPORT_FILE, ExportReport, SignatureReport
from fastgpu.exporters.signatures import (
    InputSpec,
    inference_function,
    input_specs,
    named_outputs,
    sample_arrays,
    symbolic_arguments,
)
from fastgpu.exporters.stablehlo_model import default_platforms, unknown_custom_calls
from fastgpu.exporters.staging import staged_folder

_NAME = "call"
# What safetensors both writes from NumPy and reads into JAX.
_SEPARATE_DTYPES = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("bfloat16", "float16", "float32", "float64", "complex64"),
}


def export_stablehlo(
    module_or_fn: nn.Module | Callable[..., Any],
    variables: Any,
    path: str | os.PathLike[str],
    *,
    inputs: Any = None,
    platforms: Sequence[str] = ("cpu", "cuda"),
    weights: Literal["inside", "separate"] = "inside",
    batch_sizes: Sequence[int] = (1, 3),
    sample: Any = None,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a folder with a program that `load_stablehlo` runs without the model's code.

    `module_or_fn`, `inputs`, `batch_sizes`, `sample`, `tolerance` and `overwrite` mean what they
    mean in `export_saved_model`: sizes given as `None` or as names stay open, outputs are named by
    their dict keys or `output_0`, `output_1`, ... `platforms` is any of "cpu", "cuda", "rocm" and
    "tpu"; one program holds them all, and none of them has to be present, but one on which it can
    be verified. The program is the function as it stands, in the precision that it is traced in;
    XLA optimizes it for the device when it is loaded.

    `weights` are constants "inside" of the program, up to 256 MiB, or "separate" beside it, in
    safetensors, of any size.

    The export is a folder, because the manifest can then be read and checked before anything is
    deserialized, and each file by its own tool: `program.bin` is `jax.export`'s own serialization,
    so that `jax.export.deserialize` alone runs it; `stablehlo.json` is the manifest (names, shapes
    with symbols, dtypes, platforms, versions, sizes and SHA-256 of the files);
    `weights.safetensors` is there if asked for. A new process loads the folder and runs it once
    for each of `batch_sizes`, which is compared with the live function. `path` appears only after
    that, in one step, with the report as `fastgpu_export.json` in it. The model is for inference:
    it has no gradient.

    Raises `ExportError`, and leaves nothing behind, when `path` exists (`overwrite=True` replaces
    an earlier export, and only that), when it cannot be written, when the function cannot be
    lowered or calls back into Python, when no platform is present, or when the numbers differ.

    >>> report = export_stablehlo(model.module, state.variables, "out/")  # doctest: +SKIP
    >>> print(report)  # doctest: +SKIP
    out: StableHLO, 0.05 MB, 8 variables (0 trainable), platforms cpu, cuda, verified in 3.1 s
    ...
    """
    started = time.perf_counter()
    target, platforms = Path(os.path.abspath(path)), tuple(platforms)
    _check_platforms(platforms)
    variables = jax.tree.map_with_path(host_array, variables)
    separate = _is_separate(weights, variables)
    with staged_folder(target, overwrite=overwrite, marker=MANIFEST_FILE) as work:
        specs = input_specs(module_or_fn, inputs)
        values = sample_arrays(specs, inputs, sample)
        fn = inference_function(module_or_fn)
        exported = _lower(fn, variables, specs, platforms, separate=separate)
        stablehlo = exported.mlir_module()
        _refuse_foreign_code(stablehlo)
        with cpu_if(platforms):
            calls = verification.live_calls(_NAME, fn, variables, specs, values, batch_sizes)
        _write(work / "new", exported, specs, _flat(variables) if separate else None)
        bound = verification.default_tolerance(stablehlo) if tolerance is None else tolerance
        results = _reloaded_outputs(work, calls, on_cpu="cpu" in platforms)
        checks = tuple(
            verification.compare(call, got, bound) for call, got in zip(calls, results, strict=True)
        )
        outputs = {name: str(spec) for name, spec in output_specs(exported).items()}
        report = ExportReport(
            format="StableHLO",
            path=target,
            signatures=(SignatureReport(_NAME, {i.name: str(i) for i in specs}, outputs, checks),),
            platforms=platforms,
            calling_convention_version=exported.calling_convention_version,
            variables=len(jax.tree.leaves(variables)),
            trainable_variables=0,
            bytes=sum(file.stat().st_size for file in (work / "new").iterdir()),
            seconds=time.perf_counter() - started,
        )
        (work / "new" / REPORT_FILE).write_text(report.to_json())
    return report


def _check_platforms(platforms: tuple[str, ...]) -> None:
    known = platforms and set(platforms) <= set(PLATFORMS) and len(set(platforms)) == len(platforms)
    if not known:
        raise ExportError(
            "unknown platforms",
            expected=f"platforms=(...) with names from {', '.join(PLATFORMS)}, each once",
            got=repr(platforms),
        )
    if "cpu" not in platforms and not set(default_platforms()) & set(platforms):
        raise ExportError(
            f"an export for {', '.join(platforms)} cannot be verified on this machine",
            expected="a machine with one of the platforms",
            got=f"JAX on {' or '.join(default_platforms())}",
            fix='add "cpu" to platforms: one program holds them all',
        )


def _is_separate(weights: str, variables: Any) -> bool:
    if weights not in ("inside", "separate"):
        raise ExportError("unknown `weights`", expected='"inside" or "separate"', got=repr(weights))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    if weights == "inside" and size > LARGEST_PROGRAM:
        raise ExportError(
            "the weights are too large to be constants of the program",
            expected=f"at most {LARGEST_PROGRAM >> 20} MiB",
            got=f"{size >> 20} MiB",
            fix='pass weights="separate"',
        )
    return weights == "separate"


def _flat(variables: Any) -> dict[str, np.ndarray]:
    """The variables by path, for a file that knows no trees."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ExportError(
            "two variables have the same path once it is written as text",
            expected="keys without a slash",
            got=", ".join(sorted(named)[:5]),
            fix='rename them, or pass weights="inside"',
        )
    if odd := {leaf.dtype.name for leaf in named.values()} - _SEPARATE_DTYPES:
        raise ExportError(
            "these weights cannot be stored beside the program",
            expected=f"one of {', '.join(sorted(_SEPARATE_DTYPES))}",
            got=", ".join(sorted(odd)),
            fix='pass weights="inside"',
        )
    return named


def _lower(
    fn: Callable[..., Any],
    variables: Any,
    specs: tuple[InputSpec, ...],
    platforms: tuple[str, ...],
    *,
    separate: bool,
) -> jax.export.Exported:
    """The program: from `(*inputs)`, or from `(weights by path, *inputs)`, to outputs by name."""
    arguments = symbolic_arguments(specs)
    if not separate:

        def serve(*arrays: jax.Array) -> dict[str, Any]:
            return named_outputs(fn(jax.tree.map(jnp.asarray, variables), *arrays))

        return lower(_NAME, serve, arguments, platforms)

    def serve_with(weights: dict[str, jax.Array], *arrays: jax.Array) -> dict[str, Any]:
        # `_flat` keeps the order of the leaves; a dict that comes through jit is sorted.
        leaves = [weights[name] for name in flat]
        return named_outputs(fn(jax.tree.unflatten(tree, leaves), *arrays))

    flat, tree = _flat(variables), jax.tree.structure(variables)
    types = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flat.items()}
    return lower(_NAME, serve_with, (types, *arguments), platforms)


def _refuse_foreign_code(stablehlo: str) -> None:
    if unknown := unknown_custom_calls(stablehlo):
        raise ExportError(
            f"the program calls {', '.join(map(repr, unknown))}",
            expected="operations of StableHLO and of the linear algebra libraries",
            got="a call into code that only this process or this device has",
            fix="compute this step outside of the exported function, or write it in jax.numpy",
        )


def _write(
    folder: Path,
    exported: jax.export.Exported,
    specs: tuple[InputSpec, ...],
    weights: dict[str, np.ndarray] | None,
) -> None:
    folder.mkdir()
    (folder / PROGRAM_FILE).write_bytes(exported.serialize(vjp_order=0))
    if weights is not None:
        from safetensors.numpy import save_file

        # not ascontiguousarray: it makes a vector of a scalar
        arrays = {name: np.asarray(leaf, order="C") for name, leaf in weights.items()}
        save_file(arrays, folder / WEIGHTS_FILE)
    avals = exported.in_avals[len(exported.in_avals) - len(specs) :]
    manifest = Manifest(
        fastgpu=__version__,
        jax=jax.__version__,
        calling_convention_version=exported.calling_convention_version,
        platforms=tuple(exported.platforms),
        inputs=tuple(array_spec(s.name, aval) for s, aval in zip(specs, avals, strict=True)),
        outputs=tuple(output_specs(exported).values()),
        program=describe_file(folder / PROGRAM_FILE),
        weights=None if weights is None else describe_file(folder / WEIGHTS_FILE),
    )
    (folder / MANIFEST_FILE).write_text(manifest.to_json())


def _reloaded_outputs(
    work: Path, calls: Sequence[verification.Call], *, on_cpu: bool
) -> list[dict[str, np.ndarray]]:
    """The outputs by name of the same calls, made by a new process that loads the folder."""
    search = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    settings = {
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "JAX_ENABLE_X64": str(int(jax.config.jax_enable_x64)),  # pyright: ignore[reportAttributeAccessIssue]
        # This process may hold most of a GPU's memory.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    if on_cpu:
        settings["JAX_PLATFORMS"] = "cpu"
    try:
        return verification.outputs_of_script(
            reload_stablehlo.__file__, work / "new", [call.inputs for call in calls], work, settings
        )
    except verification.ScriptError as error:
        raise ExportError(
            "the exported program does not run in a new process",
            expected="a process without the model's code to load it and call it",
            got=verification.last_words(error.stderr),
            fix="see that every operation of the function runs on the platform of this machine",
        ) from None
