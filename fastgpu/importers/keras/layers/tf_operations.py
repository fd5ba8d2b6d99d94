"""TensorFlow functions that Keras 2 recorded in a graph (TFOpLambda, SlicingOpLambda), by name.

The first argument is positional, the others have TensorFlow's names. Only what this table holds
is computed; nothing is looked up in TensorFlow.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn

from fastgpu.errors import UnsupportedLayerError
from fastgpu.importers.keras.layers.operations import Operation

Function = Callable[..., Any]


def _binary(function: Function) -> Function:
    def combine(x: Any, y: Any) -> Any:
        if isinstance(x, jax.Array) or isinstance(y, jax.Array):
            return function(jnp.asarray(x), jnp.asarray(y))
        with jax.ensure_compile_time_eval():  # Sizes stay sizes, see `_shape`.
            return np.asarray(function(jnp.asarray(x), jnp.asarray(y)))

    return combine


def _unary(function: Function) -> Function:
    return lambda x: function(x)


def _reduction(function: Function) -> Function:
    def reduce(input_tensor: jax.Array, axis: Any = None, keepdims: bool = False) -> jax.Array:
        axis = tuple(axis) if isinstance(axis, list) else axis
        return function(input_tensor, axis, keepdims=keepdims)

    return reduce


def _softmax(function: Function) -> Function:
    return lambda logits, axis=-1: function(logits, axis)


def _shape(input: Any, out_type: Any = None) -> np.ndarray:
    """Sizes are known while tracing, so that they may shape other arrays."""
    return np.asarray(jnp.shape(input), "int32")


def _cast(x: Any, dtype: str) -> jax.Array:
    return jnp.asarray(x).astype(jax.dtypes.canonicalize_dtype(dtype))


def _get_item(x: Any, slice_spec: Any) -> Any:
    return x[tuple(slice_spec) if isinstance(slice_spec, list) else slice_spec]


def _transpose(a: jax.Array, perm: Any = None, conjugate: bool = False) -> jax.Array:
    a = jnp.transpose(a, perm)
    return a.conj() if conjugate else a


def _squeeze(input: jax.Array, axis: Any = None) -> jax.Array:
    return jnp.squeeze(input, tuple(axis) if isinstance(axis, list) else axis)


def _split(value: jax.Array, num_or_size_splits: Any, axis: int = 0, num: Any = None) -> Any:
    if isinstance(num_or_size_splits, list):
        num_or_size_splits = np.cumsum(num_or_size_splits)[:-1].tolist()
    return jnp.split(value, num_or_size_splits, axis)


def _unstack(value: jax.Array, num: int | None = None, axis: int = 0) -> Any:
    return list(jnp.unstack(value, axis=axis))


def _matmul(
    a: Any, b: Any, transpose_a: bool = False, transpose_b: bool = False, adjoint_a: bool = False,
    adjoint_b: bool = False, a_is_sparse: bool = False, b_is_sparse: bool = False,
    output_type: Any = None, grad_a: bool = False, grad_b: bool = False,
) -> jax.Array:  # fmt: skip
    a, b = jnp.asarray(a), jnp.asarray(b)
    a = jnp.swapaxes(a, -1, -2) if transpose_a or adjoint_a else a
    b = jnp.swapaxes(b, -1, -2) if transpose_b or adjoint_b else b
    return a @ b


def _pad(
    tensor: jax.Array, paddings: Any, mode: str = "CONSTANT", constant_values: Any = 0
) -> jax.Array:
    options = {"constant_values": constant_values} if mode.upper() == "CONSTANT" else {}
    return jnp.pad(tensor, paddings, mode.lower(), **options)


def _l2_normalize(x: jax.Array, axis: Any = None, epsilon: float = 1e-12) -> jax.Array:
    axis = tuple(axis) if isinstance(axis, list) else axis
    power = jnp.sum(jnp.square(x), axis, keepdims=True)
    return x * lax.rsqrt(jnp.maximum(power, epsilon))


def _gather(
    params: jax.Array, indices: Any, validate_indices: Any = None, axis: int | None = None,
    batch_dims: int = 0,
) -> jax.Array:  # fmt: skip
    if batch_dims:
        raise ValueError(f"tf.gather with batch_dims={batch_dims}")
    return jnp.take(params, jnp.asarray(indices), axis or 0)


def _leaky_relu(features: jax.Array, alpha: float = 0.2) -> jax.Array:
    return nn.leaky_relu(features, alpha)


def _gelu(features: jax.Array, approximate: bool = False) -> jax.Array:
    return nn.gelu(features, approximate)


def _silu(features: jax.Array, beta: float = 1.0) -> jax.Array:
    return features * nn.sigmoid(beta * features)


def _one_hot(
    indices: jax.Array, depth: int, on_value: Any = None, off_value: Any = None,
    axis: int | None = None, dtype: Any = None,
) -> jax.Array:  # fmt: skip
    hot = nn.one_hot(indices, depth, axis=-1 if axis is None else axis, dtype=dtype or "float32")
    on, off = 1 if on_value is None else on_value, 0 if off_value is None else off_value
    return hot * (on - off) + off


def _argument(function: Function) -> Function:
    def find(input: jax.Array, axis: int = 0, output_type: Any = None) -> jax.Array:
        return function(input, axis)

    return find


def _clip(t: jax.Array, clip_value_min: Any, clip_value_max: Any) -> jax.Array:
    return jnp.clip(t, clip_value_min, clip_value_max)


_UNARY: dict[str, Function] = {
    **{f"math.{name}": getattr(jnp, name) for name in (
        "abs", "ceil", "cos", "exp", "expm1", "floor", "log", "log1p", "logical_not", "negative",
        "reciprocal", "round", "sign", "sin", "sqrt", "square", "tan", "tanh",
    )},
    **{f"nn.{name}": getattr(nn, name) for name in (
        "elu", "relu", "relu6", "selu", "sigmoid", "softplus", "tanh",
    )},
    "identity": lambda x: x,
    "math.erf": lax.erf,
    "math.rsqrt": lax.rsqrt,
    "math.sigmoid": nn.sigmoid,
    "math.softplus": nn.softplus,
    "nn.softsign": nn.soft_sign,
    "ones_like": jnp.ones_like,
    "stop_gradient": lax.stop_gradient,
    "zeros_like": jnp.zeros_like,
}  # fmt: skip
_BINARY: dict[str, Function] = {
    "add": jnp.add,
    "divide": jnp.true_divide,
    "equal": jnp.equal,
    "floordiv": jnp.floor_divide,
    "floormod": jnp.mod,
    "greater": jnp.greater,
    "greater_equal": jnp.greater_equal,
    "less": jnp.less,
    "less_equal": jnp.less_equal,
    "logical_and": jnp.logical_and,
    "logical_or": jnp.logical_or,
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    "mod": jnp.mod,
    "multiply": jnp.multiply,
    "not_equal": jnp.not_equal,
    "pow": jnp.power,
    "squared_difference": lambda x, y: jnp.square(x - y),
    "subtract": jnp.subtract,
    "truediv": jnp.true_divide,
}
TF_FUNCTIONS: dict[str, Function] = {
    **{name: _unary(function) for name, function in _UNARY.items()},
    **{f"math.{name}": _binary(function) for name, function in _BINARY.items()},
    **{
        f"math.reduce_{name}": _reduction(getattr(jnp, name))
        for name in ("all", "any", "max", "mean", "min", "prod", "std", "sum")
    },
    "math.reduce_variance": _reduction(jnp.var),
    "math.reduce_logsumexp": _reduction(nn.logsumexp),
    "__operators__.add": _binary(jnp.add),
    "__operators__.getitem": _get_item,
    "__operators__.ne": _binary(jnp.not_equal),
    "__operators__.eq": _binary(jnp.equal),
    "argmax": _argument(jnp.argmax),
    "argmin": _argument(jnp.argmin),
    "broadcast_to": lambda input, shape: jnp.broadcast_to(input, tuple(shape)),
    "cast": _cast,
    "clip_by_value": _clip,
    "concat": lambda values, axis: jnp.concatenate([jnp.asarray(v) for v in values], axis),
    "expand_dims": lambda input, axis: jnp.expand_dims(input, axis),
    "gather": _gather,
    "linalg.l2_normalize": _l2_normalize,
    "linalg.matmul": _matmul,
    "math.argmax": _argument(jnp.argmax),
    "math.argmin": _argument(jnp.argmin),
    "math.cumsum": lambda x, axis=0: jnp.cumsum(x, axis),
    "math.l2_normalize": _l2_normalize,
    "nn.gelu": _gelu,
    "nn.leaky_relu": _leaky_relu,
    "nn.log_softmax": _softmax(nn.log_softmax),
    "nn.silu": _silu,
    "nn.softmax": _softmax(nn.softmax),
    "nn.swish": _silu,
    "one_hot": _one_hot,
    "pad": _pad,
    "repeat": lambda input, repeats, axis=None: jnp.repeat(input, repeats, axis),
    "reshape": lambda tensor, shape: jnp.reshape(tensor, tuple(shape)),
    "reverse": lambda tensor, axis: jnp.flip(tensor, axis),
    "shape": _shape,
    "split": _split,
    "squeeze": _squeeze,
    "stack": lambda values, axis=0: jnp.stack([jnp.asarray(v) for v in values], axis),
    "tile": lambda input, multiples: jnp.tile(input, multiples),
    "transpose": _transpose,
    "unstack": _unstack,
    "where": lambda condition, x, y: jnp.where(condition, x, y),
}


def tf_operation(config: Mapping[str, Any]) -> Operation:
    """The operation of a TFOpLambda or SlicingOpLambda.

    Raises `UnsupportedLayerError` for a function that the table does not hold.
    """
    name = str(config["function"]).removeprefix("compat.v1.")
    if name not in TF_FUNCTIONS:
        raise UnsupportedLayerError(f"tf.{name}, which is not in the table of functions")
    return Operation(function=TF_FUNCTIONS[name])
