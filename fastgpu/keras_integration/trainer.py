"""The functions that Keras's JAX trainer compiles, through fastgpu's passes.

The one warning: this reaches into `keras.src.backend.jax.trainer`. Where a release of Keras does
not have what is looked for there, models run as Keras runs them, and a warning says so.
"""

import functools
import logging
import sys
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax

from fastgpu.errors import ConfigurationError
from fastgpu.hardware.after_import import after_import
from fastgpu.keras_integration import data, random
from fastgpu.transforms import optimize

TRAINER = "keras.src.backend.jax.trainer"
_FUNCTIONS = ("make_train_function", "make_test_function", "make_predict_function")
_log = logging.getLogger("fastgpu")
_accelerated: weakref.WeakSet[Any] = weakref.WeakSet()
_every_model = False


def accelerate_all(trainer: ModuleType) -> None:
    """Put all models through the passes that `trainer`, Keras's JAX trainer module, compiles."""
    global _every_model
    _every_model = _prepare(trainer)
    after_import(data.ADAPTER, data.close_in_background)
    after_import(random.MODULE, random.draw_in_one_pass)


def accelerate(model: Any) -> Any:
    """Train, evaluate and predict with a Keras model through fastgpu's passes; returns the model.

    What `fastgpu.configure()` does for every model, for one. `model` is any `keras.Model`; Keras
    has to run on JAX. `fit`, `evaluate`, `predict`, their `_on_batch` forms, callbacks, metrics and
    a `train_step` of its own work as before and give the same numbers, up to float32 roundings.
    A step that cannot be traced runs as Keras runs it, and a warning says so once.

    Raises `ConfigurationError` if `model` is no Keras model or Keras runs on another backend.

    >>> import keras  # doctest: +SKIP
    >>> model = fastgpu.accelerate(keras.Sequential([keras.layers.Dense(10)]))  # doctest: +SKIP
    """
    trainer = sys.modules.get(TRAINER)
    if trainer is None or not isinstance(model, trainer.JAXTrainer):
        raise ConfigurationError(
            "accelerate: this model is not one that Keras runs on JAX",
            expected="a keras.Model, and Keras on its JAX backend",
            got=f"{type(model).__module__}.{type(model).__name__}",
            fix="call fastgpu.configure() above the first import of Keras or TensorFlow, or set "
            "KERAS_BACKEND=jax",
        )
    if _prepare(trainer):
        _accelerated.add(model)
        # What was compiled before is compiled again.
        model.train_function = model.test_function = model.predict_function = None
    return model


def _prepare(trainer: ModuleType) -> bool:
    """Have the trainer's functions made by way of `_making`; whether that is possible."""
    known: Any = getattr(trainer, "JAXTrainer", None)
    if not hasattr(trainer, "jit") or not all(hasattr(known, name) for name in _FUNCTIONS):
        _log.warning(
            "this release of Keras compiles its steps in a way that fastgpu does not know: models "
            "run as Keras runs them (known are Keras 3.10 to 3.15)"
        )
        return False
    for name in _FUNCTIONS:
        original = getattr(known, name)
        if not hasattr(original, "__wrapped__"):
            setattr(known, name, _making(original, trainer))
    return True


def _making(original: Callable[..., Any], trainer: Any) -> Callable[..., Any]:
    """`original`, which makes a function; what it compiles is optimized first."""

    @functools.wraps(original)
    def make(model: Any, force: bool = False) -> Any:
        if not (_every_model or model in _accelerated):
            return original(model, force=force)
        jit = trainer.jit
        trainer.jit = functools.partial(_jit, model.name)
        try:
            return original(model, force=force)
        finally:
            trainer.jit = jit

    return make


def _jit(name: str, fn: Callable[..., Any], **settings: Any) -> Any:
    return jax.jit(_optimized_or_as_it_is(name, fn), **settings)


def _optimized_or_as_it_is(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    fast = optimize(fn, precision={})  # Keras has dtype policies of its own

    @functools.wraps(fn)
    def run(*args: Any) -> Any:
        try:
            return fast(*args)
        except Exception as error:
            result = fn(*args)  # what is wrong with the model itself is for Keras to say
            _log.warning(
                "model %r: a step cannot be accelerated and runs as Keras runs it (%s: %s)",
                name,
                type(error).__name__,
                (str(error).splitlines() or [""])[0],
            )
            return result

    return run
