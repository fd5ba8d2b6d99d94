"""`load_stablehlo`: an exported program as a function, without the code of the model."""

import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fastgpu.errors import BatchError, FileError
from fastgpu.exporters.lowering import array_spec, output_specs
from fastgpu.exporters.manifest import (
    PROGRAM_FILE,
    WEIGHTS_FILE,
    Manifest,
    StoredFile,
    check_file,
    read_manifest,
)
from fastgpu.exporters.signatures import InputSpec

# Python callbacks and device code that a program brings along are not among them.
_KNOWN_CUSTOM_CALLS = re.compile(
    r"shape_assertion|ApproxTopK|Sharding|SPMD\w+|annotate_device_placement|stablehlo\.\w+"
    r"|Qr|Eigh|LuDecomposition|ProductOfElementaryHouseholderReflectors"
    r"|lapack_\w+|(cu|hip)(solver|sparse)?_\w+_(ffi|permutation)"
)
_CUSTOM_CALL = re.compile(r'custom_call @(?:"([^"]*)"|([^"(\s]+))')


class StableHLOModel:
    """A loaded program: `model(*inputs)` or `model(name=array)` gives the outputs by name.

    It runs under `jax.jit` and may be called inside of other jitted functions; it has no gradient.
    `manifest` says what it takes and returns. Raises `BatchError` for other inputs.
    """

    def __init__(
        self,
        manifest: Manifest,
        exported: jax.export.Exported,
        weights: tuple[dict[str, jax.Array], ...],
    ) -> None:
        self.manifest = manifest
        self._run = jax.jit(exported.call)
        self._weights = weights

    def __call__(self, /, *inputs: Any, **named: Any) -> dict[str, jax.Array]:
        """The outputs by name; inputs by position, by name, or both."""
        return self._run(*self._weights, *self._checked(inputs, named))

    def __repr__(self) -> str:
        manifest = self.manifest
        types = _types(manifest.inputs, manifest.outputs, manifest.platforms)
        return f"StableHLOModel{types}"

    def _checked(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> list[jax.Array]:
        specs = self.manifest.inputs
        given = {**dict(zip((spec.name for spec in specs), inputs, strict=False)), **named}
        repeated = len(given) < len(inputs) + len(named)
        if len(inputs) > len(specs) or repeated or given.keys() != {spec.name for spec in specs}:
            raise BatchError(
                "the model is called with other inputs than it has",
                expected=", ".join(f"{spec.name}: {spec}" for spec in specs),
                got=", ".join([f"{len(inputs)} by position", *(f"{name}=" for name in named)]),
                fix="give every input once, by position or by name",
            )
        arrays = [jnp.asarray(given[spec.name]) for spec in specs]
        sizes: dict[str, int] = {}
        for array, spec in zip(arrays, specs, strict=True):
            if not _fits(array, spec, sizes):
                known = "".join(f", {name} = {size}" for name, size in sizes.items())
                raise BatchError(
                    f"input {spec.name!r} has another type than the program",
                    expected=f"{spec}{known}",
                    got=str(array_spec(spec.name, array)),
                    fix="equal names are equal sizes, of at least 1; cast with .astype",
                )
        return arrays


def load_stablehlo(path: str | os.PathLike[str]) -> StableHLOModel:
    """The program that `export_stablehlo` wrote at `path`, ready to be called.

    Before JAX sees the program, the manifest is checked field by field, and sizes and hashes of the
    files against it; nothing outside of the folder is read. A program that calls back into Python
    or brings device code along is refused. The hash finds damage, not malice: XLA's reader
    of programs is not made for hostile bytes, so take exports from people you trust.

    Raises `FileError` for all of these, for an unknown version of the format, for a program that
    was not exported for the platform of JAX's default device, and for one in 64 bits without
    `jax_enable_x64`.

    >>> model = load_stablehlo("out/")  # doctest: +SKIP
    >>> model(images)["output_0"].shape  # doctest: +SKIP
    (32, 10)
    """
    folder = Path(os.path.abspath(path))
    manifest = read_manifest(folder)
    _check_runs_here(manifest, folder)
    exported = _program(folder / PROGRAM_FILE, manifest)
    weights = () if manifest.weights is None else (_weights(folder, manifest.weights),)
    arguments = ((*weights, *manifest.inputs), {})
    types = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(weights)]
    declared = [(aval.shape, aval.dtype) for aval in exported.in_avals[: len(types)]]
    if jax.tree.structure(arguments) != exported.in_tree or types != declared:
        raise FileError(
            f"{folder}: the weights and the program do not belong together",
            expected=f"{exported.in_tree}"[:200],
            got=f"{jax.tree.structure(arguments)}"[:200],
            fix="export the model again",
        )
    return StableHLOModel(manifest, exported, weights)


def _program(path: Path, manifest: Manifest) -> jax.export.Exported:
    """The program, if JAX can read it, it is the manifest's, and it calls no foreign code."""
    program = check_file(path, manifest.program).read_bytes()
    try:
        exported = jax.export.deserialize(bytearray(program))
        stablehlo = exported.mlir_module()
        avals = exported.in_avals[len(exported.in_avals) - len(manifest.inputs) :]
        inputs = tuple(array_spec(s.name, a) for s, a in zip(manifest.inputs, avals, strict=True))
        outputs = tuple(output_specs(exported).values())
    except Exception as error:
        raise FileError(
            f"{path} is no program that JAX {jax.__version__} can read",
            expected="a program serialized by jax.export",
            got=f"{type(error).__name__}: {str(error)[:200]}",
            fix=f"export it again, or use JAX {manifest.jax}, which wrote it",
        ) from error
    found = (inputs, outputs, exported.platforms)
    if found != (manifest.inputs, manifest.outputs, manifest.platforms):
        raise FileError(
            f"{path.parent}: the manifest and the program do not belong together",
            expected=_types(manifest.inputs, manifest.outputs, manifest.platforms),
            got=_types(*found),
            fix="export the model again",
        )
    if unknown := unknown_custom_calls(stablehlo):
        raise FileError(
            f"{path} calls code that does not belong to XLA",
            expected="operations of StableHLO and of the linear algebra libraries",
            got=", ".join(unknown),
            fix="export the model without callbacks and custom kernels",
        )
    return exported


def _types(
    inputs: tuple[InputSpec, ...], outputs: tuple[InputSpec, ...], platforms: tuple[str, ...]
) -> str:
    """Inputs, outputs and platforms on one line.

    >>> _types((InputSpec("x", ("batch", 3), jnp.dtype("float32")),), (), ("cpu", "tpu"))
    '(x: float32[batch, 3]) -> () on cpu, tpu'
    """
    given = ", ".join(f"{spec.name}: {spec}" for spec in inputs)
    returned = ", ".join(f"{spec.name}: {spec}" for spec in outputs)
    return f"({given}) -> ({returned}) on {', '.join(platforms)}"


def _weights(folder: Path, stored: StoredFile) -> dict[str, jax.Array]:
    from safetensors.flax import load_file

    path = check_file(folder / WEIGHTS_FILE, stored)
    try:
        return load_file(path)
    except Exception as error:
        raise FileError(
            f"{path} cannot be read",
            expected="arrays in safetensors",
            got=f"{type(error).__name__}: {str(error)[:200]}",
            fix="export the model again",
        ) from error


def unknown_custom_calls(stablehlo: str) -> list[str]:
    """The custom calls in a program's text that are neither StableHLO's nor a library's.

    >>> unknown_custom_calls('stablehlo.custom_call @xla_ffi_python_cpu_callback(%0)')
    ['xla_ffi_python_cpu_callback']
    >>> unknown_custom_calls('stablehlo.custom_call @lapack_spotrf_ffi(%0)')
    []
    """
    called = {quoted or plain for quoted, plain in _CUSTOM_CALL.findall(stablehlo)}
    return sorted(name for name in called if not _KNOWN_CUSTOM_CALLS.fullmatch(name))


def default_platforms() -> tuple[str, ...]:
    """The platform of JAX's default device, in the words of `jax.export`."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    platform = getattr(device, "platform", device) or jax.default_backend()
    return ("cuda", "rocm") if platform == "gpu" else (platform,)


def _check_runs_here(manifest: Manifest, folder: Path) -> None:
    here = default_platforms()
    if not set(here) & set(manifest.platforms):
        raise FileError(
            f"{folder} was not exported for {' or '.join(here)}",
            expected=f"a process on {' or '.join(manifest.platforms)}",
            got=f"JAX's default device on {' or '.join(here)}",
            fix=f"export with platforms=({here[0]!r}, ...), or set JAX_PLATFORMS",
        )
    oldest = jax.export.minimum_supported_calling_convention_version
    newest = jax.export.maximum_supported_calling_convention_version
    if not oldest <= manifest.calling_convention_version <= newest:
        raise FileError(
            f"{folder} was exported by a JAX too far from the installed one",
            expected=f"calling convention {oldest} to {newest} (JAX {jax.__version__})",
            got=f"calling convention {manifest.calling_convention_version} (JAX {manifest.jax})",
            fix="install a JAX nearer to that, or export the model again",
        )
    wide = {s.dtype for s in (*manifest.inputs, *manifest.outputs)}
    if narrowed := sorted(t.name for t in wide if jax.dtypes.canonicalize_dtype(t) != t):
        raise FileError(
            f"{folder} computes in 64 bits",
            expected="jax_enable_x64",
            got=f"{', '.join(narrowed)} in a process of 32 bits",
            fix='jax.config.update("jax_enable_x64", True) before anything is computed',
        )


def _fits(array: jax.Array, spec: InputSpec, sizes: dict[str, int]) -> bool:
    """Whether an input is as declared; the sizes of its symbols are added to `sizes`."""
    if array.dtype != spec.dtype or array.ndim != len(spec.shape):
        return False
    for size, want in zip(array.shape, spec.shape, strict=True):
        known = sizes.setdefault(want, size) if isinstance(want, str) else want
        if size != known or (isinstance(want, str) and size < 1):
            return False
    return True
