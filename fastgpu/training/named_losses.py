"""The optax losses by name: what labels each takes, and the errors when they do not fit."""

import difflib
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from fastgpu.errors import LossError
from fastgpu.training.leaves import leaf_type

# How the labels of each optax loss look beside outputs [batch, ..., classes]:
# "index": integers [batch, ...]; "same": the shape of the outputs.
LABELS: dict[str, Literal["index", "same"]] = {
    "softmax_cross_entropy_with_integer_labels": "index",
    "multiclass_hinge_loss": "index",
    "multiclass_perceptron_loss": "index",
    "multiclass_sparsemax_loss": "index",
    "softmax_cross_entropy": "same",
    "safe_softmax_cross_entropy": "same",
    "poly_loss_cross_entropy": "same",
    "kl_divergence": "same",
    "kl_divergence_with_log_targets": "same",
    "generalized_kl_divergence": "same",
    "cosine_distance": "same",
    "sigmoid_binary_cross_entropy": "same",
    "sigmoid_focal_loss": "same",
    "hinge_loss": "same",
    "perceptron_loss": "same",
    "sparsemax_loss": "same",
    "l2_loss": "same",
    "squared_error": "same",
    "huber_loss": "same",
    "log_cosh": "same",
    "dice_loss": "same",
    "binary_dice_loss": "same",
    "multiclass_generalized_dice_loss": "same",
}
BINARY = ("sigmoid_binary_cross_entropy", "sigmoid_focal_loss")
CLASSIFICATION = (
    *(name for name, labels in LABELS.items() if labels == "index"),
    "softmax_cross_entropy",
    "safe_softmax_cross_entropy",
    "poly_loss_cross_entropy",
    *BINARY,
)
_OTHER_LABELS = {
    "softmax_cross_entropy_with_integer_labels": "softmax_cross_entropy",
    "softmax_cross_entropy": "softmax_cross_entropy_with_integer_labels",
    "safe_softmax_cross_entropy": "softmax_cross_entropy_with_integer_labels",
    "poly_loss_cross_entropy": "softmax_cross_entropy_with_integer_labels",
}
_KERAS_NAMES = {
    "sparse_categorical_crossentropy": "softmax_cross_entropy_with_integer_labels",
    "categorical_crossentropy": "softmax_cross_entropy",
    "binary_crossentropy": "sigmoid_binary_cross_entropy",
    "mse": "squared_error",
    "mean_squared_error": "squared_error",
    "huber": "huber_loss",
    "logcosh": "log_cosh",
}


def matched(loss: str, outputs: Any, labels: Any) -> tuple[jax.Array, jax.Array]:
    """Outputs and labels in the shapes and dtypes that the optax loss takes.

    Labels [batch] beside outputs [batch, 1] (or the reverse) are reshaped: broadcast, they would
    silently give [batch, batch].
    """
    if not hasattr(outputs, "shape") or not hasattr(labels, "shape"):
        raise LossError(
            f"the loss {loss!r} takes one output and one array of labels",
            expected="a module with one output",
            got=f"outputs {jax.tree.map(leaf_type, outputs)}, "
            f"labels {jax.tree.map(leaf_type, labels)}",
            fix="pass loss=callable(outputs, labels) that says how they add up",
        )
    outputs = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
    labels = jnp.asarray(labels)
    shape = outputs.shape[:-1] if LABELS[loss] == "index" else outputs.shape
    if labels.shape in (shape[:-1], (*shape, 1)) and labels.size == math.prod(shape):
        labels = labels.reshape(shape)
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    if labels.shape != shape or (LABELS[loss] == "index" and not integers):
        kind = "integer" if LABELS[loss] == "index" else "float32"
        other = _OTHER_LABELS.get(loss)
        raise LossError(
            f"the labels do not fit the loss {loss!r}",
            expected=f"{kind}[{','.join(map(str, shape))}] for outputs {leaf_type(outputs)}",
            got=leaf_type(labels),
            fix=f"reshape or cast the labels{f', or use loss={other!r}' if other else ''}",
        )
    return outputs, labels if LABELS[loss] == "index" else labels.astype(outputs.dtype)


def unknown_loss(name: str) -> LossError:
    """The error for a name that is not in the table: Keras's name for one, or a slip."""
    keras_name = _KERAS_NAMES.get(name)
    near = [keras_name] if keras_name else difflib.get_close_matches(name, LABELS, n=3, cutoff=0.4)
    if hasattr(optax.losses, name):
        fix = "it takes more than outputs and labels: pass a callable(outputs, labels) around it"
    else:
        fix = f"did you mean {' or '.join(map(repr, near))}?" if near else "pass a callable"
    return LossError(
        f"no loss is called {name!r}",
        expected=f"a callable(outputs, labels), or one of {', '.join(LABELS)}",
        got=repr(name),
        fix=fix,
    )
