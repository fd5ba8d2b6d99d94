"""Naming the leaves of a pytree, so that an error can say which one is wrong."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_array(leaf: Any) -> bool:
    """Whether JAX takes this leaf: an array of numbers, truth values or random keys, or a number.

    >>> [is_array(leaf) for leaf in (np.zeros(2), 1.0, "text", np.array(["a"]))]
    [True, True, False, False]
    """
    if isinstance(leaf, bool | int | float | complex):
        return True
    dtype = getattr(leaf, "dtype", None)
    kinds = (np.number, np.bool_, jax.dtypes.extended)
    return dtype is not None and any(jnp.issubdtype(dtype, kind) for kind in kinds)


def leaf_type(leaf: Any) -> str:
    """The shape and dtype of one leaf as JAX takes it, as `float32[8,3]`.

    >>> leaf_type(np.zeros((8, 3))), leaf_type(2), leaf_type("text")
    ('float32[8,3]', 'int32[]', 'str')
    """
    if not is_array(leaf):
        return type(leaf).__name__
    dtype = getattr(leaf, "dtype", None) or np.result_type(leaf)
    if not jnp.issubdtype(dtype, jax.dtypes.extended):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return f"{dtype}[{','.join(map(str, np.shape(leaf)))}]"


def leaf_types(tree: Any) -> dict[str, str]:
    """The path of every leaf, as Python would index it, and its type.

    >>> leaf_types({"a": (np.zeros(2), np.int8(1))})
    {"['a'][0]": 'float32[2]', "['a'][1]": 'int8[]'}
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf_type(leaf) for path, leaf in paths}


def first_difference(expected: dict[str, str], got: dict[str, str]) -> tuple[str, str, str] | None:
    """The first leaf that differs: its path, the type expected and the type that came.

    >>> first_difference({"['x']": "float32[2]"}, {"['x']": "float32[3]"})
    ("['x']", 'float32[2]', 'float32[3]')
    >>> first_difference({"['x']": "float32[2]"}, {})
    ("['x']", 'float32[2]', 'no such leaf')
    """
    for path in [*expected, *(path for path in got if path not in expected)]:
        pair = expected.get(path, "no such leaf"), got.get(path, "no such leaf")
        if pair[0] != pair[1]:
            return (path, *pair)
    return None
