"""`keras.ops` calls inside a functional graph, by the names of their classes.

Keras saves the options of an operation in its config and the rest as arguments of the call. The
functions here take both under Keras's names.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax, nn

from fastgpu.errors import UnsupportedLayerError
from fastgpu.importers.keras.layers.layer import Layer, LayerState

Function = Callable[..., Any]

# The jax.numpy functions that are called as Keras calls them.
_SAME = """
abs absolute add all amax amin angle any append arccos arccosh arcsin arcsinh arctan arctan2
arctanh argmax argmin argsort average bitwise_and bitwise_invert bitwise_left_shift bitwise_not
bitwise_or bitwise_right_shift bitwise_xor broadcast_to cbrt ceil concatenate conj conjugate copy
corrcoef cos cosh count_nonzero cross cumprod cumsum deg2rad diag diagflat diagonal diff digitize
divide dot dstack equal exp exp2 expand_dims expm1 fabs flip fliplr flipud floor floor_divide fmax
fmin fmod full_like gcd greater greater_equal heaviside hstack hypot i0 imag inner isclose isfinite
isinf isnan isneginf isposinf isreal kron lcm ldexp left_shift less less_equal linspace log log10
log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor matmul max maximum
mean median min minimum mod moveaxis multiply nan_to_num nanmax nanmean nanmedian nanmin nanprod
nanstd nansum nanvar negative not_equal ones_like outer percentile power prod ptp quantile rad2deg
ravel real reciprocal repeat right_shift roll rot90 round sign signbit sin sinc sinh
sort sqrt square squeeze stack std subtract sum swapaxes take_along_axis tan tanh
tensordot trace transpose tril triu true_divide trunc unstack vander var vdot vstack where
zeros_like
"""
_ELEMENTWISE = "relu relu6 selu sigmoid silu softplus log_sigmoid hard_sigmoid hard_silu hard_tanh"


def _class_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _as_dtype(dtype: Any) -> Any:
    return None if dtype is None else jax.dtypes.canonicalize_dtype(dtype)


def _cast(x: Any, dtype: Any = None) -> jax.Array:
    return jnp.asarray(x, _as_dtype(dtype))


def _get_item(x: jax.Array, key: Any) -> jax.Array:
    return x[tuple(key) if isinstance(key, list) else key]


def _clip(x: Any, x_min: Any, x_max: Any) -> jax.Array:
    return jnp.clip(x, x_min, x_max)


def _einsum(*operands: jax.Array, subscripts: str) -> jax.Array:
    return jnp.einsum(subscripts, *operands)


def _reshape(x: jax.Array, newshape: Any) -> jax.Array:
    """Without the batch the declared shape is traced with one example, so -1 must stay."""
    return jnp.reshape(x, newshape)


def _pad(x: jax.Array, pad_width: Any, mode: str = "constant", constant_values: Any = None) -> Any:
    options = {} if constant_values is None else {"constant_values": constant_values}
    return jnp.pad(x, pad_width, mode, **options)


def _tile(x: jax.Array, repeats: Any) -> jax.Array:
    return jnp.tile(x, repeats)


def _split(x: jax.Array, indices_or_sections: Any, axis: int = 0) -> list[jax.Array]:
    if isinstance(indices_or_sections, tuple):
        indices_or_sections = list(indices_or_sections)
    return jnp.split(x, indices_or_sections, axis)


def _divide_no_nan(x1: Any, x2: Any) -> jax.Array:
    safe = jnp.where(x2 == 0, 1, x2)
    return jnp.where(x2 == 0, 0, jnp.divide(x1, safe))


def _slice(inputs: jax.Array, start_indices: Any, shape: Any) -> jax.Array:
    return lax.dynamic_slice(inputs, list(start_indices), shape)


def _slice_update(inputs: jax.Array, start_indices: Any, updates: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice(inputs, updates, list(start_indices))


def _take(x: jax.Array, indices: Any, axis: int | None = None) -> jax.Array:
    return jnp.take(x, jnp.asarray(indices), axis)


def _top_k(x: jax.Array, k: int, sorted: bool = True) -> list[jax.Array]:
    return list(lax.top_k(x, k))


def _one_hot(x: jax.Array, num_classes: int, axis: int = -1, dtype: Any = None) -> jax.Array:
    return nn.one_hot(x, num_classes, axis=axis, dtype=_as_dtype(dtype or "float32"))


def _moments(x: jax.Array, axes: Any, keepdims: bool = False) -> tuple[jax.Array, jax.Array]:
    return jnp.mean(x, axes, keepdims=keepdims), jnp.var(x, axes, keepdims=keepdims)


def _normalize(x: jax.Array, axis: Any = -1, order: Any = 2, epsilon: float | None = None) -> Any:
    epsilon = 1e-7 if epsilon is None else epsilon
    if order == 2:
        power = jnp.sum(jnp.square(x), axis, keepdims=True)
        return x * lax.rsqrt(jnp.maximum(power, epsilon**2))
    norm = jnp.linalg.norm(x, ord=order, axis=axis, keepdims=True)
    return x / jnp.maximum(norm, epsilon)


def _batch_norm(
    x: jax.Array, mean: Any, variance: Any, offset: Any = None, scale: Any = None, *,
    axis: int, epsilon: float = 1e-3,
) -> jax.Array:  # fmt: skip
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    factor = lax.rsqrt(variance.reshape(shape) + epsilon)
    factor = factor if scale is None else factor * scale.reshape(shape)
    y = x * factor - mean.reshape(shape) * factor
    return y if offset is None else y + offset.reshape(shape)


def _gelu(x: jax.Array, approximate: bool = True) -> jax.Array:
    return nn.gelu(x, approximate)


def _leaky_relu(x: jax.Array, negative_slope: float = 0.2) -> jax.Array:
    return nn.leaky_relu(x, negative_slope)


def _threshold(x: jax.Array, threshold: float, default_value: float) -> jax.Array:
    return jnp.where(x > threshold, x, default_value)


def _hard_shrink(x: jax.Array, threshold: float = 0.5) -> jax.Array:
    return jnp.where(jnp.abs(x) > threshold, x, jnp.zeros_like(x))


def _soft_shrink(x: jax.Array, threshold: float = 0.5) -> jax.Array:
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0)


OPERATIONS: dict[str, Function] = {
    **{_class_name(name): getattr(jnp, name) for name in _SAME.split()},
    **{_class_name(name): getattr(nn, name) for name in _ELEMENTWISE.split()},
    "BatchNorm": _batch_norm,
    "Cast": _cast,
    "Celu": nn.celu,
    "Clip": _clip,
    "ConvertToTensor": _cast,
    "DivideNoNan": _divide_no_nan,
    "Einsum": _einsum,
    "Elu": nn.elu,
    "Erf": lax.erf,
    "Erfc": lax.erfc,
    "Erfinv": lax.erf_inv,
    "Gelu": _gelu,
    "GetItem": _get_item,
    "Glu": nn.glu,
    "HardShrink": _hard_shrink,
    "LeakyRelu": _leaky_relu,
    "LogSoftmax": nn.log_softmax,
    "Logsumexp": nn.logsumexp,
    "Moments": _moments,
    "Norm": jnp.linalg.norm,
    "Normalize": _normalize,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Reshape": _reshape,
    "Rsqrt": lax.rsqrt,
    "SearchSorted": jnp.searchsorted,
    "Slice": _slice,
    "SliceUpdate": _slice_update,
    "SoftShrink": _soft_shrink,
    "Softmax": nn.softmax,
    "Softsign": nn.soft_sign,
    "SparsePlus": nn.sparse_plus,
    "SparseSigmoid": nn.sparse_sigmoid,
    "Split": _split,
    "Squareplus": nn.squareplus,
    "StopGradient": lax.stop_gradient,
    "Take": _take,
    "TanhShrink": lambda x: x - jnp.tanh(x),
    "Threshold": _threshold,
    "Tile": _tile,
    "TopK": _top_k,
}


@dataclass(frozen=True, kw_only=True)
class Operation(Layer):
    """A function of arrays and numbers; it casts nothing and has no weights."""

    function: Function
    options: tuple[tuple[str, Any], ...] = ()
    autocast: ClassVar[bool] = False

    @classmethod
    def from_config(cls, name: str, options: Mapping[str, Any]) -> "Operation":
        """The operation of a class with its options in hashable form.

        Raises `UnsupportedLayerError` for one that the table does not hold, and for options that
        its function does not take.
        """
        if name not in OPERATIONS:
            raise UnsupportedLayerError("no such keras.ops function in the table")
        return cls.of(OPERATIONS[name], options)

    @classmethod
    def of(cls, function: Function, options: Mapping[str, Any]) -> "Operation":
        """An operation that computes `function`; options that are None are its defaults."""
        given = {key: value for key, value in options.items() if value is not None}
        unknown = sorted(set(given) - parameters(function))
        # What changes only how Keras computes, or says that a result is dense.
        unknown = [key for key in unknown if given[key] is not False]
        if unknown:
            raise UnsupportedLayerError(f"option {unknown[0]}={given[unknown[0]]!r}")
        kept = {key: value for key, value in given.items() if key in parameters(function)}
        return cls(function=function, options=tuple(sorted(kept.items())))

    def call(self, state: LayerState, *inputs: Any, train: bool, **kwargs: Any) -> Any:
        """Apply the function."""
        return self.function(*inputs, **dict(self.options), **kwargs)


def parameters(function: Function) -> set[str]:
    """The names of the arguments that a function takes."""
    return set(inspect.signature(function).parameters)
