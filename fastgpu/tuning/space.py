"""The search space: a plain dict, read into dimensions that an optuna trial can draw from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

from fastgpu.errors import TuningError

if TYPE_CHECKING:
    import optuna

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Float:
    """A real number between two bounds, drawn evenly or (`log`) evenly in its logarithm."""

    low: float
    high: float
    log: bool = False

    def suggest(self, trial: "optuna.Trial", name: str) -> float:
        """A value for this trial."""
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def __str__(self) -> str:
        return f"{'log' if self.log else 'uniform'} {self.low!r} to {self.high!r}"


@dataclass(frozen=True)
class Int:
    """A whole number between two bounds, both included."""

    low: int
    high: int

    def suggest(self, trial: "optuna.Trial", name: str) -> int:
        """A value for this trial."""
        return trial.suggest_int(name, self.low, self.high)

    def __str__(self) -> str:
        return f"int {self.low} to {self.high}"


@dataclass(frozen=True)
class Choice:
    """One of a few values, in no order."""

    options: tuple[Scalar, ...]

    def suggest(self, trial: "optuna.Trial", name: str) -> Scalar:
        """A value for this trial."""
        return trial.suggest_categorical(name, self.options)

    def __str__(self) -> str:
        return f"one of {list(self.options)!r}"


@dataclass(frozen=True)
class Constant:
    """A value that every trial gets unchanged."""

    value: Scalar

    def suggest(self, trial: "optuna.Trial", name: str) -> Scalar:
        """The value."""
        return self.value

    def __str__(self) -> str:
        return f"always {self.value!r}"


Dimension = Float | Int | Choice | Constant
_KINDS = ("log", "uniform", "int")


def parse(space: Mapping[str, Any]) -> dict[str, Dimension]:
    """The dimensions of a search space.

    A tuple `("log" | "uniform" | "int", low, high)` is a range, a list a choice, anything else
    (string, number, bool, None) a constant. Raises `TuningError` for what is none of these.

    >>> for name, dimension in parse({"lr": ("log", 1e-5, 0.1), "act": ["relu", "gelu"]}).items():
    ...     print(name, "is", dimension)
    lr is log 1e-05 to 0.1
    act is one of ['relu', 'gelu']
    """
    if not isinstance(space, Mapping) or not all(isinstance(name, str) for name in space):
        raise TuningError(
            "the search space is not a dict of names",
            expected='a dict like {"learning_rate": ("log", 1e-5, 1e-1)}',
            got=repr(space),
            fix="give every hyperparameter a name",
        )
    dimensions = {name: _dimension(name, spec) for name, spec in space.items()}
    if all(isinstance(dimension, Constant) for dimension in dimensions.values()):
        raise TuningError(
            "the search space leaves nothing to search",
            expected="at least one range or choice",
            got=repr(dict(space)),
            fix='make one a range, for example ("log", 1e-5, 1e-1), or call the objective once',
        )
    return dimensions


def _dimension(name: str, spec: Any) -> Dimension:
    if isinstance(spec, tuple):
        return _range(name, spec)
    if isinstance(spec, list):
        if not spec or any(not _is_scalar(option) for option in spec):
            _refuse(name, spec, "a list of strings, numbers, bools or None", "list the options")
        if len({(type(option), option) for option in spec}) < len(spec):
            _refuse(name, spec, "options that differ", "name each option once")
        return Choice(tuple(spec))
    if not _is_scalar(spec):
        _refuse(
            name,
            spec,
            "a range (tuple), a choice (list), or a constant string, number, bool or None",
            "let the objective hold other objects, and name them here by a string",
        )
    return Constant(spec)


def _range(name: str, spec: tuple[Any, ...]) -> Float | Int:
    form = '("log" | "uniform" | "int", low, high)'
    if not spec or spec[0] not in _KINDS:
        near = get_close_matches(str(spec[0]), _KINDS, n=1) if spec else []
        fix = f"write {near[0]!r}" if near else "for a choice among values write a list: [a, b]"
        _refuse(name, spec, form, fix)
    kind, *bounds = spec
    if len(bounds) != 2 or not all(_is_finite(bound) for bound in bounds):
        _refuse(name, spec, f"{form}, two finite numbers", "give a lower and an upper bound")
    low, high = bounds
    if not low < high:
        _refuse(name, spec, "low < high", "swap the bounds, or give a constant")
    if kind == "log" and low <= 0:
        _refuse(name, spec, "bounds above 0, for a logarithm", 'raise low, or take "uniform"')
    if kind != "int":
        return Float(float(low), float(high), log=kind == "log")
    if low != int(low) or high != int(high):
        _refuse(name, spec, "whole bounds", 'round them, or take "uniform"')
    return Int(int(low), int(high))


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | bool) or _is_finite(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse(name: str, spec: Any, expected: str, fix: str) -> NoReturn:
    raise TuningError(f"space[{name!r}] cannot be read", expected=expected, got=repr(spec), fix=fix)
