"""RNN, GRU and LSTM as scans over time, in one or both directions."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fastgpu.importers.onnx.operators.indexing import reverse_steps
from fastgpu.importers.onnx.operators.operator import one_of, operator

Activation = Callable[[jax.Array], jax.Array]
State = tuple[jax.Array, ...]

# Each with the defaults of alpha and beta, None where it has no such number.
_ACTIVATIONS: dict[str, tuple[Callable[..., jax.Array], float | None, float | None]] = {
    "relu": (lambda x: jax.nn.relu(x), None, None),
    "tanh": (lambda x: jnp.tanh(x), None, None),
    "sigmoid": (lambda x: jax.nn.sigmoid(x), None, None),
    "softsign": (lambda x: jax.nn.soft_sign(x), None, None),
    "softplus": (lambda x: jax.nn.softplus(x), None, None),
    "affine": (lambda x, a, b: a * x + b, 1.0, 0.0),
    "leakyrelu": (lambda x, a: jnp.where(x >= 0, x, a * x), 0.01, None),
    "thresholdedrelu": (lambda x, a: jnp.where(x > a, x, 0), 1.0, None),
    "scaledtanh": (lambda x, a, b: a * jnp.tanh(b * x), 1.0, 1.0),
    "hardsigmoid": (lambda x, a, b: jnp.clip(a * x + b, 0, 1), 0.2, 0.5),
    "elu": (lambda x, a: jax.nn.elu(x, a), 1.0, None),
}


class Cell(NamedTuple):
    """One direction: its weights, activations and first state."""

    w: jax.Array
    r: jax.Array
    b: jax.Array
    peepholes: jax.Array | None
    activations: tuple[Activation, ...]
    first: State


def _activations(
    names: Sequence[str], alphas: Sequence[float] | None, betas: Sequence[float] | None, clip: float
) -> Iterator[Activation]:
    """The functions in order; each takes the next alpha and beta if it has such numbers."""
    a, b = iter(alphas or ()), iter(betas or ())
    for name in names:
        one_of("activations", name.lower(), tuple(_ACTIVATIONS))
        function, alpha, beta = _ACTIVATIONS[name.lower()]
        numbers = [] if alpha is None else [next(a, alpha)]
        numbers += [] if beta is None else [next(b, beta)]
        yield partial(_clipped, function, tuple(numbers), clip)


def _clipped(
    function: Callable[..., jax.Array], numbers: tuple[float, ...], clip: float, x: jax.Array
) -> jax.Array:
    return function(jnp.clip(x, -clip, clip) if clip else x, *numbers)


def _run(
    step: Callable[[Cell, State, jax.Array], State],
    cell: Cell,
    x: jax.Array,
    lengths: jax.Array | None,
    reverse: bool,
) -> tuple[jax.Array, State]:
    """Outputs (time, batch, hidden) and last state; behind an example's end outputs are zero."""
    if reverse:
        x = jnp.flip(x, 0) if lengths is None else reverse_steps(x, lengths, 1, 0)

    def one(state: State, now: tuple[jax.Array, jax.Array]) -> tuple[State, jax.Array]:
        inputs, time = now
        new = step(cell, state, inputs)
        if lengths is None:
            return new, new[0]
        running = (time < lengths)[:, None]
        kept = tuple(jnp.where(running, a, b) for a, b in zip(new, state, strict=True))
        return kept, jnp.where(running, new[0], 0)

    last, y = jax.lax.scan(one, cell.first, (x, jnp.arange(x.shape[0])))
    if reverse:
        y = jnp.flip(y, 0) if lengths is None else reverse_steps(y, lengths, 1, 0)
    return y, last


def _recur(
    step: Callable[[Cell, State, jax.Array], State],
    gates: int,
    defaults: Sequence[str],
    x: jax.Array,
    w: jax.Array,
    r: jax.Array,
    b: jax.Array | None,
    lengths: jax.Array | None,
    initial: Sequence[jax.Array | None],
    options: dict[str, Any],
    peepholes: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """Every direction by itself; outputs in ONNX's order and layout."""
    one_of("direction", options["direction"], ("forward", "reverse", "bidirectional"))
    directions, hidden = r.shape[0], r.shape[2]
    if directions != 1 + (options["direction"] == "bidirectional"):
        raise ValueError(f"weights for {directions} directions, {options['direction']}")
    batch_first = bool(options["layout"])
    x = x.swapaxes(0, 1) if batch_first else x
    state = jnp.zeros((directions, x.shape[1], hidden), x.dtype)
    firsts = [state if h is None else (h.swapaxes(0, 1) if batch_first else h) for h in initial]
    bias = jnp.zeros((directions, 2 * gates * hidden), x.dtype) if b is None else b
    names = options["activations"] or list(defaults) * directions
    functions = list(
        _activations(
            names, options["activation_alpha"], options["activation_beta"], options["clip"]
        )
    )
    each = len(defaults)
    found = []
    for d in range(directions):
        cell = Cell(
            w[d],
            r[d],
            bias[d],
            None if peepholes is None else peepholes[d],
            tuple(functions[d * each : (d + 1) * each]),
            tuple(first[d] for first in firsts),
        )
        found.append(_run(step, cell, x, lengths, options["direction"] == "reverse" or d == 1))
    y = jnp.stack([y for y, _ in found], 1)
    last = [jnp.stack(parts) for parts in zip(*(state for _, state in found), strict=True)]
    if batch_first:
        return y.transpose(2, 0, 1, 3), *(part.swapaxes(0, 1) for part in last)
    return y, *last


def _rnn_step(cell: Cell, state: State, x: jax.Array) -> State:
    (h,), (wb, rb) = state, jnp.split(cell.b, 2)
    return (cell.activations[0](x @ cell.w.T + h @ cell.r.T + wb + rb),)


def _gru_step(linear_before_reset: bool, cell: Cell, state: State, x: jax.Array) -> State:
    (h,) = state
    f, g = cell.activations
    wb, rb = jnp.split(cell.b, 2)
    from_x = x @ cell.w.T + wb
    xz, xr, xh = jnp.split(from_x, 3, -1)
    rz, rr, rh = jnp.split(cell.r, 3)
    bz, br, bh = jnp.split(rb, 3)
    z, reset = f(xz + h @ rz.T + bz), f(xr + h @ rr.T + br)
    from_h = reset * (h @ rh.T + bh) if linear_before_reset else (reset * h) @ rh.T + bh
    return ((1 - z) * g(xh + from_h) + z * h,)


def _lstm_step(input_forget: bool, cell: Cell, state: State, x: jax.Array) -> State:
    h, c = state
    f, g, last = cell.activations
    wb, rb = jnp.split(cell.b, 2)
    i, o, forget, new = jnp.split(x @ cell.w.T + h @ cell.r.T + wb + rb, 4, -1)
    pi, po, pf = (0, 0, 0) if cell.peepholes is None else jnp.split(cell.peepholes, 3)
    i = f(i + pi * c)
    forget = 1 - i if input_forget else f(forget + pf * c)
    c = forget * c + i * g(new)
    return f(o + po * c) * last(c), c


@operator("RNN")
def rnn(
    x: jax.Array,
    w: jax.Array,
    r: jax.Array,
    b: jax.Array | None = None,
    sequence_lens: jax.Array | None = None,
    initial_h: jax.Array | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float = 0.0,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
) -> tuple[jax.Array, ...]:
    """The simple recurrent network."""
    options = {
        "activation_alpha": activation_alpha,
        "activation_beta": activation_beta,
        "activations": activations,
        "clip": clip,
        "direction": direction,
        "layout": layout,
    }
    return _recur(_rnn_step, 1, ["Tanh"], x, w, r, b, sequence_lens, [initial_h], options)


@operator("GRU")
def gru(
    x: jax.Array,
    w: jax.Array,
    r: jax.Array,
    b: jax.Array | None = None,
    sequence_lens: jax.Array | None = None,
    initial_h: jax.Array | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float = 0.0,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> tuple[jax.Array, ...]:
    """The gated recurrent unit, in both places that the reset gate can have."""
    options = {
        "activation_alpha": activation_alpha,
        "activation_beta": activation_beta,
        "activations": activations,
        "clip": clip,
        "direction": direction,
        "layout": layout,
    }
    step = partial(_gru_step, bool(linear_before_reset))
    names = ["Sigmoid", "Tanh"]
    return _recur(step, 3, names, x, w, r, b, sequence_lens, [initial_h], options)


@operator("LSTM")
def lstm(
    x: jax.Array,
    w: jax.Array,
    r: jax.Array,
    b: jax.Array | None = None,
    sequence_lens: jax.Array | None = None,
    initial_h: jax.Array | None = None,
    initial_c: jax.Array | None = None,
    p: jax.Array | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float = 0.0,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[jax.Array, ...]:
    """The long short-term memory, with peepholes and coupled gates where the file has them."""
    options = {
        "activation_alpha": activation_alpha,
        "activation_beta": activation_beta,
        "activations": activations,
        "clip": clip,
        "direction": direction,
        "layout": layout,
    }
    step = partial(_lstm_step, bool(input_forget))
    names, firsts = ["Sigmoid", "Tanh", "Tanh"], [initial_h, initial_c]
    return _recur(step, 4, names, x, w, r, b, sequence_lens, firsts, options, p)
