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

from fastgpu.compile import options_for
from fastgpu.config import default_memory_budget
from fastgpu.errors import BudgetError, ConfigurationError
from fastgpu.hardware import parse_budget
from fastgpu.hardware.after_import import after_import
from fastgpu.keras_integration import budget, data, random
from fastgpu.transforms import optimize

TRAINER = "keras.src.backend.jax.trainer"
_TRAINING = "make_train_function"
_FUNCTIONS = (_TRAINING, "make_test_function", "make_predict_function")
_STATE = (
    "trainable_variables",
    "non_trainable_variables",
    "optimizer_variables",
    "metrics_variables",
)
_log = logging.getLogger("fastgpu")
# Models that are accelerated one by one, and the memory budget of each.
_accelerated: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_every_model = False


def accelerate_all(trainer: ModuleType) -> None:
    """Put all models through the passes that `trainer`, Keras's JAX trainer module, compiles."""
    global _every_model
    _every_model = _prepare(trainer)
    after_import(data.ADAPTER, data.close_in_background)
    after_import(random.MODULE, random.draw_in_one_pass)


def accelerate(model: Any, *, memory_budget: int | float | str | None = None) -> Any:
    """Train, evaluate and predict with a Keras model through fastgpu's passes; returns the model.

    What `fastgpu.configure()` does for every model, for one. `model` is any `keras.Model`; Keras
    has to run on JAX. `fit`, `evaluate`, `predict`, their `_on_batch` forms, callbacks, metrics and
    a `train_step` of its own work as before and give the same numbers, up to float32 roundings.
    A step that cannot be traced runs as Keras runs it, and a warning says so once.

    `memory_budget` is for a training step, weights and optimizer included: bytes, "8GiB", or "60%"
    of what it takes otherwise. What the gradient keeps is planned for each kind of batch; a
    `train_step` of the model's own is planned where it leaves the gradient to Keras's.

    Raises `ConfigurationError` if `model` is no Keras model, Keras runs on another backend or the
    budget cannot be read; training raises `BudgetError` if no plan fits.

    >>> import keras  # doctest: +SKIP
    >>> model = fastgpu.accelerate(keras.Sequential([keras.layers.Dense(10)]))  # doctest: +SKIP
    """
    _check_budget(memory_budget)
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
        _accelerated[model] = memory_budget
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
    budget.plan_gradients(trainer)
    return True


def _check_budget(memory_budget: int | float | str | None) -> None:
    if memory_budget is not None:
        parse_budget(memory_budget, lambda: 1000)


def _budget_of(model: Any) -> int | float | str | None:
    """The model's own budget, or that of all models."""
    own = _accelerated.get(model)
    return default_memory_budget() if own is None else own


def _making(original: Callable[..., Any], trainer: Any) -> Callable[..., Any]:
    """`original`, which makes a function; what it compiles is optimized first."""

    @functools.wraps(original)
    def make(model: Any, force: bool = False) -> Any:
        if not (_every_model or model in _accelerated):
            return original(model, force=force)
        jit = trainer.jit
        memory_budget = _budget_of(model) if original.__name__ == _TRAINING else None
        trainer.jit = functools.partial(_jit, model, memory_budget)
        try:
            return original(model, force=force)
        finally:
            trainer.jit = jit

    return make


def _jit(
    model: Any, memory_budget: int | float | str | None, fn: Callable[..., Any], **settings: Any
) -> Any:
    if memory_budget is None:
        fast = optimize(fn, precision={})  # Keras has dtype policies of its own
        return jax.jit(_or_as_it_is(model.name, fn, fast), **settings)
    donated = settings.get("donate_argnums", ())
    donated = (donated,) if isinstance(donated, int) else tuple(donated)
    fast = _or_as_it_is(model.name, fn, budget.within(model.name, fn, memory_budget, donated))
    options = options_for(jax.default_backend())
    return _given_back(model, jax.jit(fast, compiler_options=options, **settings))


def _given_back(model: Any, step: Callable[..., Any]) -> Callable[..., Any]:
    """`step`; if its budget is refused, the variables that Keras took from `model` return to it."""

    def run(state: Any, batch: Any) -> Any:
        try:
            return step(state, batch)
        except BudgetError:
            model._jax_state = dict(zip(_STATE, state, strict=True))
            model._jax_state_synced = False
            model.jax_state_sync()
            raise

    return run


def _or_as_it_is(name: str, fn: Callable[..., Any], fast: Callable[..., Any]) -> Callable[..., Any]:

    @functools.wraps(fn)
    def run(*args: Any) -> Any:
        try:
            return fast(*args)
        except BudgetError:
            raise
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
