"""Recurrent layers: a cell scanned over time, forwards, backwards or both.

Masked steps leave the states as they are and repeat the previous output, as in Keras.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from fastgpu.errors import BatchError
from fastgpu.importers.keras.layers.cells import (
    Bound,
    Cell,
    GatedCell,
    GRUCell,
    LSTMCell,
    SimpleRNNCell,
    StackedRNNCells,
    cell_in,
    state_of,
)
from fastgpu.importers.keras.layers.layer import Layer, LayerState, one_of
from fastgpu.importers.keras.layers.placed import Placed


@dataclass(frozen=True, kw_only=True)
class Recurrence(Layer):
    """The options of all recurrent layers, and the scan."""

    return_sequences: bool = False
    return_state: bool = False
    go_backwards: bool = False
    stateful: bool = False
    unroll: bool = False
    zero_output_for_mask: bool = False
    supports_masking: ClassVar[bool] = True

    def output_mask(self, masks: tuple[Any, ...], *inputs: Any) -> Any:
        """That of the inputs for a sequence of outputs; states have none."""
        return [first_mask(masks) if self.return_sequences else None]

    def cell(self, state: LayerState) -> tuple[Cell, LayerState]:
        """The cell and where its weights lie; by default the layer is its own cell."""
        assert isinstance(self, Cell)
        return self, state.child("cell")

    def call(
        self,
        state: LayerState,
        x: Any,
        *,
        train: bool,
        initial_state: Any = None,
        mask: Any = None,
    ) -> Any:
        """(batch, time, ...) to the last output or all of them, and the states if asked for.

        As in Keras 3, states that are passed in switch off a mask that comes with the input; in
        the list form of Keras 2, [x, *states], they do not.
        """
        if mask is None and initial_state is None:
            mask = first_mask(state.masks)
        if isinstance(x, list | tuple):
            x, initial_state = x[0], list(x[1:]) or initial_state
        cell, cell_state = self.cell(state)
        bound = cell.bind(cell_state, x[:, 0], train)
        inputs = bound.project(jnp.moveaxis(x, 1, 0))
        zeros = cell.initial(inputs[0])
        states = self._start(state, zeros, initial_state)
        output, outputs, states = self._scan(bound, inputs, states, mask)
        if self.stateful:
            for number, leaf in enumerate(jax.tree.leaves(states)):
                state.remember(f"state_{number}", leaf.astype(state.policy.variable_dtype))
        y = jnp.moveaxis(outputs, 0, 1) if self.return_sequences else output
        return (y, *states) if self.return_state else y

    def _start(self, state: LayerState, zeros: list[Any], given: Any) -> list[Any]:
        """The states before the first step, in the compute dtype."""
        if given is not None:
            given = list(given) if isinstance(given, list | tuple) else [given]
            return jax.tree.map(lambda x, zero: x.astype(zero.dtype), given, zeros)
        if not self.stateful:
            return zeros
        leaves, tree = jax.tree.flatten(zeros)
        kept = []
        for number, leaf in enumerate(leaves):
            dtype = state.policy.variable_dtype
            memory = state.memory(f"state_{number}", leaf.shape, dtype)
            if memory.shape != leaf.shape:
                raise BatchError(
                    f"stateful layer {'/'.join(state.path)!r} remembers another batch size",
                    expected=f"states {memory.shape}",
                    got=str(leaf.shape),
                    fix="give batches of one size, or fresh zeros in variables['rnn_state']",
                )
            kept.append(memory.astype(leaf.dtype))
        return jax.tree.unflatten(tree, kept)

    def _scan(
        self, bound: Bound, inputs: jax.Array, states: list[Any], mask: Any
    ) -> tuple[jax.Array, Any, list[Any]]:
        """The last output, all outputs (time first; None unless wanted), and the last states."""
        shape = jax.eval_shape(bound.step, inputs[0], states)[0]
        before = jnp.zeros(shape.shape, shape.dtype)
        if not self.unroll:
            before = jax.tree.leaves(states[-1])[0] if _is_stacked(states) else states[0]
        states = jax.tree.map(lambda x: x, list(states))
        steps = None if mask is None else jnp.moveaxis(mask.astype(bool), 1, 0)

        def body(carry: Any, step: Any) -> tuple[Any, Any]:
            states, previous = carry
            x, valid = step
            output, new = bound.step(x, states)
            if valid is not None:
                masked = previous
                if self.zero_output_for_mask and not self.unroll:
                    masked = jnp.zeros_like(output)
                output = jnp.where(_as_rank(valid, output), output, masked)
                new = jax.tree.map(lambda n, o: jnp.where(_as_rank(valid, n), n, o), new, states)
            return (new, output), output if self.return_sequences else None

        (states, last), outputs = lax.scan(
            body,
            (states, before.astype(shape.dtype)),
            (inputs, steps),
            reverse=self.go_backwards,
            unroll=inputs.shape[0] if self.unroll else 1,
        )
        if outputs is not None and self.go_backwards:
            outputs = jnp.flip(outputs, axis=0)
        return last, outputs, states


@dataclass(frozen=True, kw_only=True)
class SimpleRNN(Recurrence, SimpleRNNCell):
    """SimpleRNN."""


@dataclass(frozen=True, kw_only=True)
class LSTM(Recurrence, LSTMCell):
    """LSTM."""


@dataclass(frozen=True, kw_only=True)
class GRU(Recurrence, GRUCell):
    """GRU."""


@dataclass(frozen=True, kw_only=True)
class _CuDNN(Recurrence, GatedCell):
    """Weights of the layer itself: kernels per gate in cuDNN's order of memory, and two biases."""

    def kernels(self, state: LayerState, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The kernels in the layout of the other layers."""
        kernel, recurrent = super().kernels(state, x)
        return from_cudnn(kernel, self.gates), from_cudnn(recurrent, self.gates)

    def biases(self, state: LayerState) -> tuple[jax.Array | None, jax.Array | None]:
        """One bias for the inputs and one for the states."""
        width = self.gates * self.units
        both = state.weight("bias", (2 * width,), self.bias_initializer)
        return both[:width], both[width:]

    def cell(self, state: LayerState) -> tuple[Cell, LayerState]:
        """The layer itself."""
        return self, state


@dataclass(frozen=True, kw_only=True)
class CuDNNLSTM(_CuDNN, LSTMCell):
    """CuDNNLSTM of Keras 2."""


@dataclass(frozen=True, kw_only=True)
class CuDNNGRU(_CuDNN, GRUCell):
    """CuDNNGRU of Keras 2, which resets after the product."""

    @classmethod
    def complete(cls, config: Mapping[str, Any], keras_2: bool) -> Mapping[str, Any]:
        """The option is not written, as there is no choice."""
        return {**config, "reset_after": True}


@dataclass(frozen=True, kw_only=True)
class RNN(Recurrence):
    """RNN over any cell of the table, or a list of cells."""

    wrapped: Placed | tuple[Placed, ...]
    nested: ClassVar[dict[str, str]] = {"wrapped": "cell"}
    renamed: ClassVar[dict[str, str]] = {"cell": "wrapped"}
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {"time_major": (False,)}

    def __post_init__(self) -> None:
        """Refuse cells that are not built in."""
        for placed in self.wrapped if isinstance(self.wrapped, tuple) else (self.wrapped,):
            cell_in(placed)

    def cell(self, state: LayerState) -> tuple[Cell, LayerState]:
        """The cell; a list of cells is a stack."""
        if isinstance(self.wrapped, tuple):
            return StackedRNNCells(cells=self.wrapped), state
        return cell_in(self.wrapped), state_of(self.wrapped, state)


@dataclass(frozen=True, kw_only=True)
class Bidirectional(Layer):
    """Bidirectional: a recurrent layer and another that reads backwards, merged."""

    layer: Placed
    backward_layer: Placed
    merge_mode: str | None = "concat"
    nested: ClassVar[dict[str, str]] = {
        "layer": "forward_layer",
        "backward_layer": "backward_layer",
    }
    supports_masking: ClassVar[bool] = True

    @classmethod
    def complete(cls, config: Mapping[str, Any], keras_2: bool) -> Mapping[str, Any]:
        """Keras 2 writes the second layer only if it was given."""
        if config.get("backward_layer") is not None:
            return config
        forward = config["layer"]
        options = dict(forward["config"])
        options["go_backwards"] = not options.get("go_backwards", False)
        return {**config, "backward_layer": {**forward, "config": options}}

    def __post_init__(self) -> None:
        """Refuse option values that Keras does not define."""
        one_of("merge_mode", self.merge_mode, ("concat", "sum", "mul", "ave", None))
        for placed in (self.layer, self.backward_layer):
            if not isinstance(placed.layer, Recurrence):
                raise ValueError(f"layer={placed.class_name} (expected a recurrent layer)")

    def output_mask(self, masks: tuple[Any, ...], *inputs: Any) -> Any:
        """That of the inputs for a sequence of outputs."""
        assert isinstance(self.layer.layer, Recurrence)
        mask = first_mask(masks) if self.layer.layer.return_sequences else None
        return [mask, None if self.merge_mode else mask]

    def call(
        self, state: LayerState, x: Any, *, train: bool, initial_state: Any = None, mask: Any = None
    ) -> Any:
        """Outputs as `merge_mode` says, then the states of both if they are returned."""
        if mask is None and initial_state is None:
            mask = first_mask(state.masks)
        if isinstance(x, list | tuple):
            x, initial_state = x[0], list(x[1:]) or initial_state
        states: list[Any] = [None, None]
        if initial_state is not None:
            half = len(initial_state) // 2
            states = [list(initial_state[:half]), list(initial_state[half:])]
        found = [
            state.call(placed, x, train=train, masks=(mask,), initial_state=start, mask=mask)
            for placed, start in zip((self.layer, self.backward_layer), states, strict=True)
        ]
        layer = self.layer.layer
        assert isinstance(layer, Recurrence)
        rest: tuple[Any, ...] = ()
        if layer.return_state:
            rest = (*found[0][1:], *found[1][1:])
            found = [outputs[0] for outputs in found]
        y, reverse = found
        if layer.return_sequences:
            reverse = jnp.flip(reverse, axis=1)
        merged = self._merge(y, reverse)
        return (*merged, *rest) if len(merged) + len(rest) > 1 else merged[0]

    def _merge(self, y: jax.Array, reverse: jax.Array) -> tuple[jax.Array, ...]:
        if self.merge_mode is None:
            return y, reverse
        if self.merge_mode == "concat":
            return (jnp.concatenate([y, reverse], axis=-1),)
        if self.merge_mode == "mul":
            return (y * reverse,)
        total = y + reverse
        return (total / 2 if self.merge_mode == "ave" else total,)


def first_mask(masks: Any) -> Any:
    """The first mask of a nested structure, which stands for all inputs of a recurrent layer."""
    leaves = jax.tree.leaves(masks, is_leaf=lambda mask: mask is None)
    return leaves[0] if leaves else None


def from_cudnn(kernel: jax.Array, gates: int) -> jax.Array:
    """The kernels of the gates as matrices (in, units); cuDNN reads the same memory transposed."""
    rows = kernel.shape[0]
    parts = jnp.split(kernel, gates, axis=1)
    return jnp.concatenate([part.reshape(-1, rows).T for part in parts], axis=1)


def _is_stacked(states: list[Any]) -> bool:
    return isinstance(states[-1], list | tuple)


def _as_rank(mask: jax.Array, x: jax.Array) -> jax.Array:
    """A mask (batch,) or (batch, 1) so that it broadcasts against (batch, ...)."""
    return mask.reshape(mask.shape[0], *[1] * (x.ndim - 1))
