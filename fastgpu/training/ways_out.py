"""What would help when a training step does not fit, each way with the bytes it saves."""

from collections.abc import Callable
from typing import Any

import jax

from fastgpu.compile import Attempt, Gradient
from fastgpu.errors import FastGPUError
from fastgpu.hardware import show_bytes
from fastgpu.ir.analysis import aval_bytes
from fastgpu.optimizers import compressed
from fastgpu.training.microbatch import batch_examples, divisors, resized
from fastgpu.training.state import TrainState
from fastgpu.transforms.remat.shelves import INT8

# Devices over which a split is shown: those of one host, as most are built.
_HOST = 8


def ways_out(
    step: Any, state: TrainState, batch: Any, gradient: Gradient
) -> Callable[[Attempt, int], str]:
    """The `Search.ways_out` of a step, asked only if nothing fits.

    Batch: the model's temporaries without a budget at half of the microbatch, against those at
    the whole, say what part scales with it. Optimizer: the state's bytes as its `init` makes it.
    """

    def text(least: Attempt, budget: int) -> str:
        ways = [
            *_smaller_batch(step, state, batch, gradient, least, budget),
            *_compressed_residuals(step, least),
            *_compressed_state(step, state),
            f"split state and batch with fastgpu.shard_fsdp: over {_HOST} devices, up to "
            f"{show_bytes(least.peak * (1 - 1 / _HOST))} less on each",
        ]
        return "; or ".join(ways)

    return text


def _smaller_batch(
    step: Any, state: TrainState, batch: Any, gradient: Gradient, least: Attempt, budget: int
) -> list[str]:
    examples, count = batch_examples(batch), least.accumulate_steps
    factors = [d for d in divisors(examples // count) if d > 1]
    if not factors:
        return [
            "take a smaller batch: it holds "
            f"{show_bytes(_bytes(batch))} besides the microbatches of one example"
        ]
    factor = factors[0]
    scaling = _part_that_scales(step, state, batch, gradient, examples // count // factor)
    saved = least.memory.temp_bytes * scaling
    with_batch = saved + _bytes(batch) * (1 - 1 / factor)
    smaller = (
        f"take a batch of {examples // factor} instead of {examples}: about "
        f"{show_bytes(with_batch)} less by the model (fastgpu.max_batch finds the largest that "
        f"fits {show_bytes(budget)})"
    )
    added = 0 if count > 1 else _bytes(state.params)
    if step.accumulate_steps == "auto" or saved <= added:
        return [smaller]
    return [
        smaller,
        f"pass accumulate_steps={count * factor}: the same gradients from microbatches, about "
        f"{show_bytes(saved - added)} less (accumulate_steps='auto' finds the number)",
    ]


def _part_that_scales(
    step: Any, state: TrainState, batch: Any, gradient: Gradient, examples: int
) -> float:
    """The part of the temporaries that a microbatch of only `examples` would save."""
    whole = gradient.planner.unconstrained.peak
    rng = jax.eval_shape(jax.random.fold_in, state.rng, 0)

    def loss_of(params: Any, rest: Any) -> Any:
        return step.loss_fn(params, *rest)

    rest = (state.model_state, resized(batch, examples), rng)
    small = Gradient(
        loss_of,
        state.params,
        rest,
        gradient.target,
        step.passes,
        step.compress,
        step.precision,
    )
    return max(0.0, 1 - small.planner.unconstrained.peak / whole) if whole else 0.0


def _compressed_residuals(step: Any, least: Attempt) -> list[str]:
    decision = least.modelled.decision
    if step.compress is not None or decision is None:
        return []
    packed = [v.aval for v in decision.saved if INT8.takes(v.aval)]
    saved = sum(aval_bytes(aval) - INT8.device_bytes(aval) for aval in packed)
    return [
        "let what is kept for the backward half wait in 8 bits with compress='int8' (gradients "
        f"then differ a little): up to {show_bytes(saved)} less"
    ]


def _compressed_state(step: Any, state: TrainState) -> list[str]:
    try:
        small = jax.eval_shape(compressed(step.optimizer).init, state.params)
    except FastGPUError:  # it is compressed already
        return []
    saved = _bytes(state.opt_state) - _bytes(small)
    if saved < 0.01 * _bytes(state.opt_state):
        return []
    return [
        "keep the optimizer state in 8 bits with fastgpu.optimizers.compressed: "
        f"{show_bytes(saved)} less"
    ]


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
