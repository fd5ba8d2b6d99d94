"""`fit`, `evaluate`, `predict` and the in-memory batches."""

import json
import os
import signal
import threading
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastgpu.errors import BatchError, FastGPUError, LossError, NonFiniteError
from fastgpu.training import (
    ArrayBatches,
    TrainState,
    evaluate,
    fit,
    predict,
    supervised_loss,
    train_step,
)
from fastgpu.training.data import IterableBatches, prefetch
from fastgpu.training.metrics import learning_rate, line


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(3)(nn.Dropout(0.2, deterministic=not train)(nn.relu(x)))


TX = optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)


def dataset(examples=22):
    x = np.random.default_rng(0).normal(size=(examples, 4)).astype(np.float32)
    return {"inputs": x, "labels": x[:, :3].argmax(-1)}


@pytest.fixture(scope="module")
def net_loss():
    return supervised_loss(Net())


@pytest.fixture(scope="module")
def net_step(net_loss):
    return train_step(net_loss, TX)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Net().init)(jax.random.key(0), jnp.ones((1, 4)))


@pytest.fixture
def state(variables):
    return TrainState.create(variables, TX, rng=1)


def counting_step(state, batch):
    """A step that any object can be: counts what it sees."""
    return state.replace(step=state.step + 1), {"loss": jnp.mean(batch["x"])}


def plain_state():
    return TrainState.create({"params": {"w": jnp.zeros(1)}}, optax.sgd(0.1), rng=0)


# --- data


def test_an_epoch_has_every_example_once_in_an_order_of_its_own():
    batches = ArrayBatches({"x": np.arange(12)}, 4, seed=3)
    epochs = [np.concatenate([b["x"] for b in batches.epoch(n)]) for n in (0, 1, 0)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert (epochs[0] == epochs[2]).all() and (epochs[0] != epochs[1]).any()
    other = np.concatenate([b["x"] for b in ArrayBatches({"x": np.arange(12)}, 4, seed=4).epoch(0)])
    assert (other != epochs[0]).any()


@pytest.mark.parametrize(
    "batches",
    [
        ArrayBatches({"x": np.arange(13)}, 4),
        IterableBatches([{"x": np.array([k])} for k in range(3)]),
        IterableBatches(lambda epoch: ({"x": np.array([epoch, k])} for k in range(3))),
    ],
)
def test_skipping_leads_to_the_same_batches(batches):
    whole = list(batches.epoch(1))
    assert len(whole) == 3
    for skip in range(4):
        rest = [batch["x"].tolist() for batch in batches.epoch(1, skip)]
        assert rest == [batch["x"].tolist() for batch in whole[skip:]]


def test_prefetch_takes_one_batch_ahead_and_shares_no_memory():
    taken = []
    memory = np.zeros((64, 64), np.float32)

    def source():
        for k in range(3):
            memory[:] = k
            taken.append(k)
            yield memory

    batches = prefetch(source())
    first = next(batches)
    assert taken == [0, 1] and isinstance(first, jax.Array) and float(first[0, 0]) == 0
    assert [float(batch[0, 0]) for batch in batches] == [1, 2]


@pytest.mark.parametrize(
    ("data", "batch_size", "message"),
    [
        ({"x": np.ones(4), "y": np.ones(3)}, 2, r"\['x'\]: 4, \['y'\]: 3"),
        ({"x": np.ones(4), "y": 3.0}, 2, r"batch\['y'\] has no leading axis"),
        ({"x": np.ones(4)}, 5, "no full batch of 5 in 4 examples"),
        ({"x": np.ones(4)}, 0, "batch_size=0"),
        ({"x": np.ones(4)}, None, "no batch_size"),
        ([{"x": np.ones(4)}], 2, "made of batches already"),
        (3, None, "cannot be read[^$]*got: int"),
        ([], None, "no batches in epoch 0"),
        ({}, 2, "the data is empty"),
    ],
)
def test_data_that_cannot_be_read_is_named(data, batch_size, message):
    with pytest.raises(BatchError, match=message):
        fit(counting_step, plain_state(), data, epochs=1, batch_size=batch_size, progress=False)


def test_an_iterator_is_read_once():
    data = ({"x": np.ones(1)} for _ in range(2))
    with pytest.raises(BatchError, match=r"no batches in epoch 1[^$]*read once"):
        fit(counting_step, plain_state(), data, epochs=2, progress=False)


# --- fit


def test_equals_a_loop_over_the_step(net_step, variables):
    data = dataset()
    state = TrainState.create(variables, TX, rng=1)
    for epoch in range(2):
        for batch in ArrayBatches(data, 5, seed=9).epoch(epoch):
            state, _ = net_step(state, batch)

    ours = TrainState.create(variables, TX, rng=1)
    result = fit(net_step, ours, data, epochs=2, batch_size=5, seed=9, progress=False)
    assert int(result.state.step) == 8
    jax.tree.map(np.testing.assert_array_equal, result.state.params, state.params)


def test_rows_carry_everything_and_means_are_over_the_interval(capsys):
    data = [{"x": np.full(4, k, np.float32)} for k in range(5)]
    seen = []
    result = fit(counting_step, plain_state(), data, epochs=2, log_every=2, on_row=seen.append)
    assert [(r["step"], r["epoch"], r["loss"]) for r in result.history] == [
        (2, 0, 0.5),
        (4, 0, 2.5),
        (5, 0, 4.0),
        (6, 1, 0.0),
        (8, 1, 1.5),
        (10, 1, 3.5),
    ]
    assert seen == result.history
    assert {"step_ms", "examples_per_second", "memory_bytes"} <= set(seen[1])
    printed = capsys.readouterr().err
    assert "first step, compilation included" in printed
    for part in ("step 8/10 | epoch 1 | loss 1.5", "examples/s", "ms/step", "eta 0:00:0", "GiB"):
        assert part in printed


def test_the_learning_rate_is_logged_if_the_optimizer_has_it(net_step, state):
    result = fit(net_step, state, dataset(), steps=1, batch_size=5, progress=False)
    assert result.history[-1]["learning_rate"] == pytest.approx(1e-2)
    assert learning_rate(optax.adam(1e-3).init({"w": jnp.ones(1)})) is None
    assert "learning_rate 0.01" in line(result.history[-1], None)


def test_steps_may_end_within_an_epoch_and_go_over_its_end():
    seen = Counter()

    def step(state, batch):
        seen[int(batch["x"][0])] += 1
        return state.replace(step=state.step + 1), {"loss": jnp.zeros(())}

    data = [{"x": np.array([k])} for k in range(3)]
    result = fit(step, plain_state(), data, steps=5, progress=False)
    assert int(result.state.step) == 5 and seen == {0: 2, 1: 2, 2: 1}
    again = fit(step, result.state, lambda epoch: data, steps=1, progress=False)
    assert int(again.state.step) == 6


def test_exactly_one_of_epochs_and_steps():
    for lengths in ({}, {"epochs": 1, "steps": 1}):
        with pytest.raises(ValueError, match="exactly one"):
            fit(counting_step, plain_state(), [], **lengths)


def test_no_step_waits_for_the_host_between_rows(net_step, state):
    """Fetching a value from the device is refused while `fit` is between two rows."""

    def guarded(state, batch):
        with jax.transfer_guard_device_to_host("disallow"):
            return net_step(state, batch)

    fit(guarded, state, dataset(), epochs=1, batch_size=5, progress=False)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    data = [{"x": np.array([k], np.float32)} for k in (1, 2, np.nan, 3)]
    with pytest.raises(NonFiniteError, match=r"nan at step 3[^$]*the last one was 2 at step 2"):
        fit(counting_step, plain_state(), data, epochs=1, run_dir=tmp_path, progress=False)
    assert list((tmp_path / "checkpoints").iterdir()) == []

    result = fit(
        counting_step,
        plain_state(),
        data,
        epochs=1,
        run_dir=tmp_path / "other",
        nonfinite="ignore",
        progress=False,
    )
    assert int(result.state.step) == 4
    (row,) = (tmp_path / "other/metrics.jsonl").read_text().splitlines()
    assert json.loads(row)["loss"] is None


def test_an_exception_from_on_row_ends_the_run_and_closes_its_files(tmp_path):
    class Pruned(Exception):
        pass

    def prune(row):
        raise Pruned

    with pytest.raises(Pruned):
        fit(
            counting_step,
            plain_state(),
            {"x": np.ones(8, np.float32)},
            batch_size=2,
            steps=4,
            log_every=2,
            run_dir=tmp_path,
            on_row=prune,
            progress=False,
        )
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_metrics_go_to_json_lines_and_tensorboard(tmp_path, net_step, state):
    result = fit(
        net_step,
        state,
        dataset(),
        epochs=2,
        batch_size=5,
        eval_data=dataset(7),
        run_dir=tmp_path,
        progress=False,
    )
    rows = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.history
    assert [row["step"] for row in rows] == [4, 8]
    assert {"loss", "accuracy", "eval_loss", "eval_accuracy"} <= set(rows[0])
    events = list((tmp_path / "tensorboard").iterdir())
    assert events and b"eval_accuracy" in events[0].read_bytes()


def test_evaluation_every_few_steps(net_step, state):
    result = fit(
        net_step,
        state,
        dataset(),
        steps=6,
        batch_size=5,
        eval_data=dataset(7),
        eval_every=3,
        eval_batch_size=7,
        progress=False,
    )
    evaluated = [row["step"] for row in result.history if "eval_loss" in row]
    assert evaluated == [3, 6]


def test_what_cannot_be_evaluated_is_refused_before_training(net_step, state):
    def loss_fn(params, model_state, batch, rng):
        raise AssertionError("must not be called")

    with pytest.raises(LossError, match=r"cannot be evaluated[^$]*eval_loss"):
        fit(train_step(loss_fn, TX), state, dataset(), epochs=1, batch_size=5, eval_data=dataset())
    batches = list(ArrayBatches(dataset(), 5).epoch(0))
    with pytest.raises(BatchError, match="no batch_size"):
        fit(net_step, state, batches, epochs=1, eval_data=dataset())
    assert not state.step.is_deleted()


def test_a_donated_state_is_named(net_step, state):
    net_step(state, next(ArrayBatches(dataset(), 5).epoch(0)))
    with pytest.raises(FastGPUError, match="already used up"):
        fit(net_step, state, dataset(), epochs=1, batch_size=5)
    with pytest.raises(FastGPUError, match="already used up"):
        evaluate(net_step, state, dataset(), batch_size=5)


def test_the_signal_handler_is_put_back_and_other_threads_need_none():
    def handler(signum, frame):
        raise AssertionError("must not be called")

    before = signal.signal(signal.SIGINT, handler)
    try:
        run = lambda: fit(counting_step, plain_state(), [{"x": np.ones(1)}], epochs=1)  # noqa: E731
        run()
        assert signal.getsignal(signal.SIGINT) is handler
        results = []
        thread = threading.Thread(target=lambda: results.append(run()))
        thread.start()
        thread.join()
        assert int(results[0].state.step) == 1
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_process_that_ignores_sigint_goes_on_ignoring_it():
    """As one started in the background by a shell."""

    def step(state, batch):
        os.kill(os.getpid(), signal.SIGINT)
        return counting_step(state, batch)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        fit(step, plain_state(), [{"x": np.ones(1)}], epochs=1, progress=False)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_without_a_run_directory_says_that_nothing_was_saved():
    def step(state, batch):
        os.kill(os.getpid(), signal.SIGINT)
        return counting_step(state, batch)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="after step 1; nothing was saved"):
        fit(step, plain_state(), [{"x": np.ones(1)}] * 3, epochs=1, progress=False)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_stops_at_once():
    finished = []

    def step(state, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        finished.append(True)
        return counting_step(state, batch)

    with pytest.raises(KeyboardInterrupt):
        fit(step, plain_state(), [{"x": np.ones(1)}] * 3, epochs=1, progress=False)
    assert not finished


# --- evaluate, predict


def by_hand(variables, data):
    logits = Net().apply(variables, data["inputs"])
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, data["labels"])
    return np.array(losses), np.array(logits.argmax(-1) == data["labels"], float), logits


def test_evaluate_counts_every_example_once(net_loss, variables):
    data = dataset(11)
    losses, hits, _ = by_hand(variables, data)
    scores = evaluate(net_loss, variables, data, batch_size=4)
    # Sums of 11 float32 numbers in two orders.
    assert scores["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert scores["accuracy"] == pytest.approx(hits.mean(), rel=1e-6)

    batches = list(ArrayBatches(data, 4, shuffle=False, drop_remainder=False).epoch(0))
    assert evaluate(net_loss, variables, batches) == scores
    assert evaluate(net_loss, variables, lambda epoch: batches) == scores
    assert evaluate(net_loss, variables, data, batch_size=100)["loss"] == pytest.approx(
        losses.mean(), rel=1e-5
    )


def test_evaluate_weighs_examples(net_loss, variables):
    data = dataset(11)
    losses, _, _ = by_hand(variables, data)
    weights = np.linspace(0, 1, 11, dtype=np.float32)
    scores = evaluate(net_loss, variables, {**data, "weights": weights}, batch_size=4)
    assert scores["loss"] == pytest.approx(np.average(losses, weights=weights), rel=1e-5)


def test_evaluate_takes_means_of_whole_batches_and_plain_functions(variables):
    data = dataset(11)
    scalar = supervised_loss(Net(), loss=lambda outputs, labels: jnp.mean(outputs))
    _, _, logits = by_hand(variables, data)
    assert evaluate(scalar, variables, data, batch_size=4)["loss"] == pytest.approx(
        float(logits.mean()), rel=1e-4, abs=1e-6
    )

    def examples(variables, batch):
        return {"first": batch["inputs"][:, 0]}

    first = evaluate(examples, variables, data, batch_size=4)
    assert first == {"first": pytest.approx(data["inputs"][:, 0].mean(), rel=1e-5)}


def test_evaluate_and_predict_compile_once(net_loss, variables, compilations):
    data = dataset(11)
    for repeat in range(2):
        evaluate(net_loss, variables, data, batch_size=4)
        predict(net_loss, variables, data, batch_size=4)
        assert repeat == 0 or not compilations
        compilations.clear()


def test_predict_gives_every_example_in_order(net_loss, net_step, variables):
    data = dataset(11)
    expected = by_hand(variables, data)[2]
    batches = list(ArrayBatches(data, 4, shuffle=False, drop_remainder=False).epoch(0))
    for model, inputs in (
        (Net(), data["inputs"]),
        (net_loss, data),
        (net_step, (data["inputs"],)),
        (net_loss, batches),
    ):
        outputs = predict(model, variables, inputs, batch_size=4)
        assert isinstance(outputs, np.ndarray)
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


def test_nothing_to_evaluate_or_predict(net_loss, variables):
    with pytest.raises(BatchError, match="nothing to evaluate"):
        evaluate(net_loss, variables, [])
    with pytest.raises(BatchError, match="nothing to predict"):
        predict(net_loss, variables, iter(()))
    with pytest.raises(LossError, match="cannot predict"):
        predict(lambda x: x, variables, np.ones((2, 4)))
    with pytest.raises(LossError, match="cannot be evaluated"):
        evaluate("accuracy", variables, dataset(), batch_size=4)
