"""If, Loop and Scan. What is known while tracing is decided there; the rest becomes lax control."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.errors import UnsupportedLayerError
from fastgpu.importers.onnx.dtypes import as_jax, in_use
from fastgpu.importers.onnx.operators.operator import axis_of, operator

# Loops of fewer steps are written out, so that what their steps know stays known.
_WRITTEN_OUT = 32
# A loop that can only be written out, because its arrays grow, for instance.
_LONGEST_WRITTEN_OUT = 1024


def _known(value: Any) -> bool:
    return value is None or isinstance(value, np.ndarray)


@operator("If", as_is=True)
def if_(condition: Any, *, then_branch: Any, else_branch: Any, call: Any) -> tuple[Any, ...]:
    """One of two graphs; both are traced if the condition is not known."""
    if _known(condition):
        return tuple(call.run(then_branch if condition.item() else else_branch, []))

    def branch(graph: Any) -> Any:
        return lambda: [as_jax(value, "If") for value in call.run(graph, [], iteration=0)]

    return tuple(jax.lax.cond(condition.reshape(()), branch(then_branch), branch(else_branch)))


@operator("Loop", as_is=True)
def loop(trips: Any, condition: Any, *state: Any, body: Any, call: Any) -> tuple[Any, ...]:
    """A graph repeated a number of times, or as long as a condition holds.

    Written out where it is short or its arrays change shape, a `lax.scan` where the number of steps
    is known, else a `lax.while_loop`, which has no outputs by step and no reverse gradient.
    """
    collected = len(body.outputs) - 1 - len(state)
    lasting = body.keeps_condition() and _known(condition)
    if lasting and condition is not None and not condition.item():
        trips = np.zeros((), np.int64)
    count = int(trips.item()) if trips is not None and _known(trips) else None
    sequences = any(isinstance(value, tuple) for value in state)
    if lasting and count is not None and count > _WRITTEN_OUT and not sequences:
        try:
            return _scanned(count, state, body, call)
        except TypeError:
            pass  # a state that changes its shape or type
    if _known(condition) and _known(trips):
        written = _written_out(count, condition, state, collected, body, call)
        if written is not None:
            return written
    if collected or sequences:
        raise UnsupportedLayerError(
            "a Loop collects outputs over a number of steps that is not known",
            expected="a number of steps that follows from shapes and constants",
            fix="fix the inputs it depends on: from_onnx(..., constants={name: value})",
        )
    return _while(trips, condition, state, body, call)


def _written_out(
    count: int | None, condition: Any, state: Sequence[Any], collected: int, body: Any, call: Any
) -> tuple[Any, ...] | None:
    """Step by step, or None if the condition turns out to depend on what is not known."""
    going = np.ones((), bool) if condition is None else condition
    kept: list[list[Any]] = [[] for _ in range(collected)]
    values, step = list(state), 0
    while (count is None or step < count) and going.item():
        if step >= _LONGEST_WRITTEN_OUT:
            raise UnsupportedLayerError(
                f"a Loop of more than {_LONGEST_WRITTEN_OUT} steps would have to be written out",
                expected="a state of one shape and a condition that does not change",
            )
        index = np.array(step, np.int64)
        going, *outputs = call.run(body, [index, going, *values], iteration=step)
        if not _known(going):
            return None
        values, step = outputs[: len(values)], step + 1
        for output, column in zip(outputs[len(values) :], kept, strict=True):
            column.append(output)
    return *values, *(_stacked(column, i, state, body, call) for i, column in enumerate(kept))


def _stacked(column: list[Any], index: int, state: Sequence[Any], body: Any, call: Any) -> Any:
    if all(_known(value) for value in column) and column:
        return np.stack(column)
    if column:
        return jnp.stack([as_jax(value, "Loop") for value in column])
    # no step: the shapes of a step that is not taken
    inputs = [np.zeros((), np.int64), np.ones((), bool), *state]
    shapes = jax.eval_shape(
        lambda: [as_jax(value, "Loop") for value in call.run(body, inputs, iteration=0)]
    )
    shape = shapes[1 + len(state) + index]
    return np.zeros((0, *shape.shape), shape.dtype)


def _scanned(count: int, state: Sequence[Any], body: Any, call: Any) -> tuple[Any, ...]:
    def step(carry: list[jax.Array], index: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        outputs = call.run(body, [index, np.ones((), bool), *carry], iteration=index)[1:]
        arrays = [as_jax(value, "Loop") for value in outputs]
        return arrays[: len(carry)], arrays[len(carry) :]

    first = [as_jax(value, "Loop") for value in state]
    last, kept = jax.lax.scan(step, first, jnp.arange(count, dtype=in_use(np.int64, jnp)))
    return *last, *kept


def _while(
    trips: Any, condition: Any, state: Sequence[Any], body: Any, call: Any
) -> tuple[Any, ...]:
    most = None if trips is None else as_jax(trips, "Loop").reshape(())
    going = jnp.ones((), bool) if condition is None else as_jax(condition, "Loop").reshape(())

    def goes_on(carry: Any) -> jax.Array:
        step, going, _ = carry
        return going if most is None else going & (step < most)

    def step(carry: Any) -> Any:
        index, going, values = carry
        new, *outputs = call.run(body, [index, going, *values], iteration=index)
        arrays = [as_jax(value, "Loop") for value in outputs]
        return index + 1, as_jax(new, "Loop").reshape(()), arrays

    first = [as_jax(value, "Loop") for value in state]
    start = jnp.zeros((), in_use(np.int64, jnp))
    return tuple(jax.lax.while_loop(goes_on, step, (start, going, first))[2])


@operator("Scan")
def batched_scan(
    lengths: jax.Array | None = None,
    *inputs: jax.Array,
    body: Any,
    num_scan_inputs: int,
    directions: Sequence[int] | None = None,
    call: Any,
) -> tuple[jax.Array, ...]:
    """Opset 8: every input has a batch axis before the one that is scanned."""
    if lengths is not None:
        raise UnsupportedLayerError(
            "Scan with sequence_lens", fix="export the model at opset 9 or newer"
        )

    def one(*example: jax.Array) -> tuple[jax.Array, ...]:
        return scan(
            *example,
            body=body,
            num_scan_inputs=num_scan_inputs,
            scan_input_directions=directions,
            call=call,
        )

    return tuple(jax.vmap(one)(*inputs))


@operator("Scan", since=9)
def scan(
    *inputs: jax.Array,
    body: Any,
    num_scan_inputs: int,
    scan_input_axes: Sequence[int] | None = None,
    scan_input_directions: Sequence[int] | None = None,
    scan_output_axes: Sequence[int] | None = None,
    scan_output_directions: Sequence[int] | None = None,
    call: Any,
) -> tuple[jax.Array, ...]:
    """A graph run over slices, with a state from one to the next."""
    states = len(inputs) - num_scan_inputs
    kept = len(body.outputs) - states
    axes = scan_input_axes or [0] * num_scan_inputs
    backwards = scan_input_directions or [0] * num_scan_inputs
    slices = []
    for x, axis, backward in zip(inputs[states:], axes, backwards, strict=True):
        moved = jnp.moveaxis(x, axis_of(axis, x.ndim), 0)
        slices.append(jnp.flip(moved, 0) if backward else moved)
    length = slices[0].shape[0]

    def step(carry: list[jax.Array], now: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        index, parts = now
        outputs = call.run(body, [*carry, *parts], iteration=index)
        arrays = [as_jax(value, "Scan") for value in outputs]
        return arrays[:states], arrays[states:]

    last, collected = jax.lax.scan(step, list(inputs[:states]), (jnp.arange(length), slices))
    outputs = []
    for y, axis, backward in zip(
        collected,
        scan_output_axes or [0] * kept,
        scan_output_directions or [0] * kept,
        strict=True,
    ):
        y = jnp.flip(y, 0) if backward else y
        outputs.append(jnp.moveaxis(y, 0, axis_of(axis, y.ndim)))
    return *last, *outputs
