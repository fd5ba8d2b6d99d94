"""The training that `train`, `tune` and `benchmark` have in common: one loss, one optimizer."""

from typing import Any

import numpy as np
import optax

from fastgpu.errors import FastGPUError


def _adamw(learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, weight_decay=weight_decay)


def _sgd(learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(decay, optax.sgd(learning_rate, momentum=0.9, nesterov=True))


OPTIMIZERS = {"adamw": _adamw, "sgd": _sgd}


def make_optimizer(name: str, learning_rate: float, weight_decay: float) -> Any:
    """AdamW, or SGD with Nesterov momentum 0.9; raises `FastGPUError` for another name.

    Both numbers live in the optimizer's state, so that one compiled step serves every setting.

    >>> make_optimizer("adamw", 0.5, 1e-4).init({"w": np.zeros(2)}).hyperparams["learning_rate"]
    Array(0.5, dtype=float32)
    """
    if name not in OPTIMIZERS:
        raise FastGPUError(f"--optimizer {name}", expected=", ".join(OPTIMIZERS), got=name)
    return optax.inject_hyperparams(OPTIMIZERS[name])(
        learning_rate=learning_rate, weight_decay=weight_decay
    )


def split(data: dict[str, Any], fraction: float, seed: int) -> tuple[dict, dict]:
    """`data` in two at random: the rest, and `fraction` of it (at least one example) to validate.

    >>> train, held_out = split({"inputs": np.arange(10), "labels": np.arange(10)}, 0.2, seed=0)
    >>> len(train["labels"]), len(held_out["labels"])
    (8, 2)
    """
    count = len(data["labels"])
    order = np.random.default_rng(seed).permutation(count)
    cut = max(1, round(count * fraction))
    if cut >= count:
        raise FastGPUError(
            "the data is too small to hold examples back", expected="two or more", got=str(count)
        )
    return take(data, order[cut:]), take(data, order[:cut])


def take(data: dict[str, Any], rows: Any) -> dict[str, Any]:
    """The examples at `rows`.

    >>> take({"inputs": (np.arange(3), np.ones(3)), "labels": np.arange(3)}, [2])["inputs"][0]
    array([2])
    """
    inputs = data["inputs"]
    return {
        "inputs": tuple(a[rows] for a in inputs) if isinstance(inputs, tuple) else inputs[rows],
        "labels": data["labels"][rows],
    }
