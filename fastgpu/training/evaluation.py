"""`evaluate` and `predict`: every example counts exactly once, in inference mode.

The last partial batch is padded and the padding weighs nothing, so one program runs for all.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.errors import BatchError, LossError
from fastgpu.training.data import batch_length, batches_of, padded, prefetch
from fastgpu.training.leaves import leaf_type
from fastgpu.training.losses import SupervisedLoss, apply_inference, weighted_sum
from fastgpu.training.step import TrainStep, require_alive
from fastgpu.transforms import Policy, Precision, optimize, policy_of

ExampleFn = Callable[..., Any]  # (variables, batch) -> {name: values}


def evaluate(
    loss: Any,
    state: Any,
    data: Any,
    *,
    batch_size: int | None = None,
    passes: Any = "default",
    target: Any = None,
    precision: Precision = None,
) -> dict[str, float]:
    """The mean loss and metrics over `data`, weighted by `batch["weights"]` where given.

    Args:
      loss: a `supervised_loss`, a `train_step` made of one, or a callable
        `(variables, batch) -> {"name": values [batch, ...]}`. A value that is a scalar counts as
        the mean of its batch.
      state: a `TrainState`, or variables.
      data: a dict of arrays (then `batch_size` is needed), an iterable of batches, or a callable
        that is given 0 and returns one.
      passes, target: handed to `fastgpu.optimize`.
      precision: as there; `None` is that of the step, if one is given.

    Raises `LossError` if `loss` is none of these, `BatchError` if the data cannot be read.

    >>> import flax.linen as nn
    >>> from fastgpu.training.losses import supervised_loss
    >>> module = nn.Dense(2, kernel_init=nn.initializers.zeros)
    >>> variables = module.init(jax.random.key(0), jnp.ones((1, 4)))
    >>> data = {"inputs": np.ones((5, 4), np.float32), "labels": np.array([0, 0, 1, 1, 1])}
    >>> evaluate(supervised_loss(module), variables, data, batch_size=2)
    {'accuracy': 0.4..., 'loss': 0.693147...}
    """
    examples = example_fn(loss)
    variables = _variables(state)
    batches = batches_of(data, batch_size, shuffle=False, drop_remainder=False)
    one = next(iter(padded(batches.epoch(0), pad=False)), None)
    if one is None:
        raise _nothing_to("evaluate")
    shapes = jax.eval_shape(examples, variables, one[0])
    # A mean over a padded batch would count the padding.
    pad = all(value.ndim > 0 for value in shapes.values())
    policy = _policy(loss, precision)
    loss_fn = _ById(getattr(loss, "loss_fn", loss))
    sums = _compiled_sums(loss_fn, _ById(passes), _ById(target), policy)
    parts = [
        sums(variables, batch)
        for batch in prefetch(batch for batch, _ in padded(batches.epoch(0), pad=pad))
    ]
    totals = jax.tree.map(lambda *values: np.sum(values, dtype=np.float64), *jax.device_get(parts))
    return {name: float(total / weight) for name, (total, weight) in totals.items()}


def predict(
    model: Any,
    state: Any,
    inputs: Any,
    *,
    batch_size: int = 128,
    passes: Any = "default",
    target: Any = None,
    precision: Precision = None,
) -> Any:
    """The module's outputs for all `inputs`, in order, as NumPy arrays [examples, ...].

    Args:
      model: a Flax module, a `supervised_loss`, or a `train_step` made of one.
      state: a `TrainState`, or variables.
      inputs: an array [examples, ...], a tuple of them for several inputs, a dict of arrays with
        the key "inputs" (other keys are not used), or an iterable of batches with that key.
      batch_size: of the batches that arrays are cut into.
      passes, target: handed to `fastgpu.optimize`.
      precision: as there; `None` is that of the step, if one is given.

    >>> import flax.linen as nn
    >>> module = nn.Dense(2, kernel_init=nn.initializers.ones)
    >>> variables = module.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> predict(module, variables, np.ones((3, 3), np.float32), batch_size=2)
    array([[3., 3.], [3., 3.], [3., 3.]], dtype=float32)
    """
    policy = _policy(model, precision)
    forward = _compiled_forward(_ById(_module(model)), _ById(passes), _ById(target), policy)
    data, size = _input_data(inputs, batch_size)
    batches = batches_of(data, size, shuffle=False, drop_remainder=False)
    variables = _variables(state)
    parts = []
    for batch, count in padded({"inputs": b["inputs"]} for b in batches.epoch(0)):
        outputs = forward(variables, next(prefetch([batch["inputs"]])))
        parts.append(jax.tree.map(lambda leaf, count=count: np.asarray(leaf)[:count], outputs))
    if not parts:
        raise _nothing_to("predict")
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def example_fn(loss: Any) -> ExampleFn:
    """The function `(variables, batch) -> {"name": values}` behind what `evaluate` is given."""
    of_step = hasattr(loss, "loss_fn")
    loss = getattr(loss, "loss_fn", loss)
    if isinstance(loss, SupervisedLoss):
        return loss.examples
    if of_step or not callable(loss):
        raise LossError(
            "this cannot be evaluated",
            expected="a supervised_loss, or a callable (variables, batch) -> {'name': values}",
            got="a step made of another kind of function" if of_step else leaf_type(loss),
            fix="pass such a callable (to fit: as eval_loss)",
        )
    return loss


class _ById:
    """Any object as a key, so that what was compiled for it is found again."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.value is other.value


@functools.lru_cache(maxsize=16)
def _compiled_sums(
    loss: _ById, passes: _ById, target: _ById, precision: Policy
) -> Callable[..., Any]:
    examples = optimize(example_fn(loss.value), passes.value, target.value, precision)

    def sums(variables: Any, batch: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        count = batch_length(batch)
        weights = batch.get("weights", jnp.ones(count))
        return {
            name: weighted_sum(values, weights, name)
            if values.ndim
            else (values * count, jnp.asarray(count, jnp.float32))
            for name, values in examples(variables, batch).items()
        }

    return jax.jit(sums)


@functools.lru_cache(maxsize=16)
def _compiled_forward(
    module: _ById, passes: _ById, target: _ById, precision: Policy
) -> Callable[..., Any]:
    def forward(variables: Any, inputs: Any) -> Any:
        return apply_inference(module.value, variables, inputs)

    return jax.jit(optimize(forward, passes.value, target.value, precision))


def _policy(model: Any, precision: Precision) -> Policy:
    """A scope of the loss may be missing where only outputs or metrics are computed."""
    if precision is None and isinstance(model, TrainStep):
        precision = model.precision
    return dataclasses.replace(policy_of(precision), strict=False)


def _module(model: Any) -> Any:
    loss = getattr(model, "loss_fn", model)
    module = loss.module if isinstance(loss, SupervisedLoss) else loss
    if not hasattr(module, "apply"):
        raise LossError(
            "this cannot predict",
            expected="a module with `apply`, or a supervised_loss or train_step made of one",
            got=type(model).__name__,
            fix="call the function that you trained directly",
        )
    return module


def _variables(state: Any) -> Mapping[str, Any]:
    if isinstance(state, Mapping):
        return state
    require_alive("state", state.step)
    return state.variables


def _input_data(inputs: Any, batch_size: int) -> tuple[Any, int | None]:
    if isinstance(inputs, Mapping):
        return {"inputs": inputs["inputs"]}, batch_size
    is_batches = isinstance(inputs, list) and all(isinstance(item, Mapping) for item in inputs)
    if hasattr(inputs, "shape") or (isinstance(inputs, tuple | list) and not is_batches):
        return {"inputs": inputs}, batch_size
    return inputs, None


def _nothing_to(verb: str) -> BatchError:
    return BatchError(
        f"there is nothing to {verb}",
        expected="at least one example",
        got="no batches",
        fix="check the data; an iterator can be read only once",
    )
