"""What a rule is: a function named after nothing but its operator, and what a call tells it.

The positional parameters of a rule are the operator's inputs, its keyword-only ones the attributes,
with ONNX's names and defaults. Two keyword-only names are not attributes: `call` is the `Call`, and
`xp` is numpy when every input is known while the program is traced and `jax.numpy` otherwise, so
that shape arithmetic stays out of the program.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from fastgpu.errors import UnsupportedLayerError

_GIVEN = ("xp", "call")


@dataclass(frozen=True, eq=False)
class Rule:
    """One operator from one opset on.

    `static`: inputs that must be known when the program is traced, because shapes follow from them.
    `needed`: attributes without a default. `given`: which of `xp` and `call` it asks for.
    `as_is`: inputs come as they are, known ones as numpy, sequences as tuples, absent ones as None.
    `bounds`: inputs whose integers may be cut to 32 bits, because only the order matters.
    `inputs`: names of the positional parameters; a variadic last one takes all that are left.
    """

    operator: str
    since: int
    compute: Callable[..., Any]
    inputs: tuple[str, ...]
    required: int
    variadic: bool
    attributes: frozenset[str]
    needed: frozenset[str]
    given: frozenset[str]
    static: frozenset[str]
    bounds: frozenset[str]
    as_is: bool

    def input_name(self, position: int) -> str:
        """The name of an input by its position.

        >>> def gather(data, indices, *, axis=0): ...
        >>> rule("Gather", 1, gather).input_name(1)
        'indices'
        """
        return self.inputs[min(position, len(self.inputs) - 1)] if self.inputs else "input"

    def is_static(self, position: int) -> bool:
        """Whether the input at a position must be known when the program is traced."""
        return self.input_name(position) in self.static


class Call(Protocol):
    """What a rule may ask of the call it computes."""

    train: bool
    opset: int
    outputs: tuple[str, ...]

    def key(self, seed: float | None = None) -> jax.Array:
        """A random key: from `seed` if the file has one, else from the "dropout" stream."""
        ...

    def run(self, graph: Any, inputs: Sequence[Any], iteration: Any = None) -> list[Any]:
        """Evaluate a graph attribute; it sees the values around it."""
        ...

    def update(self, name: str, value: jax.Array) -> None:
        """Store the new value of the statistic that is the input of that name."""
        ...


TABLE: dict[str, list[Rule]] = {}


def operator(
    *names: str,
    since: int = 1,
    static: Sequence[str] = (),
    bounds: Sequence[str] = (),
    as_is: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function in the table: the rule of the operators `names` from opset `since` on."""

    def enter(compute: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            rules = TABLE.setdefault(name, [])
            rules.append(rule(name, since, compute, static, bounds, as_is))
            rules.sort(key=lambda rule: rule.since, reverse=True)
        return compute

    return enter


def rule(
    name: str,
    since: int,
    compute: Callable[..., Any],
    static: Sequence[str] = (),
    bounds: Sequence[str] = (),
    as_is: bool = False,
) -> Rule:
    """Read a rule off the signature of its function."""
    parameters = inspect.signature(compute).parameters.values()
    inputs = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    return Rule(
        name,
        since,
        compute,
        tuple(p.name for p in inputs),
        sum(p.default is p.empty and p.kind is not p.VAR_POSITIONAL for p in inputs),
        any(p.kind is p.VAR_POSITIONAL for p in inputs),
        frozenset(keywords.difference(_GIVEN)),
        frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty)
        - set(_GIVEN),
        frozenset(keywords.intersection(_GIVEN)),
        frozenset(static),
        frozenset(bounds),
        as_is,
    )


def find(name: str, opset: int) -> Rule | None:
    """The rule of an operator in an opset, or None.

    >>> from fastgpu.importers.onnx.operators import TABLE
    >>> find("Softmax", 12).since, find("Softmax", 13).since
    (1, 13)
    """
    return next((rule for rule in TABLE.get(name, ()) if rule.since <= opset), None)


def one_of(attribute: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuse a value of an attribute that is none of `allowed`, by name."""
    if value not in allowed:
        raise UnsupportedLayerError(
            f"{attribute}={value!r}", expected=f"one of {', '.join(map(repr, allowed))}"
        )


def axis_of(axis: int, rank: int) -> int:
    """An axis counted from the front. Raises `ValueError` if there is no such axis.

    >>> axis_of(-1, 4)
    3
    """
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} of an array of rank {rank}")
    return axis % rank


def axes_of(axes: Any, rank: int) -> tuple[int, ...]:
    """Several axes counted from the front, in order.

    >>> axes_of([-1, 0], 3)
    (0, 2)
    """
    found = sorted(axis_of(int(axis), rank) for axis in axes)
    if len(set(found)) != len(found):
        raise ValueError(f"an axis occurs twice in {list(axes)}")
    return tuple(found)
