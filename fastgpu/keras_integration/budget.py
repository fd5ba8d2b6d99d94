"""Keras training steps within a memory budget.

Keras's `train_step` differentiates its loss by `jax.value_and_grad`, which it finds in a module of
Keras. While a step is traced that name leads here: once to see what is differentiated, then to put
the planned program in its place. What is compiled and held against the budget is the whole step.

The one warning: a `train_step` of the user's own that calls JAX's function by itself is not
planned, and is told so; `fastgpu.value_and_grad(memory_budget=...)` can be called there instead.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import jax

from fastgpu.compile import Gradient, compile_for, shape_of
from fastgpu.hardware import show_bytes
from fastgpu.ir.compat import ClosedJaxpr
from fastgpu.keras_integration.replaced import With
from fastgpu.transforms import optimize, whole_step

_log = logging.getLogger("fastgpu")
_differentiate: ContextVar[Callable[..., Any]] = ContextVar("differentiate")


def plan_gradients(trainer: ModuleType) -> None:
    """Have `trainer`, Keras's JAX trainer module, ask this one for gradients."""
    if getattr(trainer, "jax", None) is jax:
        vars(trainer)["jax"] = With(jax, value_and_grad=_value_and_grad)


def within(
    name: str, fn: Callable[..., Any], budget: int | float | str, donate: tuple[int, ...]
) -> Callable[..., Any]:
    """`fn`, a training step `(state, data) -> (logs, state)`, planned while it is traced.

    Raises `BudgetError` when no plan fits `budget`, with the smallest peak that was found.
    """
    optimized = optimize(fn, precision={})  # Keras has dtype policies of its own

    @functools.wraps(fn)
    def step(*args: Any) -> Any:
        structs = jax.tree.map(shape_of, args)
        gradient = _differentiated(fn, structs)
        if gradient is None:
            _log.warning(
                "model %r: memory_budget has no effect, because its train_step does not "
                "differentiate as Keras's does; call fastgpu.value_and_grad(memory_budget=...) "
                "there",
                name,
            )
            return optimized(*args)

        def build(program: ClosedJaxpr) -> Callable[..., Any]:
            return _with_program(fn, gradient, program)

        def compiled(program: ClosedJaxpr) -> Any:
            return compile_for(build(program), structs, None, donate_argnums=donate)

        search = gradient.gradient.search(compiled)
        attempt = search.within(budget)
        _log.info(
            "model %r: a training step takes %s of %s, without a budget %s",
            name,
            show_bytes(attempt.peak),
            show_bytes(search.bytes_of(budget)),
            show_bytes(search.unconstrained.peak),
        )
        return build(attempt.modelled.program)(*args)

    return step


class _Call:
    """A call of a differentiated function: its first argument, the other arrays, and the rest."""

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> None:
        self.fn, self.moving = fn, args[0]
        self.leaves, self.structure = jax.tree.flatten((args[1:], kwargs))
        self.arrays = [leaf for leaf in self.leaves if hasattr(leaf, "dtype")]

    def again(self, moving: Any, arrays: Any) -> Any:
        """The call with these arrays."""
        given = iter(arrays)
        leaves = [next(given) if hasattr(leaf, "dtype") else leaf for leaf in self.leaves]
        args, kwargs = jax.tree.unflatten(self.structure, leaves)
        return self.fn(moving, *args, **kwargs)

    @property
    def types(self) -> Any:
        """What tells one such call from another."""
        leaves, structure = jax.tree.flatten((self.moving, self.arrays))
        static = tuple(leaf for leaf in self.leaves if not hasattr(leaf, "dtype"))
        return structure, self.structure, static, tuple(map(shape_of, leaves))


class _Differentiated:
    """The gradient that a step takes, and for which arguments."""

    def __init__(self, call: _Call) -> None:
        self.types = call.types
        self.gradient = Gradient(call.again, call.moving, call.arrays, None, precision={})

    def evaluate(self, program: ClosedJaxpr, call: _Call) -> Any:
        """`((value, aux), gradients)` of `call` by `program`."""
        return self.gradient.evaluate(program, call.moving, call.arrays)


def _differentiated(fn: Callable[..., Any], structs: Any) -> _Differentiated | None:
    """What `fn` differentiates first, if it is by Keras's `value_and_grad`."""
    found: list[_Differentiated] = []

    def record(plain: Callable[..., Any], call: _Call | None, *args: Any, **kwargs: Any) -> Any:
        if call is not None and not found:
            found.append(_Differentiated(call))
        return plain(*args, **kwargs)

    with _differentiating(record):
        jax.eval_shape(fn, *structs)
    return found[0] if found else None


def _with_program(
    fn: Callable[..., Any], gradient: _Differentiated, program: ClosedJaxpr
) -> Callable[..., Any]:
    """`fn` whose gradients are taken by `program`."""

    def planned(plain: Callable[..., Any], call: _Call | None, *args: Any, **kwargs: Any) -> Any:
        if call is None or call.types != gradient.types:
            return plain(*args, **kwargs)
        return gradient.evaluate(program, call)

    @functools.wraps(fn)
    def step(*args: Any) -> Any:
        with _differentiating(planned):
            return fn(*args)

    passes = whole_step("default")
    return optimize(step, passes, precision={}) if passes else step


@contextlib.contextmanager
def _differentiating(how: Callable[..., Any]) -> Iterator[None]:
    token = _differentiate.set(how)
    try:
        yield
    finally:
        _differentiate.reset(token)


def _value_and_grad(fn: Callable[..., Any], *settings: Any, **named: Any) -> Callable[..., Any]:
    """`jax.value_and_grad`, or what is to be done instead while a step is planned."""
    plain = jax.value_and_grad(fn, *settings, **named)
    how = _differentiate.get(None)
    if how is None:
        return plain
    known = not settings and named == {"has_aux": True}

    def run(*args: Any, **kwargs: Any) -> Any:
        return how(plain, _Call(fn, args, kwargs) if known else None, *args, **kwargs)

    return run
