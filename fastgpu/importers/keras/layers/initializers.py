"""Keras initializers, so that `module.init` starts an imported architecture as Keras would."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Sampler = Callable[..., jax.Array]


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Keras's fan-in and fan-out; a kernel's leading axes are its receptive field."""
    if len(shape) < 2:
        size = shape[0] if shape else 1
        return size, size
    field = math.prod(shape[:-2])
    return shape[-2] * field, shape[-1] * field


def _variance_scaling(
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: Any,
    scale: float = 1.0,
    mode: str = "fan_in",
    distribution: str = "truncated_normal",
) -> jax.Array:
    fan_in, fan_out = _fans(shape)
    fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
    variance = scale / max(1.0, fan)
    if distribution == "uniform":
        limit = math.sqrt(3 * variance)
        return jax.random.uniform(key, shape, dtype, -limit, limit)
    if distribution == "untruncated_normal":
        return math.sqrt(variance) * jax.random.normal(key, shape, dtype)
    # 0.8796 is the deviation of a unit normal cut at two deviations.
    stddev = math.sqrt(variance) / 0.87962566103423978
    return stddev * jax.random.truncated_normal(key, -2, 2, shape, dtype)


def _scaled(scale: float, mode: str, distribution: str) -> Sampler:
    return lambda key, shape, dtype: _variance_scaling(key, shape, dtype, scale, mode, distribution)


def _constant(_: jax.Array, shape: tuple[int, ...], dtype: Any, value: Any = 0.0) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(value, dtype), shape)


def _random_normal(
    key: jax.Array, shape: tuple[int, ...], dtype: Any, mean: float = 0.0, stddev: float = 0.05
) -> jax.Array:
    return mean + stddev * jax.random.normal(key, shape, dtype)


def _truncated_normal(
    key: jax.Array, shape: tuple[int, ...], dtype: Any, mean: float = 0.0, stddev: float = 0.05
) -> jax.Array:
    return mean + stddev * jax.random.truncated_normal(key, -2, 2, shape, dtype)


def _random_uniform(
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: Any,
    minval: float = -0.05,
    maxval: float = 0.05,
) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, minval, maxval)


def _orthogonal(key: jax.Array, shape: tuple[int, ...], dtype: Any, gain: float = 1.0) -> jax.Array:
    return jax.nn.initializers.orthogonal(gain)(key, shape, dtype)


_SAMPLERS: dict[str, Sampler] = {
    "Constant": _constant,
    "GlorotNormal": _scaled(1.0, "fan_avg", "truncated_normal"),
    "GlorotUniform": _scaled(1.0, "fan_avg", "uniform"),
    "HeNormal": _scaled(2.0, "fan_in", "truncated_normal"),
    "HeUniform": _scaled(2.0, "fan_in", "uniform"),
    "LecunNormal": _scaled(1.0, "fan_in", "truncated_normal"),
    "LecunUniform": _scaled(1.0, "fan_in", "uniform"),
    "Ones": lambda key, shape, dtype: jnp.ones(shape, dtype),
    "Orthogonal": _orthogonal,
    "RandomNormal": _random_normal,
    "RandomUniform": _random_uniform,
    "TruncatedNormal": _truncated_normal,
    "VarianceScaling": _variance_scaling,
    "Zeros": lambda key, shape, dtype: jnp.zeros(shape, dtype),
}
_OPTIONS = {
    "Constant": ("value",),
    "Orthogonal": ("gain",),
    "RandomNormal": ("mean", "stddev"),
    "RandomUniform": ("minval", "maxval"),
    "TruncatedNormal": ("mean", "stddev"),
    "VarianceScaling": ("scale", "mode", "distribution"),
}
_SHORT_NAMES = {"uniform": "RandomUniform", "normal": "RandomNormal"}


@dataclass(frozen=True)
class Initializer:
    """A Keras initializer; calling it draws an array of `shape` and `dtype` from `key`.

    >>> Initializer("Constant", (("value", 2.0),))(None, (2,), "float32").tolist()
    [2.0, 2.0]
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_config(cls, config: Any) -> "Initializer | None":
        """Read a serialized initializer or its short name; None if fastgpu has no equal of it."""
        if isinstance(config, str):
            config = {"class_name": _SHORT_NAMES.get(config, config)}
        if not isinstance(config, dict):
            return None
        name, options = config.get("class_name"), config.get("config") or {}
        if isinstance(name, str) and name.islower():
            name = name.title().replace("_", "")
        if name not in _SAMPLERS or not isinstance(options.get("value", 0.0), int | float):
            return None
        kept = tuple((key, options[key]) for key in _OPTIONS.get(name, ()) if key in options)
        return cls(name, kept)

    def __call__(self, key: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Draw the initial value."""
        return _SAMPLERS[self.name](key, shape, jnp.dtype(dtype), **dict(self.options))


ZEROS = Initializer("Zeros")
ONES = Initializer("Ones")
GLOROT_UNIFORM = Initializer("GlorotUniform")
ORTHOGONAL = Initializer("Orthogonal")
RANDOM_UNIFORM = Initializer("RandomUniform")
