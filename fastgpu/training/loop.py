"""`fit`: straight-line code around a step, short enough to copy and change.

Every number it logs is fetched once per interval; between them no step waits for the host. The
state that goes in is donated. With a `run_dir`, a run that was killed goes on from its last
checkpoint and ends with the same bits as one that was not.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from fastgpu.errors import BatchError
from fastgpu.training.data import batches_of, prefetch
from fastgpu.training.evaluation import evaluate, example_fn
from fastgpu.training.interrupt import Interrupt
from fastgpu.training.metrics import Row
from fastgpu.training.record import Record, restored
from fastgpu.training.step import require_alive


class FitResult(NamedTuple):
    """What `fit` returns: the trained state, and every row that was logged."""

    state: Any
    history: list[Row]


def fit(
    step: Callable[[Any, Any], tuple[Any, dict[str, Any]]],
    state: Any,
    data: Any,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    eval_data: Any = None,
    eval_loss: Any = None,
    eval_every: int | None = None,
    eval_batch_size: int | None = None,
    run_dir: str | Path | None = None,
    resume: Literal["auto", "never"] = "auto",
    checkpoint_every: int | None = None,
    keep: int = 3,
    log_every: int = 50,
    progress: bool = True,
    on_row: Callable[[Row], None] | None = None,
    nonfinite: Literal["raise", "ignore"] = "raise",
) -> FitResult:
    """Train for `epochs` or for `steps`; returns `(state, history)`.

    Args:
      step: `(state, batch) -> (state, metrics)`, such as a `train_step`.
      state: a `TrainState`. Its arrays are donated: keep the one returned.
      data: a dict of arrays (then `batch_size` is needed; each epoch is shuffled by `seed` and
        drops the last partial batch), an iterable of batches, or a callable epoch -> iterable.
      epochs, steps: how long; exactly one of them.
      eval_data: evaluated after each epoch, or every `eval_every` steps, and at the end.
        `eval_loss` is what `evaluate` takes as loss, by default `step`; `eval_batch_size` cuts a
        dict of arrays, by default `batch_size`.
      run_dir: where `metrics.jsonl`, `tensorboard/` and `checkpoints/` go.
      resume: "auto" goes on with the run in `run_dir` if there is one; "never" refuses then.
      checkpoint_every: steps between checkpoints (by default one per epoch, and one at the end).
        The newest `keep` are kept.
      log_every: steps between rows; there is one at the end of each epoch too.
      progress: whether to print them (to stderr).
      on_row: called with each row, a dict with "step", "epoch" (from 0), "loss", scalar metrics,
        "learning_rate" if the optimizer's state has it, "examples_per_second", "step_ms",
        "memory_bytes", and "eval_..."; an exception from it ends the run.
      nonfinite: what a loss that is not finite does, at the next row.

    Raises `NonFiniteError`; `CheckpointError` if `run_dir` cannot be used, before anything is
    changed; `BatchError`. SIGINT (in the main thread) finishes the step, saves a checkpoint and
    raises `KeyboardInterrupt`; a second one stops at once.

    >>> import jax.numpy as jnp, numpy as np, optax
    >>> from fastgpu.training import TrainState, train_step
    >>> def loss_fn(params, model_state, batch, rng):
    ...     return ((batch["x"] * params["w"] - 1) ** 2).mean(), (model_state, {})
    >>> tx = optax.sgd(0.1)
    >>> state = TrainState.create({"params": {"w": jnp.zeros(())}}, tx, rng=0)
    >>> data = {"x": np.ones(6, np.float32)}
    >>> result = fit(train_step(loss_fn, tx), state, data, epochs=2, batch_size=2, progress=False)
    >>> int(result.state.step), [row["epoch"] for row in result.history]
    (6, [0, 1])
    """
    if (epochs is None) == (steps is None):
        raise ValueError(f"pass exactly one of `epochs` and `steps`, not {epochs=} and {steps=}")
    eval_batch = (eval_batch_size or batch_size) if isinstance(eval_data, Mapping) else None
    settings = "passes", "target", "precision"
    passes = {name: getattr(step, name) for name in settings if hasattr(step, name)}
    if eval_data is not None:
        eval_loss = step if eval_loss is None else eval_loss
        example_fn(eval_loss)
        batches_of(eval_data, eval_batch, shuffle=False, drop_remainder=False)
    require_alive("state", state)
    run_dir = None if run_dir is None else Path(run_dir)
    batches = batches_of(data, batch_size, seed=seed, shuffle=shuffle, drop_remainder=True)
    if batches.per_epoch == 0:
        raise _empty(0)
    notes: dict[str, Any] = {"epoch": 0, "batch": 0, "first_step": int(state.step)}
    notes |= {"metrics_size": 0, "data": batches.identity()}
    if run_dir is not None:
        state, notes = restored(run_dir, resume, state, notes)
    number, epoch, index = int(state.step), notes["epoch"], notes["batch"]
    start = number
    if epochs is not None and batches.per_epoch is not None:
        steps = epochs * batches.per_epoch
    last = None if steps is None else notes["first_step"] + steps

    with (
        Interrupt() as interrupt,
        Record(
            run_dir,
            notes,
            start_step=start,
            last_step=last,
            keep=keep,
            nonfinite=nonfinite,
            progress=progress,
            on_row=on_row,
        ) as record,
    ):
        if start > notes["first_step"]:
            record.say(f"resumed {run_dir} at step {start}, epoch {epoch}, batch {index}")

        def report(*, evaluated: bool = False) -> None:
            row = record.interval.row(number, epoch, state)
            if evaluated and eval_data is not None and not record.evaluated(number):
                row = row or {"step": number, "epoch": epoch}
                scores = evaluate(eval_loss, state, eval_data, batch_size=eval_batch, **passes)
                row |= {f"eval_{name}": score for name, score in scores.items()}
                record.interval.restart_clock()
            if row:
                record.write(row)

        def save() -> Path | None:
            report()
            path = record.save(state, number, epoch, index)
            record.interval.restart_clock()
            return path

        def stop_if_interrupted() -> None:
            if interrupt.requested:
                path = save()
                where = f"saved {path}" if path else "nothing was saved, there is no run_dir"
                record.say(f"interrupted after step {number}; {where}")
                raise KeyboardInterrupt(f"after step {number}; {where}")

        while (epochs is None or epoch < epochs) and number != last:
            for batch in prefetch(batches.epoch(epoch, skip=index)):
                began = time.perf_counter()
                state, metrics = step(state, batch)
                number, index = number + 1, index + 1
                record.add(number, metrics, batch)
                if number == start + 1:
                    jax.block_until_ready(metrics)
                    seconds = time.perf_counter() - began
                    record.say(f"first step, compilation included: {seconds:.1f} s")
                    record.interval.restart_clock()
                stop_if_interrupted()
                if number == last:
                    break
                evaluated = bool(eval_every) and number % eval_every == 0
                if evaluated or number % log_every == 0:
                    report(evaluated=evaluated)
                if checkpoint_every and number % checkpoint_every == 0:
                    save()
            else:
                if index == 0:
                    raise _empty(epoch)
                report(evaluated=not eval_every)
                epoch, index = epoch + 1, 0
                if not checkpoint_every:
                    save()
                stop_if_interrupted()
        if number > start:
            report(evaluated=True)
            save()
        stop_if_interrupted()
    return FitResult(state, record.rows)


def _empty(epoch: int) -> BatchError:
    return BatchError(
        f"the data has no batches in epoch {epoch}",
        expected="at least one batch per epoch",
        got="none",
        fix="pass an iterable that can be read again (an iterator can be read once), or a callable "
        "epoch -> iterable",
    )
