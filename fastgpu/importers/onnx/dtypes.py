"""ONNX's element types, and what JAX makes of them."""

import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from fastgpu.errors import FileError, UnsupportedLayerError

# The numbers of TensorProto.DataType; 8 is text.
ELEMENT_TYPES: dict[int, np.dtype[Any]] = {
    number: np.dtype(dtype)
    for number, dtype in {
        1: np.float32,
        2: np.uint8,
        3: np.int8,
        4: np.uint16,
        5: np.int16,
        6: np.int32,
        7: np.int64,
        9: np.bool_,
        10: np.float16,
        11: np.float64,
        12: np.uint32,
        13: np.uint64,
        14: np.complex64,
        15: np.complex128,
        16: ml_dtypes.bfloat16,
        17: ml_dtypes.float8_e4m3fn,
        18: ml_dtypes.float8_e4m3fnuz,
        19: ml_dtypes.float8_e5m2,
        20: ml_dtypes.float8_e5m2fnuz,
        21: ml_dtypes.uint4,
        22: ml_dtypes.int4,
        23: ml_dtypes.float4_e2m1fn,
    }.items()
}
_NAMES = {0: "an undefined type", 8: "text (STRING)", 24: "FLOAT8E8M0", 25: "UINT2", 26: "INT2"}
# No array that a model's own constants ask for is larger: 4 GiB in float32.
LARGEST_ARRAY = 1 << 30


def element_type(number: int, where: str) -> np.dtype[Any]:
    """The dtype of a number in a file; raises `UnsupportedLayerError` naming the type.

    >>> element_type(1, "x")
    dtype('float32')
    """
    if number not in ELEMENT_TYPES:
        raise UnsupportedLayerError(
            f"{where} holds {type_name(number)}",
            expected=", ".join(str(dtype) for dtype in ELEMENT_TYPES.values()),
            fix="do this part of the work outside the model",
        )
    return ELEMENT_TYPES[number]


def type_name(number: int) -> str:
    """What a type that is not among `ELEMENT_TYPES` is called.

    >>> type_name(26)
    'INT2'
    """
    return _NAMES.get(number, f"the type {number}")


def in_use(dtype: Any, xp: ModuleType) -> np.dtype[Any]:
    """The dtype itself in numpy; in JAX what is there of it (32 bits, unless x64 is enabled).

    >>> in_use("int64", np), in_use("int64", jnp)
    (dtype('int64'), dtype('int32'))
    """
    return np.dtype(dtype) if xp is np else np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def is_float(dtype: Any) -> bool:
    """Whether a dtype is a floating one, bfloat16 and the 8-bit ones included.

    >>> is_float(jnp.bfloat16), is_float(np.int32)
    (True, False)
    """
    return bool(jnp.issubdtype(dtype, jnp.floating))


def is_integer(dtype: Any) -> bool:
    """Whether a dtype is an integer one, the 4-bit ones included.

    >>> is_integer(jnp.int4), is_integer(np.bool_)
    (True, False)
    """
    return bool(jnp.issubdtype(dtype, jnp.integer))


def as_jax(value: Any, where: str) -> jax.Array:
    """A value on the device. Numbers that do not fit the 32 bits of JAX are refused.

    >>> as_jax(np.array([1, 2]), "x").dtype
    dtype('int32')
    """
    if isinstance(value, jax.Array):
        return value
    if value is None or isinstance(value, tuple | list):
        kind = "an absent value" if value is None else "a sequence"
        raise UnsupportedLayerError(f"{where} is {kind}", expected="an array")
    value = np.asarray(value)
    if is_symbolic(value):
        sizes = [jnp.asarray(size, in_use(np.int64, jnp)) for size in value.reshape(-1)]
        return jnp.stack(sizes).reshape(value.shape)
    dtype = in_use(value.dtype, jnp)
    if dtype != value.dtype and is_integer(dtype) and value.size:
        least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        if int(value.min()) < least or int(value.max()) > most:
            raise UnsupportedLayerError(
                f"{where} has integers of more than 32 bits",
                expected=f"{least} to {most}",
                got=f"{value.min()} to {value.max()}",
                fix="jax.config.update('jax_enable_x64', True) gives JAX 64 bits",
            )
    with np.errstate(over="ignore"):
        narrow = value.astype(dtype, copy=False)
    if value.dtype == np.float64 and np.any(np.isinf(narrow) & np.isfinite(value)):
        raise UnsupportedLayerError(
            f"{where} has numbers beyond float32",
            got=str(np.abs(value).max()),
            fix="jax.config.update('jax_enable_x64', True) gives JAX 64 bits",
        )
    return jnp.asarray(narrow)


def is_symbolic(value: Any) -> bool:
    """Whether an array holds sizes that are symbols, as they are while a program is exported."""
    return isinstance(value, np.ndarray) and value.dtype == object


def sizes_in(value: Any) -> tuple[Any, ...]:
    """The sizes in a known array: ints, and symbols as they are.

    >>> sizes_in(np.array([2, 3]))
    (2, 3)
    """
    parts = np.asarray(value).reshape(-1)
    return tuple(int(size) if isinstance(size, int | float | np.number) else size for size in parts)


def known_sizes(sizes: Any) -> np.ndarray:
    """Sizes of an array as a known value: int64, or objects if there are symbols among them.

    >>> known_sizes((2, 3))
    array([2, 3])
    """
    plain = all(isinstance(size, int) for size in sizes)
    return np.array(sizes, np.int64 if plain else object)


def checked_shape(shape: Any, what: str) -> tuple[int, ...]:
    """A shape that values of the model ask for, refused if it is negative or absurd.

    >>> checked_shape(np.array([2, 3]), "Expand")
    (2, 3)
    >>> checked_shape([1 << 20, 1 << 20], "Expand")
    Traceback (most recent call last):
    ...
    fastgpu.errors.FileError: Expand asks for an array of absurd size
    """
    sizes = sizes_in(shape)
    known = [int(size) for size in sizes if isinstance(size, int | float)]
    if any(size < 0 for size in known) or math.prod(known) > LARGEST_ARRAY or len(sizes) > 32:
        raise FileError(
            f"{what} asks for an array of absurd size",
            expected=f"at most {LARGEST_ARRAY:,} elements",
            got=str(list(sizes))[:200],
            fix="do not use this file, or export the model again",
        )
    return sizes
