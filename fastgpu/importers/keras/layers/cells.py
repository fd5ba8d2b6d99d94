"""Recurrent cells: what happens between one time step and the next.

A cell is bound to its weights and dropout masks once per sequence. Its part that does not depend
on the states is computed for all steps at once, before the scan.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from fastgpu.importers.keras.layers.activations import Activation
from fastgpu.importers.keras.layers.initializers import (
    GLOROT_UNIFORM,
    ORTHOGONAL,
    ZEROS,
    Initializer,
)
from fastgpu.importers.keras.layers.layer import ANY, Layer, LayerState
from fastgpu.importers.keras.layers.placed import Placed

SIGMOID, TANH = Activation("sigmoid"), Activation("tanh")


class Bound(NamedTuple):
    """A cell with its weights: `step(project(x), states)` gives (output, new states).

    `project` takes inputs with any number of axes before the batch.
    """

    project: Callable[[jax.Array], Any]
    step: Callable[[Any, Any], tuple[jax.Array, Any]]


@dataclass(frozen=True, kw_only=True)
class Cell(Layer):
    """Base of the cells; `x` is always the input of one step, (batch, ...)."""

    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {"seed": ANY}

    def bind(self, state: LayerState, x: jax.Array, train: bool) -> Bound:
        """Read the weights and draw the dropout masks of a sequence."""
        raise NotImplementedError

    def initial(self, projected: jax.Array) -> list[Any]:
        """States of zeros for a step whose projected input is `projected`."""
        raise NotImplementedError

    def call(
        self, state: LayerState, x: jax.Array, states: Any = None, *, train: bool
    ) -> tuple[jax.Array, Any]:
        """One step: (batch, in) and a list of states to the output and the new states."""
        bound = self.bind(state, x, train)
        projected = bound.project(x)
        if states is None:
            states = self.initial(projected)
        nested = isinstance(states, list | tuple)
        output, new = bound.step(projected, list(states) if nested else [states])
        return output, new if nested else new[0]


@dataclass(frozen=True, kw_only=True)
class GatedCell(Cell):
    """The options that SimpleRNN, LSTM and GRU share, and their dropout."""

    units: int
    activation: Activation = TANH
    use_bias: bool = True
    kernel_initializer: Initializer = GLOROT_UNIFORM
    recurrent_initializer: Initializer = ORTHOGONAL
    bias_initializer: Initializer = ZEROS
    dropout: float = 0.0
    recurrent_dropout: float = 0.0
    implementation: int = 2
    gates: ClassVar[int] = 1
    state_count: ClassVar[int] = 1
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {
        "seed": ANY,
        "use_cudnn": ANY,
        "time_major": (False,),
    }

    def initial(self, projected: jax.Array) -> list[Any]:
        """One or two states (batch, units)."""
        zeros = jnp.zeros((projected.shape[-2], self.units), projected.dtype)
        return [zeros] * self.state_count

    def kernels(self, state: LayerState, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Kernel (in, gates * units) and recurrent kernel (units, gates * units)."""
        width = self.gates * self.units
        kernel = state.weight("kernel", (x.shape[-1], width), self.kernel_initializer)
        recurrent = state.weight(
            "recurrent_kernel", (self.units, width), self.recurrent_initializer
        )
        return kernel, recurrent

    def masks(self, state: LayerState, shape: tuple[int, ...], dtype: Any, rate: float) -> Any:
        """One dropout mask per sequence, or with `implementation=1` one per gate."""
        per_gate = self.gates > 1 and (self.implementation == 1 or self.recurrent_dropout)
        return dropout_masks(state, shape, dtype, rate, self.gates if per_gate else 1)

    def bind(self, state: LayerState, x: jax.Array, train: bool) -> Bound:
        """See `Cell.bind`; subclasses say what a step does in `advance`."""
        kernel, recurrent = self.kernels(state, x)
        input_bias, recurrent_bias = self.biases(state)
        drop = recurrent_drop = None
        if train:
            drop = self.masks(state, x.shape, kernel.dtype, self.dropout)
            states = (x.shape[0], self.units)
            recurrent_drop = self.masks(state, states, kernel.dtype, self.recurrent_dropout)

        def project(x: jax.Array) -> jax.Array:
            y = per_gate_matmul(x, kernel, drop)
            return y if input_bias is None else y + input_bias

        def step(projected: jax.Array, states: list[jax.Array]) -> tuple[jax.Array, list[Any]]:
            return self.advance(projected, states, recurrent, recurrent_bias, recurrent_drop)

        return Bound(project, step)

    def biases(self, state: LayerState) -> tuple[jax.Array | None, jax.Array | None]:
        """The bias added to the projected inputs, and that added to the recurrent part."""
        if not self.use_bias:
            return None, None
        return state.weight("bias", (self.gates * self.units,), self.bias_initializer), None

    def advance(
        self,
        projected: jax.Array,
        states: list[jax.Array],
        recurrent: jax.Array,
        recurrent_bias: jax.Array | None,
        drop: Any,
    ) -> tuple[jax.Array, list[jax.Array]]:
        """One step."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SimpleRNNCell(GatedCell):
    """SimpleRNNCell: one dense layer of the input and the previous output."""

    def advance(
        self,
        projected: jax.Array,
        states: list[jax.Array],
        recurrent: jax.Array,
        recurrent_bias: jax.Array | None,
        drop: Any,
    ) -> tuple[jax.Array, list[jax.Array]]:
        """activation(x K + h R + b)."""
        h = self.activation(projected + per_gate_matmul(states[0], recurrent, drop))
        return h, [h]


@dataclass(frozen=True)
class UnitForgetBias(Initializer):
    """The bias of an LSTM, with ones for the forget gate (Jozefowicz et al., 2015)."""

    name: str = "UnitForgetBias"
    rest: Initializer = ZEROS

    def __call__(self, key: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Draw the four gates i, f, c, o."""
        units = shape[0] // 4
        value = self.rest(key, shape, dtype)
        return value.at[units : 2 * units].set(1)


@dataclass(frozen=True, kw_only=True)
class LSTMCell(GatedCell):
    """LSTMCell (Hochreiter and Schmidhuber, 1997); gates i, f, c, o, states h and c."""

    recurrent_activation: Activation = SIGMOID
    unit_forget_bias: bool = True
    gates: ClassVar[int] = 4
    state_count: ClassVar[int] = 2

    def biases(self, state: LayerState) -> tuple[jax.Array | None, jax.Array | None]:
        """One bias."""
        if not self.use_bias:
            return None, None
        initializer = self.bias_initializer
        if self.unit_forget_bias:
            initializer = UnitForgetBias(rest=initializer)
        return state.weight("bias", (4 * self.units,), initializer), None

    def advance(
        self,
        projected: jax.Array,
        states: list[jax.Array],
        recurrent: jax.Array,
        recurrent_bias: jax.Array | None,
        drop: Any,
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The output is the state h."""
        h, c = states
        z = projected + per_gate_matmul(h, recurrent, drop)
        if recurrent_bias is not None:
            z = z + recurrent_bias
        return lstm_step(jnp.split(z, 4, axis=-1), c, self.activation, self.recurrent_activation)


@dataclass(frozen=True, kw_only=True)
class GRUCell(GatedCell):
    """GRUCell (Cho et al., arXiv:1406.1078); gates z, r, h.

    `reset_after` applies the reset gate after the matrix product, as cuDNN does; the bias then
    has two rows. Keras before TensorFlow 2 did not write the option and meant False.
    """

    recurrent_activation: Activation = SIGMOID
    reset_after: bool = True
    gates: ClassVar[int] = 3

    @classmethod
    def complete(cls, config: Mapping[str, Any], keras_2: bool) -> Mapping[str, Any]:
        """Without the option, Keras 2 computed the older form."""
        return {"reset_after": False, **config} if keras_2 else config

    def biases(self, state: LayerState) -> tuple[jax.Array | None, jax.Array | None]:
        """One bias, or with `reset_after` one row for the inputs and one for the states."""
        if not self.use_bias:
            return None, None
        width = 3 * self.units
        if not self.reset_after:
            return state.weight("bias", (width,), self.bias_initializer), None
        both = state.weight("bias", (2, width), self.bias_initializer)
        return both[0], both[1]

    def advance(
        self,
        projected: jax.Array,
        states: list[jax.Array],
        recurrent: jax.Array,
        recurrent_bias: jax.Array | None,
        drop: Any,
    ) -> tuple[jax.Array, list[jax.Array]]:
        """z * h + (1 - z) * candidate."""
        h = states[0]
        x_z, x_r, x_h = jnp.split(projected, 3, axis=-1)
        edge = 2 * self.units
        if self.reset_after:
            inner = per_gate_matmul(h, recurrent, drop)
            if recurrent_bias is not None:
                inner = inner + recurrent_bias
            h_z, h_r, h_h = jnp.split(inner, 3, axis=-1)
        else:
            gates = per_gate_matmul(h, recurrent[:, :edge], drop and drop[:2])
            h_z, h_r = jnp.split(gates, 2, axis=-1)
            h_h = None
        z = self.recurrent_activation(x_z + h_z)
        r = self.recurrent_activation(x_r + h_r)
        if h_h is None:
            kept = h if not drop else h * drop[-1]
            h_h = (r * kept) @ recurrent[:, edge:]
        else:
            h_h = r * h_h
        h = z * h + (1 - z) * self.activation(x_h + h_h)
        return h, [h]


@dataclass(frozen=True, kw_only=True)
class StackedRNNCells(Cell):
    """StackedRNNCells: every cell takes the output of the one before; states are nested."""

    cells: tuple[Placed, ...]
    nested: ClassVar[dict[str, str]] = {"cells": "cells"}

    def initial(self, projected: jax.Array) -> list[Any]:
        """The states of every cell."""
        return [cell_in(placed).initial(projected) for placed in self.cells]

    def bind(self, state: LayerState, x: jax.Array, train: bool) -> Bound:
        """Bind every cell; only the sizes of `x` matter."""
        steps: list[Bound] = []
        for placed in self.cells:
            cell = cell_in(placed)
            bound = cell.bind(state_of(placed, state), x, train)
            steps.append(bound)
            x = jax.eval_shape(
                lambda x, bound=bound, cell=cell: bound.step(
                    bound.project(x), cell.initial(bound.project(x))
                )[0],
                x,
            )

        def step(x: jax.Array, states: list[Any]) -> tuple[jax.Array, list[Any]]:
            new = []
            for bound, old in zip(steps, states, strict=True):
                x, following = bound.step(bound.project(x), old)
                new.append(following)
            return x, new

        return Bound(lambda x: x, step)


def cell_in(placed: Placed) -> Cell:
    """The cell that a recurrent layer was given."""
    if not isinstance(placed.layer, Cell):
        raise ValueError(f"{placed.class_name} {placed.name!r} is no recurrent cell")
    return placed.layer


def state_of(placed: Placed, owner: LayerState) -> LayerState:
    """The weights of a layer that is used inside another, without calling it as a layer."""
    return LayerState(owner.variables, placed.path, placed.policy, placed.frozen)


def lstm_step(
    gates: list[jax.Array], c: jax.Array, activation: Activation, recurrent_activation: Activation
) -> tuple[jax.Array, list[jax.Array]]:
    """The output and the states h, c from the four gates i, f, c, o before their activations."""
    i, f, g, o = gates
    c = recurrent_activation(f) * c + recurrent_activation(i) * activation(g)
    h = recurrent_activation(o) * activation(c)
    return h, [h, c]


def dropout_masks(
    state: LayerState, shape: tuple[int, ...], dtype: Any, rate: float, count: int
) -> list[jax.Array] | None:
    """Masks of zeros and 1 / (1 - rate); as in Keras, rates 0 and 1 drop nothing."""
    if not 0 < rate < 1:
        return None
    keys = [state.key() for _ in range(count)]
    drawn = [jax.random.bernoulli(key, 1 - rate, shape) for key in keys]
    return [jnp.where(keep, 1 / (1 - rate), 0).astype(dtype) for keep in drawn]


def per_gate_matmul(x: jax.Array, kernel: jax.Array, masks: list[jax.Array] | None) -> jax.Array:
    """x @ kernel, where one mask drops the same inputs for all gates, several others for each."""
    if masks is None:
        return x @ kernel
    if len(masks) == 1:
        return (x * masks[0]) @ kernel
    parts = jnp.split(kernel, len(masks), axis=-1)
    return jnp.concatenate(
        [(x * mask) @ part for mask, part in zip(masks, parts, strict=True)], axis=-1
    )
