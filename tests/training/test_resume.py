"""Runs that are killed, interrupted, damaged or mistaken for another, and go on."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastgpu.errors import CheckpointError
from fastgpu.training import TrainState, fit
from fastgpu.training.checkpoint import CheckpointWriter, read_notes, restore, saved_steps

# Dropout, batch statistics, Adam and shuffling: all that a resumed run could get wrong.
PROGRAM = """
import os, signal
import flax.linen as nn
import jax, jax.numpy as jnp, numpy as np, optax
from fastgpu.training import TrainState, fit, supervised_loss, train_step

class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(3)(nn.Dropout(0.3, deterministic=not train)(x))

tx = optax.adam(1e-2)
step = train_step(supervised_loss(Net()), tx)
variables = jax.jit(Net().init)(jax.random.key(0), jnp.ones((1, 4)))

def run(run_dir, kill_at=None, **options):
    state = TrainState.create(variables, tx, rng=1)
    x = np.random.default_rng(0).normal(size=(22, 4)).astype(np.float32)

    def killed(state, batch):
        if kill_at is not None and int(state.step) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(state, batch)

    data = {"inputs": x, "labels": x[:, :3].argmax(-1)}
    options = {"epochs": 3, "checkpoint_every": 3, "log_every": 2, **options}
    return fit(killed, state, data, batch_size=5, run_dir=run_dir, **options)
"""


@functools.cache
def program():
    namespace = {}
    exec(PROGRAM, namespace)
    return namespace["run"]


def child(call, **options):
    code = PROGRAM + call
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        text=True,
        stderr=subprocess.PIPE,
        **options,
    )


def bits(state):
    return [
        np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        ).tobytes()
        for leaf in jax.tree.leaves(state)
    ]


def without_timings(rows):
    timings = ("step_ms", "examples_per_second", "memory_bytes")
    return [{name: row[name] for name in row if name not in timings} for row in rows]


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    run = program()
    unbroken = run(tmp_path / "unbroken", progress=False)

    killed = child(f"run({str(tmp_path / 'killed')!r}, kill_at=7, progress=False)")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    # Step 7 lies in the middle of the second epoch of 4 batches; a row was written after step 6.
    assert saved_steps(tmp_path / "killed") == [6, 3]
    notes = read_notes(tmp_path / "killed", 6)
    assert (notes["epoch"], notes["batch"]) == (1, 2)

    resumed = run(tmp_path / "killed", progress=False)
    assert int(resumed.state.step) == 12
    assert bits(resumed.state) == bits(unbroken.state)
    assert without_timings(resumed.history) == without_timings(unbroken.history)
    rows = (tmp_path / "killed/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == resumed.history


def test_a_finished_run_is_given_back_and_a_longer_one_goes_on(tmp_path):
    run = program()
    first = run(tmp_path, progress=False)
    rows = (tmp_path / "metrics.jsonl").read_text()
    again = run(tmp_path, progress=False)
    assert bits(again.state) == bits(first.state)
    assert (tmp_path / "metrics.jsonl").read_text() == rows
    longer = run(tmp_path, progress=False, epochs=4)
    assert int(longer.state.step) == 16
    assert bits(longer.state) == bits(run(tmp_path / "new", progress=False, epochs=4).state)


def test_sigint_finishes_the_step_saves_and_raises(tmp_path):
    process = child(f"run({str(tmp_path)!r}, epochs=None, steps=10**7, checkpoint_every=10**6)")
    lines = []
    for text in process.stderr:
        lines.append(text)
        if text.startswith("step 8/"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.communicate()[0 if process.stderr is None else 1]
    told = [text for text in rest.splitlines() if text.startswith("interrupted after step")]
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in rest
    (step,) = saved_steps(tmp_path)
    assert told == [f"interrupted after step {step}; saved {tmp_path / 'checkpoints' / str(step)}"]

    resumed = program()(tmp_path, epochs=None, steps=step + 3, progress=False)
    unbroken = program()(None, epochs=None, steps=step + 3, progress=False)
    assert bits(resumed.state) == bits(unbroken.state)


# --- checkpoints


def some_state(width=4, tx=None):
    params = {
        "a/b.c é": jnp.linspace(0, 1, width * 3).reshape(width, 3),
        "layers": [jnp.ones(2, jnp.bfloat16), (jnp.zeros((), jnp.float16), jnp.zeros((0, 3)))],
    }
    variables = {"params": params, "rngs": {"stream": jax.random.key(5)}}
    return TrainState.create(variables, tx or optax.adam(1e-3), rng=jax.random.key(3, impl="rbg"))


def at_step(state, step):
    return state.replace(step=jnp.int32(step))


@pytest.fixture
def run_dir(tmp_path):
    """A folder with checkpoints of the steps 2 and 3."""
    with CheckpointWriter(tmp_path, keep=2, after=0) as writer:
        for step in (1, 2, 3):
            writer.save(step, at_step(some_state(), step), {"data": {}})
    return tmp_path


def test_any_pytree_and_keys_come_back_and_old_checkpoints_go(run_dir):
    assert saved_steps(run_dir) == [3, 2]
    state, _ = restore(run_dir, some_state())
    assert bits(state) == bits(at_step(some_state(), 3))
    assert jax.tree.structure(state) == jax.tree.structure(some_state())
    assert str(jax.random.key_impl(state.rng)) == "rbg"


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(folder):
    for path in folder.joinpath("state").rglob("d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


DAMAGE = {
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "no notes": lambda folder: shutil.rmtree(folder / "notes"),
    "half the notes": lambda folder: (folder / "notes/metadata").write_text('{"lea'),
    "half a file": lambda folder: os.truncate(largest_file(folder / "state"), 9),
    "no manifest": lambda folder: (folder / "state/manifest.ocdbt").unlink(),
    "flipped bits": flip_a_bit,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_and_moved_aside(run_dir, damage, caplog):
    DAMAGE[damage](run_dir / "checkpoints/3")
    state, _ = restore(run_dir, some_state())
    assert int(state.step) == 2
    assert "cannot be read, trying an older one: step 3" in caplog.text
    with CheckpointWriter(run_dir, keep=2, after=2) as writer:
        writer.save(3, at_step(some_state(), 3), {})
    assert (run_dir / "checkpoints/3.unreadable").is_dir()
    assert int(restore(run_dir, some_state())[0].step) == 3


def test_only_damaged_checkpoints_are_refused(run_dir):
    for step in (2, 3):
        DAMAGE["no state"](run_dir / f"checkpoints/{step}")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read[^$]*step 3"):
        restore(run_dir, some_state())


def test_what_a_killed_save_leaves_is_not_a_checkpoint(run_dir):
    shutil.move(run_dir / "checkpoints/3", run_dir / "checkpoints/3.orbax-checkpoint-tmp")
    assert int(restore(run_dir, some_state())[0].step) == 2
    with CheckpointWriter(run_dir, keep=2, after=2):
        pass
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["2"]


def files(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def one_step(state, batch):
    return state.replace(step=state.step + 1), {"loss": jnp.zeros(())}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: some_state(width=5), r"state.params\['a/b.c é'\][^$]*float32\[5,3\][^$]*\[4,3\]"),
        (lambda: some_state(tx=optax.sgd(0.1)), r"state.opt_state[^$]*no such leaf"),
    ],
)
def test_another_runs_checkpoint_is_refused_and_nothing_changed(run_dir, state, message):
    before = files(run_dir)
    with pytest.raises(CheckpointError, match=rf"is of another run: {message}"):
        fit(one_step, state(), [{"x": np.ones(1)}], epochs=1, run_dir=run_dir, progress=False)
    assert files(run_dir) == before


def test_other_batches_are_refused(tmp_path):
    program()(tmp_path, progress=False, epochs=1)
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match=r"trained on other batches[^$]*'seed': 4"):
        program()(tmp_path, progress=False, seed=4)
    assert files(tmp_path) == before


def test_resume_never_refuses_a_folder_with_a_run(run_dir):
    before = files(run_dir)
    with pytest.raises(CheckpointError, match=r"a run already[^$]*\[3, 2\][^$]*resume='auto'"):
        fit(one_step, some_state(), [{}], epochs=1, run_dir=run_dir, resume="never")
    assert files(run_dir) == before


@contextlib.contextmanager
def unprivileged():
    """Root may write anywhere: be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_cannot_be_written_is_named_before_training():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        with (
            unprivileged(),
            pytest.raises(CheckpointError, match=r"cannot be written[^$]*PermissionError"),
        ):
            fit(None, some_state(), [{}], epochs=1, run_dir=folder)
        assert list(folder.iterdir()) == []

        file = folder / "file"
        folder.chmod(0o755)
        file.write_text("text")
        with pytest.raises(CheckpointError, match=r"cannot be written[^$]*FileExistsError"):
            fit(None, some_state(), [{}], epochs=1, run_dir=file)
        with pytest.raises(CheckpointError, match=r"cannot be written[^$]*NotADirectory"):
            fit(None, some_state(), [{}], epochs=1, run_dir=file / "run")
        assert file.read_text() == "text"
