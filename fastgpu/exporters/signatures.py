"""What an exported function takes and returns: names, shapes with symbols, dtypes."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from fastgpu.errors import ExportError

BATCH = "batch"
_HOW_TO_GIVE_INPUTS = (
    "pass inputs=[...], one entry per input: a shape such as (None, 28, 28, 1), a pair (shape,"
    " dtype), a jax.ShapeDtypeStruct, or an example array whose first axis is the batch"
)


@dataclass(frozen=True)
class Signature:
    """A function to export under a name of its own, beside `serving_default`.

    `fn` is a linen module or `fn(variables, *inputs)`; `inputs` and `sample` mean what they mean in
    `export_saved_model`, and are those of `serving_default` when left out.
    """

    fn: nn.Module | Callable[..., Any]
    inputs: Any = None
    sample: Any = None

    def with_inputs_of(self, other: "Signature") -> "Signature":
        """This signature with the other's inputs, and its sample unless this one has its own."""
        inputs = other.inputs
        if inputs is None:
            inputs = getattr(other.fn, "input_specs", None)
        return replace(self, inputs=inputs, sample=_first_given(self.sample, other.sample))


@dataclass(frozen=True)
class InputSpec:
    """One named input. A dimension is a size, or a string that names a symbol."""

    name: str
    shape: tuple[int | str, ...]
    dtype: np.dtype

    @property
    def polymorphic_shape(self) -> str:
        """The shape in the notation of `jax.export.symbolic_shape`."""
        return f"({', '.join(map(str, self.shape))}{',' * (len(self.shape) == 1)})"

    @property
    def open_shape(self) -> tuple[int | None, ...]:
        """The shape with `None` in place of symbols, as TensorFlow writes it."""
        return tuple(size if isinstance(size, int) else None for size in self.shape)

    def __str__(self) -> str:
        return f"{self.dtype.name}[{', '.join(map(str, self.shape))}]"


def inference_function(module_or_fn: nn.Module | Callable[..., Any]) -> Callable[..., Any]:
    """`fn(variables, *inputs)`: a module's `apply`, or the function as it is."""
    return getattr(module_or_fn, "apply", module_or_fn)


def input_specs(module_or_fn: Any, inputs: Any) -> tuple[InputSpec, ...]:
    """The inputs as given, or those that an imported module knows of itself.

    `None` on the first axis is the batch, one symbol for all inputs; `None` elsewhere is a symbol
    of its own; a string names a symbol, and equal strings are equal sizes. An array is an example:
    its first axis becomes the batch.

    >>> [str(spec) for spec in input_specs(None, [(None, 8), ((None, "time"), "int32")])]
    ['float32[batch, 8]', 'int32[batch, time]']
    """
    if inputs is None:
        inputs = getattr(module_or_fn, "input_specs", None)
    if inputs is None:
        raise ExportError(
            f"the inputs of {type(module_or_fn).__name__!r} are not known",
            expected="a module imported by fastgpu, or the argument `inputs`",
            got="inputs=None",
            fix=_HOW_TO_GIVE_INPUTS,
        )
    if isinstance(inputs, Mapping):
        names, entries = list(inputs), list(inputs.values())
    else:
        entries = [inputs] if _is_one_input(inputs) else list(inputs)
        names = [getattr(e, "name", None) or f"input_{index}" for index, e in enumerate(entries)]
    return tuple(
        _input_spec(name, index, entry)
        for index, (name, entry) in enumerate(zip(names, entries, strict=True))
    )


def sample_arrays(specs: Sequence[InputSpec], inputs: Any, sample: Any) -> tuple[Any, ...] | None:
    """The arrays that verification should call with, if the user gave any."""
    given = _first_given(sample, inputs)
    if isinstance(given, Mapping):
        given = list(given.values())
    entries = (given,) if _is_array(given) else tuple(given or ())
    if sample is None and not (entries and all(map(_is_array, entries))):
        return None
    if len(entries) != len(specs) or not all(map(_is_array, entries)):
        raise ExportError(
            "the sample is not made of one array per input",
            expected=f"{len(specs)} arrays, with the batch on the first axis",
            got=", ".join(type(entry).__name__ for entry in entries) or "nothing",
            fix=f"pass sample=({', '.join(f'<{spec.name}>' for spec in specs)},)",
        )
    arrays = tuple(
        np.asarray(entry).astype(spec.dtype) for entry, spec in zip(entries, specs, strict=True)
    )
    for array, spec in zip(arrays, specs, strict=True):
        _check_fits(array, spec)
    return arrays


def symbolic_arguments(specs: Sequence[InputSpec]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The inputs as `jax.ShapeDtypeStruct`s, symbols as symbolic dimensions of one scope."""
    return jax.export.symbolic_args_specs(
        tuple(jax.ShapeDtypeStruct(spec.open_shape, spec.dtype) for spec in specs),
        tuple(spec.polymorphic_shape for spec in specs),
    )


def named_outputs(outputs: Any) -> dict[str, Any]:
    """The leaves of a pytree by name: keys of dicts, positions otherwise, joined by `_`.

    >>> named_outputs({"logits": 1, "states": [2, 3]})
    {'logits': 1, 'states_0': 2, 'states_1': 3}
    >>> named_outputs(1), named_outputs((1, 2))
    ({'output_0': 1}, {'output_0': 1, 'output_1': 2})
    """
    if not isinstance(outputs, Mapping):
        outputs = {f"output_{index}": part for index, part in enumerate(_as_sequence(outputs))}
    leaves, _ = jax.tree_util.tree_flatten_with_path(outputs)
    named: dict[str, Any] = {}
    for path, leaf in leaves:
        name = "_".join(_key_text(key) for key in path)
        while name in named:
            name += "_"
        named[name] = leaf
    return named


def _first_given(first: Any, second: Any) -> Any:
    return second if first is None else first


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic | jax.Array)


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(
        isinstance(size, int | str | None) and not isinstance(size, bool) for size in value
    )


def _is_one_input(value: Any) -> bool:
    is_pair = isinstance(value, tuple) and len(value) == 2 and _is_shape(value[0])
    return hasattr(value, "shape") or _is_shape(value) or (is_pair and not _is_shape(value[1]))


def _input_spec(name: str, index: int, entry: Any) -> InputSpec:
    if hasattr(entry, "shape") and hasattr(entry, "dtype"):
        shape, dtype = tuple(entry.shape), entry.dtype
        if _is_array(entry) and shape:
            shape = (None, *shape[1:])
    elif _is_shape(entry):
        shape, dtype = tuple(entry), np.float32
    elif _is_one_input(entry):
        shape, dtype = tuple(entry[0]), entry[1]
    else:
        raise ExportError(
            f"input {name!r} has no shape",
            expected="a shape, a pair (shape, dtype), a jax.ShapeDtypeStruct, or an array",
            got=f"{entry!r}",
            fix=_HOW_TO_GIVE_INPUTS,
        )
    sizes = tuple(_dimension(size, index, axis) for axis, size in enumerate(shape))
    return InputSpec(_identifier(name), sizes, np.dtype(jax.dtypes.canonicalize_dtype(dtype)))


def _dimension(size: Any, index: int, axis: int) -> int | str:
    if size is None or (isinstance(size, int) and size < 0):
        return BATCH if axis == 0 else f"d{index}_{axis}"
    return size if isinstance(size, int) else str(size)


def _check_fits(array: np.ndarray, spec: InputSpec) -> None:
    fits = array.ndim == len(spec.shape) and all(
        isinstance(want, str) or size == want
        for size, want in zip(array.shape, spec.shape, strict=True)
    )
    if not fits:
        raise ExportError(
            f"the sample for input {spec.name!r} has another shape than the input",
            expected=str(spec),
            got=f"{array.dtype.name}{list(array.shape)}",
            fix="give real inputs of the model, with the batch on the first axis",
        )


def _identifier(name: str) -> str:
    """A name that can be a Python argument, because signatures are called with keywords."""
    text = re.sub(r"\W", "_", name)
    return text if text.isidentifier() else f"_{text}"


def _as_sequence(outputs: Any) -> Sequence[Any]:
    return outputs if isinstance(outputs, tuple | list) else (outputs,)


def _key_text(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
