"""What 8 bits of optimizer state do to training: bytes, errors of the updates, losses.

    python benchmarks/compressed_optimizer.py --json benchmarks/results/compressed_optimizer.json

About a minute on two cores. Adam trains a small convolutional network on scikit-learn's digits,
three seeds, with float32 state and with `compressed` state under both ways of rounding; Lion fits a
linear regression, full batches, in which its momentum changes slowly. The
update errors are taken along one float32 run of Adam: of one step, with the float32 moments encoded
and decoded once; and of all steps up to there, by a compressed Adam that gets the same gradients.
The last part asks how well Adam's second moment follows gradients whose sizes change.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import fastgpu as fgpu
from fastgpu.optimizers import Blockwise, compressed, dequantize, quantize
from fastgpu.training import ArrayBatches

SEEDS = (0, 1, 2)
EPOCHS, BATCH_SIZE = 10, 64
LEARNING_RATE = 1e-3
ADAM = optax.adam(LEARNING_RATE)
Rounding = Literal["dithered", "nearest"]
ROUNDINGS: tuple[Rounding, ...] = ("dithered", "nearest")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    fgpu.configure(device="cpu", cache=False, quiet=True)
    model = fgpu.models.create("convnet")
    train, test = digits()
    report = {
        "jax": jax.__version__,
        "epochs": EPOCHS,
        "seeds": list(SEEDS),
        "state_bytes": state_bytes(model, train),
        "digits": [row(model, train, test, storage, tx) for storage, tx in storages(ADAM).items()],
        "lion_regression_loss": {
            storage: lion_loss(tx) for storage, tx in storages(optax.lion(3e-3)).items()
        },
        "update_error": {rounding: update_error(model, train, rounding) for rounding in ROUNDINGS},
        "second_moment": {rounding: second_moment(rounding) for rounding in ROUNDINGS},
    }
    for part in ("state_bytes", "lion_regression_loss", "update_error", "second_moment"):
        print(part, json.dumps(report[part], indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def storages(tx: optax.GradientTransformation) -> dict[str, optax.GradientTransformation]:
    return {"float32": tx, **{r: compressed(tx, rounding=r) for r in ROUNDINGS}}


def digits() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    pixels, labels = load_digits(return_X_y=True)
    pixels, labels = np.asarray(pixels), np.asarray(labels)
    images = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[450:], order[:450]
    return (
        {"inputs": images[train], "labels": labels[train]},
        {"inputs": images[test], "labels": labels[test]},
    )


def fresh(model: Any, data: dict[str, np.ndarray], tx: Any, seed: int) -> fgpu.TrainState:
    variables = model.init(jax.random.key(seed), data["inputs"][:1])
    return fgpu.TrainState.create(variables, tx, rng=seed)


def batches(data: dict[str, np.ndarray], seed: int) -> Any:
    source = ArrayBatches(data, batch_size=BATCH_SIZE, seed=seed)
    for epoch in range(EPOCHS):
        yield from source.epoch(epoch)


def row(model: Any, train: Any, test: Any, storage: str, tx: Any) -> dict[str, Any]:
    step = fgpu.train_step(fgpu.supervised_loss(model), tx)
    losses, accuracies = [], []
    for seed in SEEDS:
        state = fresh(model, train, tx, seed)
        for batch in batches(train, seed):
            state, _ = step(state, batch)
        scores = fgpu.evaluate(step, state, test, batch_size=150)
        losses.append(round(float(scores["loss"]), 4))
        accuracies.append(round(float(scores["accuracy"]), 4))
    result = {
        "state": storage,
        "test_loss": losses,
        "mean_test_loss": round(statistics.mean(losses), 4),
        "test_accuracy": accuracies,
    }
    print(f"{storage:<10}loss {losses}  accuracy {accuracies}", flush=True)
    return result


def state_bytes(model: Any, data: Any) -> dict[str, int]:
    def size(tx: Any) -> int:
        leaves = jax.tree.leaves(fresh(model, data, tx, 0).opt_state)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    return {"float32": size(ADAM), "compressed": size(compressed(ADAM))}


def lion_loss(tx: optax.GradientTransformation, steps: int = 200) -> float:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 64))
    y = x @ rng.normal(size=(64, 64)) / 8 + 0.3 * rng.normal(size=(256, 64))

    def loss_fn(w: jax.Array) -> jax.Array:
        return ((jnp.asarray(x, jnp.float32) @ w - jnp.asarray(y, jnp.float32)) ** 2).mean()

    def step(carry: Any, _: None) -> tuple[Any, None]:
        w, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    w = jnp.zeros((64, 64))
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0])
    return round(float(loss_fn(run((w, tx.init(w)))[0])), 4)


def update_error(model: Any, data: Any, rounding: Rounding) -> dict[str, float]:
    """Of the updates of compressed Adam against float32 Adam's: the largest of a run's steps."""
    loss_fn = fgpu.supervised_loss(model)
    eight_bit = compressed(ADAM, rounding=rounding)

    def encoded_once(like: Any, exact: Any, step: jax.Array) -> Any:
        def encode(old: Any, new: Any) -> Any:
            if not isinstance(old, Blockwise):
                return new
            return dequantize(quantize(new, dither=step if rounding == "dithered" else None))

        return jax.tree.map(encode, like, exact, is_leaf=lambda node: isinstance(node, Blockwise))

    @jax.jit
    def step(state: fgpu.TrainState, own: Any, batch: Any) -> Any:
        rng = jax.random.fold_in(state.rng, state.step)
        gradient, _ = jax.grad(loss_fn, has_aux=True)(state.params, {}, batch, rng)
        once = encoded_once(own.inner_state, state.opt_state, state.step)
        exact, opt_state = ADAM.update(gradient, state.opt_state)
        one_step, _ = ADAM.update(gradient, once)
        all_steps, own = eight_bit.update(gradient, own)
        params = optax.apply_updates(state.params, exact)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, own, (difference(one_step, exact), difference(all_steps, exact))

    state = fresh(model, data, ADAM, 0)
    own, errors = eight_bit.init(state.params), []
    for batch in batches(data, 0):
        state, own, error = step(state, own, batch)
        errors.append(error)
    figures = np.asarray(errors)  # [steps, (one step, all steps), figures of `difference`]
    names = ("relative", "largest_error", "largest_excess")
    report = {}
    for part, of_part in zip(("one_step", "all_steps"), figures.swapaxes(0, 1), strict=True):
        report[f"{part}_relative_median"] = round(float(np.median(of_part[:, 0])), 4)
        for name, of_steps in zip(names, of_part.T, strict=True):
            report[f"{part}_{name}"] = round(float(of_steps.max()), 4)
    return report


def difference(updates: Any, exact: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Relative in the Euclidean norm; then of one parameter, in learning rates: the largest error,
    and the most by which an update is larger than the exact one."""
    got, want = (ravel_pytree(tree)[0] for tree in (updates, exact))
    error, excess = abs(got - want), abs(got) - abs(want)
    norm = jnp.linalg.norm
    return norm(error) / norm(want), error.max() / LEARNING_RATE, excess.max() / LEARNING_RATE


def second_moment(rounding: Rounding, size: int = 4096, steps: int = 2000) -> dict[str, float]:
    """sqrt(v) in 8 bits over sqrt(v) in float32, after gradients grew or shrank 3.3-fold."""
    rng = np.random.default_rng(0)
    before = 10 ** rng.uniform(-2, 0, size)
    sizes = jnp.asarray(np.stack([before, before * rng.choice([0.3, 1 / 0.3], size)]), jnp.float32)

    def run(tx: optax.GradientTransformation, read: Callable[[Any], jax.Array]) -> jax.Array:
        def step(state: Any, number: jax.Array) -> tuple[Any, None]:
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), number), (size,))
            return tx.update(noise * sizes[number // steps], state)[1], None

        run = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(2 * steps))[0])
        return jnp.sqrt(read(run(tx.init(jnp.zeros(size)))))

    tx = optax.scale_by_rms(decay=0.999)
    stored = run(compressed(tx, rounding=rounding), lambda state: dequantize(state.inner_state.nu))
    ratio = stored / run(tx, lambda state: state.nu)
    figures = {"mean": ratio.mean(), "std": ratio.std(), "min": ratio.min(), "max": ratio.max()}
    return {name: round(float(figure), 3) for name, figure in figures.items()}


if __name__ == "__main__":
    main()
