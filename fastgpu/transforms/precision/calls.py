"""Loops, branches and calls in mixed precision: in which dtype values go in and come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax import lax

from fastgpu.ir.compat import (
    ClosedJaxpr,
    JaxprEqn,
    bind,
    is_plain_call,
    map_sub_jaxprs,
    shard_mapped,
    with_borders,
)
from fastgpu.transforms.precision.kinds import Kind
from fastgpu.transforms.precision.values import Value
from fastgpu.transforms.precision.wanted import call_name, joined

if TYPE_CHECKING:
    from fastgpu.transforms.precision.mixed import Evaluator


def call(
    run: Evaluator, eqn: JaxprEqn, values: list[Value], wanted: list[bool], path: str
) -> list[Value]:
    """The results of an equation that runs programs, which `run` evaluates.

    `wanted` says which of them lead to a product; `path` is the scope.
    """
    name = eqn.primitive.name
    if is_plain_call(eqn):
        (closed,) = _closed(eqn)
        with jax.named_scope(call_name(eqn)):
            inside = joined(path, call_name(eqn))
            return run.evaluate(closed.jaxpr, closed.consts, values, wanted, inside)
    if name.startswith("custom_"):
        return _custom(run, eqn, values, wanted, path)
    return _CALLS.get(name, _placed)(run, eqn, values, wanted, path)


def _checkpoint(
    run: Evaluator, eqn: JaxprEqn, values: list[Value], wanted: list[bool], path: str
) -> list[Value]:
    """What is kept for the backward half is what goes in: as it comes."""
    (closed,) = _closed(eqn)
    kinds, as_found = [value.kind for value in values], [None] * len(wanted)
    made, found = run.program(closed, kinds, wanted, as_found, path)
    invars = [*made.jaxpr.constvars, *made.jaxpr.invars]
    jaxpr = with_borders(made.jaxpr, constvars=[], invars=invars)
    arrays = [*made.consts, *(value.array for value in values)]
    return _valued(bind(eqn, arrays, {**eqn.params, "jaxpr": jaxpr}), found)


def _placed(
    run: Evaluator, eqn: JaxprEqn, values: list[Value], wanted: list[bool], path: str
) -> list[Value]:
    """A call that says where its inputs and outputs lie, and so their types."""
    found: list[Kind | None] = []

    def change(closed: ClosedJaxpr) -> ClosedJaxpr:
        wide = [False] * len(wanted)
        made, found[:] = run.program(closed, _wide_kinds(values), wanted, wide, path)
        return made

    outputs = bind(eqn, [value.wide() for value in values], map_sub_jaxprs(eqn, change))
    return _valued(outputs, [_widened(kind) for kind in found])


def _shard_map(
    run: Evaluator, eqn: JaxprEqn, values: list[Value], wanted: list[bool], path: str
) -> list[Value]:
    found: list[Kind | None] = []

    def body(*args: Any) -> list[Any]:
        inputs = _valued(args, _wide_kinds(values))
        results = run.evaluate(eqn.params["jaxpr"], (), inputs, wanted, path)
        found[:] = [_widened(value.kind) for value in results]
        return [value.wide() for value in results]

    return _valued(shard_mapped(eqn, body, [value.wide() for value in values]), found)


def _custom(
    run: Evaluator, eqn: JaxprEqn, values: list[Value], wanted: list[bool], path: str
) -> list[Value]:
    """A function with a derivative rule of its own: it runs in the types that it was written for,
    and its result is rounded if the equations in it would have given a low one."""
    (closed,) = _closed(eqn)
    kinds, as_found = [value.kind for value in values], [None] * len(wanted)
    _, found = type(run)(run.policy, frozen=True).program(closed, kinds, wanted, as_found, path)
    outputs = [
        lax.convert_element_type(output, run.dtype) if kind is Kind.LOW else output
        for output, kind in zip(bind(eqn, [v.wide() for v in values]), found, strict=True)
    ]
    return _valued(outputs, found)


def _cond(
    run: Evaluator, eqn: JaxprEqn, values: list[Value], wanted: list[bool], path: str
) -> list[Value]:
    index, *operands = values
    kinds, branches = [value.kind for value in operands], _closed(eqn)
    as_found = [None] * len(wanted)
    found = [run.program(branch, kinds, wanted, as_found, path)[1] for branch in branches]
    merged = [_either(each) for each in zip(*found, strict=True)]
    low = [kind is Kind.LOW for kind in merged]
    changed = tuple(run.program(branch, kinds, wanted, low, path)[0] for branch in branches)
    arrays = [index.array, *(value.array for value in operands)]
    return _valued(bind(eqn, arrays, {**eqn.params, "branches": changed}), merged)


def _while(
    run: Evaluator, eqn: JaxprEqn, values: list[Value], wanted: list[bool], path: str
) -> list[Value]:
    """The carry stays in float32: the number of roundings is not known."""
    skipped = eqn.params["cond_nconsts"]
    kinds = [_carried(value.kind, False) for value in values[skipped:]]
    outs = run.wanted.loop_outputs(eqn, wanted, path)
    body, _ = run.program(eqn.params["body_jaxpr"], kinds, outs, [False] * len(outs), path)
    arrays = [value.wide() for value in values]
    outputs = bind(eqn, arrays, {**eqn.params, "body_jaxpr": body})
    carry = values[len(values) - len(outputs) :]
    return _valued(outputs, [_after_loop(value.kind, False) for value in carry])


def _scan(
    run: Evaluator, eqn: JaxprEqn, values: list[Value], wanted: list[bool], path: str
) -> list[Value]:
    """A carry is in the low dtype if it comes as activations and a product of the body reads it,
    as that of a stack of layers; others add up, and stay in float32."""
    first, count = eqn.params["num_consts"], eqn.params["num_carry"]
    body: ClosedJaxpr = eqn.params["jaxpr"]
    outs = run.wanted.loop_outputs(eqn, wanted, path)
    at_once = [*[False] * count, *outs[count:]]
    read = run.wanted.inputs(body.jaxpr, at_once, path)[first : first + count]
    kinds = [value.kind for value in values]
    consts, carry, rows = kinds[:first], kinds[first : first + count], kinds[first + count :]
    low = [r and kind in _ACTIVATIONS for r, kind in zip(read, carry, strict=True)]
    while True:
        inside = [*consts, *map(_carried, carry, low), *rows]
        given = [*low, *[None] * (len(outs) - count)]
        made, found = run.program(body, inside, outs, given, path)
        # What becomes data in the body stays as exact as that.
        fit = [k and kind in _ACTIVATIONS for k, kind in zip(low, found[:count], strict=True)]
        if fit == low:
            break
        low = fit
    arrays = [value.array for value in values]
    for place, how in enumerate(low, start=first):
        arrays[place] = run.given(values[place], how)
    outputs = bind(eqn, arrays, {**eqn.params, "jaxpr": made})
    return _valued(outputs, [*map(_after_loop, carry, low), *found[count:]])


_CALLS = {
    "checkpoint": _checkpoint,
    "remat2": _checkpoint,
    "cond": _cond,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}
_ACTIVATIONS = (Kind.LOW, Kind.WIDE, Kind.LOOKUP)


def _closed(eqn: JaxprEqn) -> list[ClosedJaxpr]:
    """The programs that `eqn` runs, with their constants."""
    found: list[ClosedJaxpr] = []

    def collect(closed: ClosedJaxpr) -> ClosedJaxpr:
        found.append(closed)
        return closed

    map_sub_jaxprs(eqn, collect)
    return found


def _valued(arrays: Sequence[Any], kinds: Sequence[Kind | None]) -> list[Value]:
    return [Value(array, kind) for array, kind in zip(arrays, kinds, strict=True)]


def _wide_kinds(values: list[Value]) -> list[Kind | None]:
    return [_widened(value.kind) for value in values]


def _widened(kind: Kind | None) -> Kind | None:
    return Kind.WIDE if kind is Kind.LOW else kind


def _carried(kind: Kind | None, low: bool) -> Kind | None:
    """The kind of a carry in the body of its loop."""
    if kind is None:
        return None
    return Kind.LOW if low else Kind.DATA


def _after_loop(kind: Kind | None, low: bool) -> Kind | None:
    """The kind of a carry after its loop, that had `kind` before."""
    if low or kind in (None, Kind.DATA):
        return Kind.LOW if low else kind
    return Kind.WIDE


def _either(kinds: Sequence[Kind | None]) -> Kind | None:
    """The kind of a value that comes from one of several branches."""
    if len(set(kinds)) == 1:
        return kinds[0]
    if Kind.LOW in kinds and set(kinds) <= {Kind.LOW, Kind.WIDE, Kind.CONSTANT}:
        return Kind.LOW
    return Kind.DATA if Kind.DATA in kinds else Kind.WIDE
