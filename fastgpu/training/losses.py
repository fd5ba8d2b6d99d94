"""`supervised_loss`: from a module that predicts to the loss function that a step differentiates.

A batch is `{"inputs": x, "labels": y}`, optionally with "weights" [batch] (or [batch, ...], as far
as the loss has those axes): loss and metrics are then weighted means, sum(w·v) / sum(w), so that
an example of weight 0 counts nowhere.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fastgpu import ir
from fastgpu.errors import BatchError, LossError
from fastgpu.training.leaves import leaf_type
from fastgpu.training.named_losses import BINARY, CLASSIFICATION, LABELS, matched, unknown_loss
from fastgpu.training.probabilities import FROM_PROBABILITIES, ends_in
from fastgpu.training.scores import METRICS, binary_accuracy, binary_accuracy_of_probabilities

Values = Callable[[Any, Any], jax.Array]


def supervised_loss(
    module: Any,
    loss: str | Values = "softmax_cross_entropy_with_integer_labels",
    *,
    metrics: Mapping[str, Values] | Iterable[str] | None = None,
    from_logits: bool | None = None,
) -> "SupervisedLoss":
    """A loss function `(params, model_state, batch, rng) -> (loss, (model_state, metrics))`.

    Args:
      module: a Flax module, or anything with its `apply`: those of `from_keras` and `from_nnx`
        too. A keyword `train` (or `training`, or the inverse `deterministic`) is passed if
        `__call__` has it. Collections besides "params" are updated in training; dropout draws from
        the collection "dropout".
      loss: the name of an optax loss, or a callable `(outputs, labels)` that gives one value per
        example [batch, ...] or a scalar. The result is their mean. Named losses are computed in
        float32 at least, for modules with one output.
      metrics: `{name: callable(outputs, labels)}` as for `loss`, or names out of "accuracy",
        "top_5_accuracy", "mean_absolute_error". By default "accuracy" if the loss classifies.
      from_logits: whether outputs are logits (True) or probabilities (False: Keras's clipped
        formulas). By default the module's program decides: if its last operation is a softmax
        or a sigmoid, they are probabilities.

    `batch["inputs"]` is passed to the module: a tuple or list as positional arguments, anything
    else (an array, a dict) as one.

    Raises `LossError` for an unknown name at once, and for labels that do not fit the outputs when
    a batch comes; `BatchError` for a batch without "inputs" and "labels".

    >>> import flax.linen as nn
    >>> module = nn.Dense(3, kernel_init=nn.initializers.zeros)
    >>> variables = module.init(jax.random.key(0), jnp.ones((1, 4)))
    >>> batch = {"inputs": jnp.ones((2, 4)), "labels": jnp.array([0, 1])}
    >>> loss_fn = supervised_loss(module)
    >>> loss_fn(variables["params"], {}, batch, jax.random.key(0))
    (Array(1.0986123, dtype=float32), ({}, {'accuracy': Array(0.5, dtype=float32)}))
    """
    if isinstance(loss, str) and loss not in LABELS:
        raise unknown_loss(loss)
    if from_logits is False and loss not in FROM_PROBABILITIES:
        raise LossError(
            f"from_logits=False has no meaning for loss={loss!r}",
            expected=f"one of {', '.join(FROM_PROBABILITIES)}",
            got=repr(loss),
            fix="leave from_logits out, or pass a callable that takes probabilities",
        )
    return SupervisedLoss(module, loss, _metrics(loss, metrics), from_logits)


class SupervisedLoss:
    """What `supervised_loss` returns: the training loss, and the same values for evaluation."""

    def __init__(
        self,
        module: Any,
        loss: str | Values,
        metrics: Mapping[str, Values],
        from_logits: bool | None,
    ) -> None:
        self.module, self.loss, self.metrics = module, loss, metrics
        self.from_logits = from_logits

    def __call__(
        self, params: Any, model_state: Any, batch: Mapping[str, Any], rng: jax.Array
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        """The mean loss of a batch in training mode."""
        inputs, labels, weights = _parts(batch)

        def forward(params: Any, model_state: Any, inputs: Any, rng: jax.Array) -> tuple[Any, Any]:
            outputs, updates = self.module.apply(
                {"params": params, **model_state},
                *_positional(inputs),
                mutable=list(model_state),
                rngs={"dropout": rng},
                **_mode(self.module, train=True),
            )
            return outputs, {**model_state, **updates}

        (outputs, new_model_state), probabilities = self._run(
            forward, params, model_state, inputs, rng
        )
        values = self._values(outputs, labels, probabilities)
        means = {name: weighted_mean(value, weights, name) for name, value in values.items()}
        return means.pop("loss"), (new_model_state, means)

    def examples(self, variables: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
        """Loss and metrics in inference mode, unreduced: {"loss": [batch, ...], ...}."""
        inputs, labels, _ = _parts(batch)
        outputs, probabilities = self._run(self.outputs, variables, inputs)
        return self._values(outputs, labels, probabilities)

    def outputs(self, variables: Mapping[str, Any], inputs: Any) -> Any:
        """What the module gives for `inputs` in inference mode."""
        return apply_inference(self.module, variables, inputs)

    def _run(self, forward: Callable[..., Any], *args: Any) -> tuple[Any, bool]:
        """The result of `forward`, and whether the outputs (its first leaf) are probabilities."""
        decided = self.from_logits is not None
        if decided or not isinstance(self.loss, str) or self.loss not in FROM_PROBABILITIES:
            return forward(*args), self.from_logits is False
        traced = ir.trace(forward, *args)
        return traced.as_fun()(*args), ends_in(traced) is not None

    def _values(self, outputs: Any, labels: Any, probabilities: bool) -> dict[str, jax.Array]:
        loss = self.loss
        if isinstance(loss, str):
            outputs, labels = matched(loss, outputs, labels)
            loss = FROM_PROBABILITIES[loss] if probabilities else getattr(optax.losses, loss)
        metrics = dict(self.metrics)
        if probabilities and metrics.get("accuracy") is binary_accuracy:
            metrics["accuracy"] = binary_accuracy_of_probabilities
        return {name: fn(outputs, labels) for name, fn in [*metrics.items(), ("loss", loss)]}


def apply_inference(module: Any, variables: Mapping[str, Any], inputs: Any) -> Any:
    """`module.apply` in inference mode, with `inputs` as in `batch["inputs"]`."""
    return module.apply(variables, *_positional(inputs), **_mode(module, train=False))


def weighted_mean(values: jax.Array, weights: jax.Array | None, name: str = "loss") -> jax.Array:
    """The mean of `values` [batch, ...], weighted by `weights` [batch, ...] of no more axes.

    Axes that `weights` lacks are averaged first. If all weights are 0 the result is 0.

    >>> weighted_mean(jnp.array([[1.0, 3.0], [5.0, 7.0]]), jnp.array([1.0, 0.0]))
    Array(2., dtype=float32)
    """
    if weights is None:
        return jnp.mean(values)
    total, weight = weighted_sum(values, weights, name)
    return total / jnp.where(weight == 0, 1, weight)


def weighted_sum(
    values: jax.Array, weights: jax.Array, name: str = "loss"
) -> tuple[jax.Array, jax.Array]:
    """The sum of `values * weights` and of `weights`; see `weighted_mean`."""
    if values.shape[: weights.ndim] != weights.shape:
        raise LossError(
            f"the weights do not fit the values of {name!r}",
            expected=f"weights of the leading axes of {leaf_type(values)}",
            got=leaf_type(weights),
            fix="give one weight per example, and let the loss return one value per example",
        )
    weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    values = jnp.mean(values, axis=tuple(range(weights.ndim, values.ndim)))
    return jnp.sum(values * weights), jnp.sum(weights)


def _metrics(
    loss: str | Values, metrics: Mapping[str, Values] | Iterable[str] | None
) -> dict[str, Values]:
    if isinstance(metrics, Mapping):
        return dict(metrics)
    if metrics is None:
        metrics = ("accuracy",) if loss in CLASSIFICATION else ()
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise LossError(
            f"unknown metric {unknown[0]!r}",
            expected=f"names out of {', '.join(METRICS)}",
            fix="pass metrics={name: callable(outputs, labels)}",
        )
    named = {name: METRICS[name] for name in metrics}
    if loss in BINARY and "accuracy" in named:
        named["accuracy"] = binary_accuracy
    return named


def _parts(batch: Any) -> tuple[Any, Any, jax.Array | None]:
    if not isinstance(batch, Mapping) or not {"inputs", "labels"} <= set(batch):
        raise BatchError(
            "the batch lacks a key that supervised_loss reads",
            expected="{'inputs': ..., 'labels': ...} and optionally 'weights'",
            got=f"the keys {list(batch)}" if isinstance(batch, Mapping) else leaf_type(batch),
            fix="name the arrays so, or write a loss function of your own",
        )
    weights = batch.get("weights")
    return batch["inputs"], batch["labels"], None if weights is None else jnp.asarray(weights)


def _positional(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def _mode(module: Any, train: bool) -> dict[str, bool]:
    """The keyword that tells `module` whether it is trained; none if it has no such keyword."""
    call = module.__call__ if callable(module) else module.apply
    names = inspect.signature(call).parameters
    for name, value in (("train", train), ("training", train), ("deterministic", not train)):
        if name in names:
            return {name: value}
    return {}
