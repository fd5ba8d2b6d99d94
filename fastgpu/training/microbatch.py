"""Gradient accumulation: a batch in microbatches, one after the other, for the whole batch's step.

Microbatch i of k holds the examples i, i + k, i + 2k, ...: a batch that is split over devices stays
where it is. The gradients are a weighted mean, the weight of a microbatch being the sum of its
`batch["weights"]` where the batch has that key (as `supervised_loss` weighs), else its number of
examples. `optax.microbatch` cuts alike, but hands no state from one microbatch to the next.

The one warning: what a loss computes *across* the examples of a batch, such as the statistics of
batch normalization, it computes across a microbatch.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.errors import BatchError, ConfigurationError, LossError
from fastgpu.training.leaves import leaf_type
from fastgpu.training.state import strong

# (params, model_state, batch, rng) -> ((loss, (model_state, metrics)), gradients)
ValueAndGradOfBatch = Callable[..., tuple[tuple[jax.Array, tuple[Any, dict[str, Any]]], Any]]


def accumulated(
    value_and_grad: ValueAndGradOfBatch, loss_fn: Callable[..., Any], steps: int
) -> ValueAndGradOfBatch:
    """`value_and_grad` of a batch, computed from `steps` microbatches in a `lax.scan`.

    Loss, gradients and metrics are those of `loss_fn` on the whole batch, if it is a mean over
    examples and they do not see each other. `model_state` goes through the microbatches in turn.
    Each has a random key of its own: the batch's folded with its number. Sums are in float32 at
    least. Floating-point metrics are averaged as the loss is, integers are counts and add up, and
    values per example are put together in the batch's order.

    Raises `BatchError` when the batch cannot be cut, `LossError` for a metric of another kind.

    >>> def mean_of_squares(w, state, batch, rng):
    ...     return jnp.mean((w * batch["x"]) ** 2), (state, {})
    >>> whole = jax.value_and_grad(mean_of_squares, has_aux=True)
    >>> batch, rng = {"x": jnp.arange(8.0)}, jax.random.key(0)
    >>> whole(1.0, {}, batch, rng)[1]
    Array(35., dtype=float32, weak_type=True)
    >>> accumulated(whole, mean_of_squares, 4)(jnp.ones(()), {}, batch, rng)[1]
    Array(35., dtype=float32)
    """
    if steps == 1:
        return value_and_grad

    def of_microbatches(params: Any, model_state: Any, batch: Any, rng: jax.Array) -> Any:
        examples = require_divisible(batch, steps)
        shares = _shares(batch, steps)
        # Only shapes: which metrics have a value per example.
        metrics_of_batch = jax.eval_shape(loss_fn, params, model_state, batch, rng)[1][1]

        def one(carry: tuple[Any, Any], index: jax.Array) -> tuple[tuple[Any, Any], Any]:
            sums, model_state = carry
            part = jax.tree.map(lambda leaf: _part(leaf, index, steps), batch)
            (loss, (model_state, metrics)), grads = value_and_grad(
                params, model_state, part, jax.random.fold_in(rng, index)
            )
            share = shares[index]
            sums = jax.tree.map(
                lambda s, g: s + g.astype(s.dtype) * share.astype(s.dtype), sums, grads
            )
            return (sums, strong(model_state)), (loss, metrics)

        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_summed_in(p.dtype)), params)
        (sums, model_state), (losses, parts) = jax.lax.scan(
            one, (zeros, model_state), jnp.arange(steps)
        )
        grads = jax.tree.map(lambda s, p: s.astype(p.dtype), sums, params)
        metrics = {
            name: _merged(name, parts[name], shares, whole.shape, examples)
            for name, whole in metrics_of_batch.items()
        }
        return (_mean(losses, shares), (model_state, metrics)), grads

    return of_microbatches


def check_accumulate_steps(steps: Any) -> None:
    """Raise `ConfigurationError` unless `steps` is "auto" or a positive integer."""
    is_count = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1
    if not is_count and steps != "auto":
        raise ConfigurationError(
            f"accumulate_steps={steps!r} is no number of microbatches",
            expected="an integer of at least 1, or 'auto'",
            got=repr(steps),
        )


def check_global_batch(examples: Any, steps: int | Literal["auto"]) -> None:
    """Raise `ConfigurationError` unless `examples` is a positive multiple of `steps`."""
    of = 1 if steps == "auto" else steps
    is_count = isinstance(examples, int) and not isinstance(examples, bool) and examples >= 1
    if not is_count or examples % of:
        raise ConfigurationError(
            f"global_batch={examples!r} is no number of examples that a step can take",
            expected=f"a positive multiple of accumulate_steps={steps}",
            got=repr(examples),
        )


def batch_examples(batch: Any) -> int:
    """The length that all leaves of a batch have along axis 0.

    Raises `BatchError` naming the leaf that has none or another one.

    >>> batch_examples({"inputs": np.zeros((8, 3)), "labels": np.zeros(8)})
    8
    """
    first = None
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        shape = np.shape(leaf)
        if not shape or shape[0] < 1 or (first is not None and shape[0] != first):
            raise BatchError(
                f"batch{jax.tree_util.keystr(path)} does not hold one entry per example",
                expected=f"a first axis of {first or 'at least 1'}, as long as that of every leaf",
                got=leaf_type(leaf),
                fix="give every leaf of the batch the examples as its first axis",
            )
        first = shape[0]
    if first is None:
        raise BatchError("the batch is empty", expected="at least one array", got="no leaves")
    return first


def require_divisible(batch: Any, steps: int) -> int:
    """The number of examples; raises `BatchError` unless `steps` divides it."""
    examples = batch_examples(batch)
    if examples % steps:
        counts = [count for count in divisors(examples) if count <= steps]
        raise BatchError(
            f"a batch of {examples} examples cannot be cut into {steps} equal microbatches",
            expected=f"a multiple of accumulate_steps={steps} examples",
            got=str(examples),
            fix=f"pass accumulate_steps={counts[-1]}, or a batch of "
            f"{max(1, examples // steps) * steps} examples, or accumulate_steps='auto'",
        )
    return examples


def require_global_batch(batch: Any, examples: int) -> None:
    """Raise `BatchError` unless the batch has `examples` examples."""
    got = batch_examples(batch)
    if got != examples:
        raise BatchError(
            f"the batch has {got} examples, but the step was made for {examples}",
            expected=f"global_batch={examples} examples, those of all devices and hosts together",
            got=str(got),
            fix="change the batch size of the data, or global_batch of train_step",
        )


def resized(batch: Any, examples: int) -> Any:
    """The shapes of `batch` with `examples` examples; structs keep their sharding.

    >>> resized({"x": jax.ShapeDtypeStruct((8, 3), jnp.float32)}, 2)["x"].shape
    (2, 3)
    """
    batch_examples(batch)

    def with_examples(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = (examples, *np.shape(leaf)[1:])
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(shape=shape)
        return jax.ShapeDtypeStruct(shape, jax.typeof(leaf).dtype)

    return jax.tree.map(with_examples, batch)


def first_axis_split(leaf: jax.ShapeDtypeStruct) -> int:
    """Into how many parts the first axis of a struct is split over devices.

    >>> first_axis_split(jax.ShapeDtypeStruct((8, 3), jnp.float32))
    1
    """
    if leaf.sharding is None:
        return 1
    return leaf.shape[0] // leaf.sharding.shard_shape(leaf.shape)[0]


def divisors(count: int) -> list[int]:
    """All divisors, ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [d for d in range(1, int(count**0.5) + 1) if count % d == 0]
    return sorted({*small, *(count // d for d in small)})


def _part(leaf: Any, index: jax.Array, steps: int) -> jax.Array:
    leaf = jnp.asarray(leaf)
    rows = leaf.reshape(leaf.shape[0] // steps, steps, *leaf.shape[1:])
    return jax.lax.dynamic_index_in_dim(rows, index, axis=1, keepdims=False)


def _shares(batch: Any, steps: int) -> jax.Array:
    """The part of the whole batch's weight that each microbatch has [steps]; they sum to 1."""
    equal = jnp.full(steps, 1 / steps)
    weights = batch.get("weights") if isinstance(batch, Mapping) else None
    if weights is None:
        return equal
    weights = jnp.asarray(weights)
    weights = weights.astype(_summed_in(weights.dtype))
    totals = jnp.sum(weights.reshape(weights.shape[0] // steps, steps, -1), axis=(0, 2))
    total = jnp.sum(totals)
    # Where nothing weighs, `weighted_mean` is 0 in each microbatch as in the whole batch.
    return jnp.where(total == 0, equal, totals / jnp.where(total == 0, 1, total))


def _summed_in(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _mean(parts: jax.Array, shares: jax.Array) -> jax.Array:
    summed_in = _summed_in(parts.dtype)
    shares = shares.astype(summed_in).reshape(-1, *[1] * (parts.ndim - 1))
    return jnp.sum(parts.astype(summed_in) * shares, axis=0).astype(parts.dtype)


def _merged(
    name: str, parts: jax.Array, shares: jax.Array, shape: tuple[int, ...], examples: int
) -> jax.Array:
    """A metric of the whole batch, whose shape is `shape`, from its `parts` [steps, ...]."""
    steps = parts.shape[0]
    if parts.shape[1:] == shape:
        if jnp.issubdtype(parts.dtype, jnp.inexact):
            return _mean(parts, shares)
        if jnp.issubdtype(parts.dtype, jnp.integer):
            return jnp.sum(parts, axis=0, dtype=parts.dtype)
    elif shape[:1] == (examples,) and parts.shape[1:] == (examples // steps, *shape[1:]):
        return jnp.moveaxis(parts, 0, 1).reshape(shape)
    raise LossError(
        f"the metric {name!r} cannot be put together from microbatches",
        expected="floating-point values (averaged), integers (added up), or one value per example",
        got=f"{parts.dtype}{list(parts.shape[1:])} of a microbatch, {list(shape)} of the batch",
        fix="return it in one of these forms, or leave it out of the step's metrics",
    )
