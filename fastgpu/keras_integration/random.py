"""Large initial weights of Keras, drawn in one pass over memory: the same numbers.

Keras draws a layer's weights outside of any step, with JAX's generator as it is on CPUs: a loop
over arrays as large as the weights, three of them at once.
"""

import functools
import math
from types import ModuleType
from typing import Any

import jax

from fastgpu.keras_integration.replaced import With
from fastgpu.transforms import optimize

MODULE = "keras.src.backend.jax.random"
_DRAWS = ("normal", "truncated_normal", "uniform")
# Fewer numbers are drawn quickly in any case.
_MANY = 1 << 20


def draw_in_one_pass(module: ModuleType) -> None:
    """Have `module`, Keras's random functions on JAX, draw many numbers by optimized code."""
    if getattr(module, "jax", None) is jax:
        vars(module)["jax"] = With(jax, random=With(jax.random, **_draws()))


def _draws() -> dict[str, Any]:
    def drawing(name: str) -> Any:
        original = getattr(jax.random, name)

        @functools.wraps(original)
        def draw(key: Any, *, shape: Any, **settings: Any) -> Any:
            plain = all(isinstance(value, int | float | str) for value in settings.values())
            if not plain or math.prod(shape) < _MANY:
                return original(key, shape=shape, **settings)
            return _optimized(name, tuple(shape), tuple(settings.items()))(key)

        return draw

    return {name: drawing(name) for name in _DRAWS}


@functools.cache
def _optimized(name: str, shape: tuple[int, ...], settings: tuple[tuple[str, Any], ...]) -> Any:
    draw = getattr(jax.random, name)
    return optimize(lambda key: draw(key, shape=shape, **dict(settings)), precision={})
