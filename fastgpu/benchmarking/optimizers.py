"""Optimizers that Keras and optax both have, with the constants of Keras."""

import optax

from fastgpu.errors import FastGPUError

NAMES = ("sgd", "momentum", "adam")


def optax_optimizer(name: str, learning_rate: float) -> optax.GradientTransformation:
    """The optax optimizer that does what `keras.optimizers` does under the same settings.

    "sgd", "momentum" (SGD with momentum 0.9) or "adam" (epsilon 1e-7, which Keras adds before it
    corrects the bias of the second moment, and optax after: equal once that bias has decayed).

    >>> tx = optax_optimizer("sgd", 0.1)
    >>> tx.update(1.0, tx.init(1.0))[0]
    -0.1
    >>> optax_optimizer("lion", 0.1)
    Traceback (most recent call last):
    ...
    fastgpu.errors.FastGPUError: the optimizer 'lion' has no equal in Keras and optax here
    """
    if name == "sgd":
        return optax.sgd(learning_rate)
    if name == "momentum":
        return optax.sgd(learning_rate, momentum=0.9)
    if name == "adam":
        return optax.adam(learning_rate, eps=1e-7)
    raise FastGPUError(
        f"the optimizer {name!r} has no equal in Keras and optax here", expected=", ".join(NAMES)
    )
