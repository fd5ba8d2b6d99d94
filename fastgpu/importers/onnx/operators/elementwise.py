"""Operators that compute each element by itself: arithmetic, comparisons, logic, activations."""

import math
from collections.abc import Callable
from functools import reduce
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.errors import UnsupportedLayerError
from fastgpu.importers.onnx.dtypes import (
    ELEMENT_TYPES,
    as_jax,
    in_use,
    is_float,
    is_integer,
    is_symbolic,
)
from fastgpu.importers.onnx.operators.operator import axis_of, one_of, operator

# Operators that numpy and jax.numpy have as a function of one array, and of two.
_UNARY = {
    "Abs": "abs",
    "Acos": "arccos",
    "Acosh": "arccosh",
    "Asin": "arcsin",
    "Asinh": "arcsinh",
    "Atan": "arctan",
    "Atanh": "arctanh",
    "BitwiseNot": "bitwise_not",
    "Ceil": "ceil",
    "Cos": "cos",
    "Cosh": "cosh",
    "Exp": "exp",
    "Floor": "floor",
    "IsNaN": "isnan",
    "Log": "log",
    "Neg": "negative",
    "Not": "logical_not",
    "Round": "round",
    "Sign": "sign",
    "Sin": "sin",
    "Sinh": "sinh",
    "Sqrt": "sqrt",
    "Tan": "tan",
    "Tanh": "tanh",
}
_BINARY = {
    "Add": "add",
    "And": "logical_and",
    "BitwiseAnd": "bitwise_and",
    "BitwiseOr": "bitwise_or",
    "BitwiseXor": "bitwise_xor",
    "Equal": "equal",
    "Greater": "greater",
    "GreaterOrEqual": "greater_equal",
    "Less": "less",
    "LessOrEqual": "less_equal",
    "Mul": "multiply",
    "Or": "logical_or",
    "Sub": "subtract",
    "Xor": "logical_xor",
}


def _unary(function: str) -> Callable[..., Any]:
    return lambda x, *, xp: getattr(xp, function)(x)


def _binary(function: str) -> Callable[..., Any]:
    return lambda a, b, *, xp: getattr(xp, function)(a, b)


def _along_axis(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Opset 6: the second array is broadcast only on demand, and from an axis of the first on."""

    def placed(
        a: Any, b: Any, *, axis: int | None = None, broadcast: int = 0, xp: ModuleType
    ) -> Any:
        if broadcast and axis is not None:
            b = b.reshape(b.shape + (1,) * (a.ndim - axis_of(axis, a.ndim) - b.ndim))
        return compute(a, b, xp=xp)

    return placed


for _name, _function in _UNARY.items():
    operator(_name)(_unary(_function))
for _name, _function in _BINARY.items():
    operator(_name)(_along_axis(_binary(_function)))
    operator(_name, since=7)(_binary(_function))

# Activations that jax.nn and lax have under another name.
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "Erf": jax.lax.erf,
    "Relu": jax.nn.relu,
    "Sigmoid": jax.nn.sigmoid,
    "Softplus": jax.nn.softplus,
    "Softsign": jax.nn.soft_sign,
    "Mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "HardSwish": lambda x: x * jnp.clip(x / 6 + 0.5, 0, 1),
}


def _activation(function: Callable[[jax.Array], jax.Array]) -> Callable[..., Any]:
    return lambda x: function(x)


for _name, _function in _ACTIVATIONS.items():
    operator(_name)(_activation(_function))


@operator("Identity", as_is=True)
def identity(x: Any) -> Any:
    """The input as it is, a sequence too."""
    return (x,)


@operator("Div", since=7)
def divide(a: Any, b: Any, *, xp: ModuleType) -> Any:
    """The quotient; of integers it is cut towards zero, as in C."""
    if is_symbolic(a) or is_symbolic(b):
        return xp.floor_divide(a, b)
    if not is_integer(a.dtype):
        return xp.divide(a, b)
    quotient, remainder = xp.floor_divide(a, b), xp.mod(a, b)
    return quotient + ((remainder != 0) & ((a < 0) != (b < 0))).astype(quotient.dtype)


@operator("Mod")
def modulo(a: Any, b: Any, *, fmod: int = 0, xp: ModuleType) -> Any:
    """The remainder, with the sign of `b`, or of `a` if `fmod` is set."""
    return xp.fmod(a, b) if fmod else xp.mod(a, b)


@operator("Pow", since=7)
def power(base: Any, exponent: Any, *, xp: ModuleType) -> Any:
    """A power in the type of the base."""
    if is_integer(base.dtype) and is_float(exponent.dtype):
        return xp.power(base.astype(exponent.dtype), exponent).astype(base.dtype)
    if is_integer(base.dtype):
        return xp.power(base, exponent.astype(base.dtype))
    return xp.power(base, exponent.astype(base.dtype))


operator("Div")(_along_axis(divide))
operator("Pow")(_along_axis(power))


@operator("Reciprocal")
def reciprocal(x: Any, *, xp: ModuleType) -> Any:
    """1 / x."""
    return xp.divide(xp.ones_like(x), x)


@operator("IsInf")
def is_infinite(
    x: Any, *, detect_negative: int = 1, detect_positive: int = 1, xp: ModuleType
) -> Any:
    """Where a value is infinite, with the signs that are asked for."""
    signs = ((x > 0) & bool(detect_positive)) | ((x < 0) & bool(detect_negative))
    return xp.isinf(x) & signs


@operator("BitShift")
def bit_shift(x: Any, shift: Any, *, direction: str, xp: ModuleType) -> Any:
    """Bits moved; a shift by all bits or more leaves what the sign bit fills in."""
    one_of("direction", direction, ("LEFT", "RIGHT"))
    bits = x.dtype.itemsize * 8
    wide = (shift < 0) | (shift >= bits)
    amount = xp.where(wide, xp.zeros_like(shift), shift)
    if direction == "LEFT":
        return xp.where(wide, xp.zeros_like(x), xp.left_shift(x, amount))
    filled = xp.where(x < 0, ~xp.zeros_like(x), xp.zeros_like(x))
    return xp.where(wide, filled, xp.right_shift(x, amount))


def _over_all(function: str) -> Callable[..., Any]:
    return lambda *inputs, xp: reduce(getattr(xp, function), inputs)


for _name, _function in {"Max": "maximum", "Min": "minimum", "Sum": "add"}.items():
    operator(_name)(_over_all(_function))


@operator("Mean")
def mean_of_all(*inputs: Any, xp: ModuleType) -> Any:
    """The mean of several arrays."""
    return reduce(xp.add, inputs) / len(inputs)


@operator("Where")
def where(condition: Any, x: Any, y: Any, *, xp: ModuleType) -> Any:
    """One of two values."""
    return xp.where(condition, x, y)


@operator("Clip")
def clip_by_attributes(
    x: Any, *, min: float = -math.inf, max: float = math.inf, xp: ModuleType
) -> Any:
    """Opsets up to 10: the bounds are attributes."""
    return xp.clip(x, x.dtype.type(min), x.dtype.type(max))


@operator("Clip", since=11, bounds=("low", "high"))
def clip(x: Any, low: Any = None, high: Any = None, *, xp: ModuleType) -> Any:
    """Values between two bounds; the upper one holds where they cross."""
    x = x if low is None else xp.maximum(x, low)
    return x if high is None else xp.minimum(x, high)


def cast_to(x: Any, dtype: np.dtype[Any], saturate: bool, xp: ModuleType) -> Any:
    """A cast; to eight bits and fewer of floating point it can saturate."""
    if is_symbolic(x):
        return x if is_integer(dtype) else as_jax(x, "a size").astype(in_use(dtype, jnp))
    dtype = in_use(dtype, xp)
    if is_float(dtype) and dtype.itemsize == 1 and x.dtype != dtype:
        x = x if is_float(x.dtype) else x.astype("float32")
        most = float(jnp.finfo(dtype).max)
        if saturate:
            x = xp.clip(x, -most, most)
    if dtype.name in ("int4", "uint4") and is_float(x.dtype):
        x = x.astype("int32")  # what does not fit loses its upper bits, as in every other cast
    return x.astype(dtype)


@operator("Cast")
def cast(x: Any, *, to: int, saturate: int = 1, round_mode: str = "up", xp: ModuleType) -> Any:
    """Another element type."""
    return cast_to(x, ELEMENT_TYPES[to], bool(saturate), xp)


@operator("CastLike")
def cast_like(
    x: Any, like: Any, *, saturate: int = 1, round_mode: str = "up", xp: ModuleType
) -> Any:
    """The element type of another array."""
    return cast_to(x, like.dtype, bool(saturate), xp)


@operator("BitCast")
def bit_cast(x: Any, *, to: int, xp: ModuleType) -> Any:
    """The same bits read as another type of the same width."""
    dtype = in_use(ELEMENT_TYPES[to], xp)
    if dtype != ELEMENT_TYPES[to]:
        raise UnsupportedLayerError(
            f"the bits of {ELEMENT_TYPES[to]}",
            expected="64-bit numbers in JAX",
            fix="jax.config.update('jax_enable_x64', True)",
        )
    if dtype.itemsize != x.dtype.itemsize:
        raise ValueError(f"{x.dtype} and {dtype} differ in width")
    if xp is np:
        return x.view(dtype)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if dtype == jnp.bool_:
        return jax.lax.bitcast_convert_type(x, jnp.uint8) != 0
    return jax.lax.bitcast_convert_type(x, dtype)


@operator("Elu")
def elu(x: jax.Array, *, alpha: float = 1.0) -> jax.Array:
    """x, or alpha (e^x - 1) where x is negative."""
    return jax.nn.elu(x, alpha)


@operator("Celu")
def celu(x: jax.Array, *, alpha: float = 1.0) -> jax.Array:
    """The ELU with a continuous derivative."""
    return jax.nn.celu(x, alpha)


@operator("Selu")
def selu(
    x: jax.Array, *, alpha: float = 1.6732632423543772, gamma: float = 1.0507009873554805
) -> jax.Array:
    """The scaled ELU."""
    return gamma * jax.nn.elu(x, alpha)


@operator("LeakyRelu")
def leaky_relu(x: jax.Array, *, alpha: float = 0.01) -> jax.Array:
    """A slope of alpha where x is negative."""
    return jnp.where(x >= 0, x, x * alpha)


@operator("PRelu")
def parametric_relu_by_channel(x: jax.Array, slope: jax.Array) -> jax.Array:
    """Opset 6: one slope, or one for each channel."""
    return parametric_relu(x, slope.reshape(-1, *(1,) * (x.ndim - 2)) if x.ndim > 1 else slope)


@operator("PRelu", since=7)
def parametric_relu(x: jax.Array, slope: jax.Array) -> jax.Array:
    """A trained slope where x is negative."""
    return jnp.where(x >= 0, x, x * slope)


@operator("ThresholdedRelu")
def thresholded_relu(x: jax.Array, *, alpha: float = 1.0) -> jax.Array:
    """x where it is larger than alpha, else 0."""
    return jnp.where(x > alpha, x, jnp.zeros_like(x))


@operator("Shrink")
def shrink(x: jax.Array, *, lambd: float = 0.5, bias: float = 0.0) -> jax.Array:
    """Values moved towards zero by `bias`, and zero between -lambd and lambd."""
    moved = jnp.where(x > lambd, x - x.dtype.type(bias), jnp.zeros_like(x))
    return jnp.where(x < -lambd, x + x.dtype.type(bias), moved)


@operator("HardSigmoid")
def hard_sigmoid(x: jax.Array, *, alpha: float = 0.2, beta: float = 0.5) -> jax.Array:
    """A line cut off at 0 and 1."""
    return jnp.clip(x * alpha + beta, 0, 1)


@operator("Gelu")
def gelu(x: jax.Array, *, approximate: str = "none") -> jax.Array:
    """The Gaussian error linear unit, exact or by tanh."""
    one_of("approximate", approximate, ("none", "tanh"))
    return jax.nn.gelu(x, approximate=approximate == "tanh")


@operator("Swish")
def swish(x: jax.Array, *, alpha: float = 1.0) -> jax.Array:
    """x sigmoid(alpha x)."""
    return x * jax.nn.sigmoid(alpha * x)


@operator("Einsum")
def einsum(*inputs: jax.Array, equation: str) -> jax.Array:
    """A sum of products, in Einstein's notation."""
    return jnp.einsum(equation.replace(" ", ""), *inputs)
