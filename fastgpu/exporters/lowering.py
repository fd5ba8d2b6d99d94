"""A function lowered by `jax.export` for several platforms and any batch size, in one program."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fastgpu.errors import ExportError
from fastgpu.exporters.signatures import InputSpec, named_outputs

LARGEST_PROGRAM = 256 * 2**20


def lower(
    name: str, fn: Callable[..., Any], arguments: Sequence[Any], platforms: Sequence[str]
) -> jax.export.Exported:
    """`fn(*arguments)` as an exported program; `name` is for messages.

    Raises `ExportError` when `fn` cannot be lowered, or when the program is so large that arrays
    must be baked into it.
    """
    try:
        exported = jax.export.export(jax.jit(fn), platforms=platforms)(*arguments)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"signature {name!r} cannot be lowered for {', '.join(platforms)}",
            expected="a function of (variables, inputs) that JAX can export",
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            fix="if a symbolic size is the trouble, give it as a number, or name sizes that are"
            ' equal with the same string: inputs=[("batch", "time"), ("batch", "time")]',
        ) from error
    size = len(exported.mlir_module_serialized)
    if size > LARGEST_PROGRAM:
        raise ExportError(
            f"the program of signature {name!r} has arrays baked into it",
            expected=f"a program of at most {LARGEST_PROGRAM >> 20} MiB, weights in `variables`",
            got=f"{size >> 20} MiB",
            fix="pass every large array that the function uses through `variables`",
        )
    return exported


def output_specs(exported: jax.export.Exported) -> dict[str, InputSpec]:
    """The outputs of a program by name."""
    named = named_outputs(jax.tree.unflatten(exported.out_tree, exported.out_avals))
    return {name: array_spec(name, aval) for name, aval in named.items()}


def array_spec(name: str, aval: Any) -> InputSpec:
    """An abstract array under a name; symbolic sizes become text."""
    sizes = tuple(size if isinstance(size, int) else str(size) for size in aval.shape)
    return InputSpec(name, sizes, np.dtype(aval.dtype))


def host_array(path: Any, leaf: Any) -> np.ndarray:
    """A leaf as a NumPy array of the dtype that JAX computes with.

    Raises `ExportError` for a random key, naming the leaf by its `path`.
    """
    if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ExportError(
            f"variables{jax.tree_util.keystr(path)} is a random key",
            expected="arrays of numbers",
            got=str(leaf.dtype),
            fix="export the inference function, without random state",
        )
    array = np.asarray(jax.device_get(leaf))
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)


@contextlib.contextmanager
def cpu_if(platforms: Sequence[str]) -> Iterator[None]:
    """Compute on the CPU when the export can: the reloaded copy runs there too."""
    try:
        device = jax.devices("cpu")[0] if "cpu" in platforms else None
    except RuntimeError:
        device = None
    with jax.default_device(device) if device is not None else contextlib.nullcontext():
        yield
