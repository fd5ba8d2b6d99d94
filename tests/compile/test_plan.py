"""`plan` and budgets: the compiler's figures, the report, and what is refused."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fastgpu as fgpu
from fastgpu.compile import absent_mesh, compile_for, memory_report
from fastgpu.errors import BatchError, BudgetError, ConfigurationError
from fastgpu.hardware import parse_budget

TX = optax.adam(1e-3)
X = jax.ShapeDtypeStruct((1 << 15, 256), jnp.float32)
BATCH = {"inputs": X, "labels": jax.ShapeDtypeStruct(X.shape[:1], jnp.int32)}


@pytest.fixture(scope="module")
def planned():
    """A step of a deep network on an absent H100: its plans for falling budgets."""
    module = fgpu.models.create("mlp", hidden=(256,) * 16, num_classes=10, dropout=0.0)
    loss = fgpu.supervised_loss(module, "softmax_cross_entropy_with_integer_labels")
    variables = jax.eval_shape(module.init, jax.random.key(0), X)
    state = jax.eval_shape(lambda v: fgpu.TrainState.create(v, TX, rng=0), variables)
    step = fgpu.train_step(loss, TX)

    def plan(budget=None):
        return fgpu.plan(step, state, BATCH, target="h100", memory_budget=budget)

    return plan, step, state


def test_the_peak_is_the_compilers(planned):
    plan, step, state = planned
    found = plan()
    jitted = compile_for(step._build(step._value_and_grad()), (state, BATCH), "h100",
                         donate_argnums=(0,))  # fmt: skip
    memory = memory_report(jitted)
    assert found.memory.argument_bytes == memory.argument_bytes
    assert found.memory.temp_bytes == pytest.approx(memory.temp_bytes, rel=0.02)
    assert found.fits and found.compiles == 1 and found.extra_step_cost == 0


def test_falling_budgets_are_met_and_predicted_and_never_raise_the_peak(planned):
    plan, _, _ = planned
    whole = plan().peak_bytes
    peaks = []
    for part in (0.9, 0.8, 0.7, 0.6):
        found = plan(int(part * whole))
        assert found.fits and found.peak_bytes <= part * whole
        assert found.predicted_peak_bytes == pytest.approx(found.peak_bytes, rel=0.03)
        assert found.gap <= 0.02
        peaks.append(found.peak_bytes)
    assert peaks == sorted(peaks, reverse=True)
    assert found.recompute_flops_fraction > 0 and found.extra_step_cost > 0
    assert {r.decision for r in found.residuals} == {"keep", "recompute"}


def test_the_report_names_the_users_lines_and_is_saved(planned, tmp_path):
    plan, _, _ = planned
    found = plan("70%")
    assert any("mlp.py" in value.source for value in found.live_at_peak)
    assert "h100: peak" in str(found) and "fits" in str(found)
    found.save(tmp_path / "plan.json")
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["peak_bytes"] == found.peak_bytes and saved["fits"] is True
    found.save(tmp_path / "plan.svg")
    assert "<svg" in (tmp_path / "plan.svg").read_text()
    with pytest.raises(ConfigurationError, match=r"ends in \.json"):
        found.save(tmp_path / "plan.txt")
    assert not (tmp_path / "plan.txt").exists()


def test_an_infeasible_budget_says_the_least_that_was_found(planned):
    plan, _, _ = planned
    says = (
        r"(?s)at least .*temporaries, most of them .* x float32.*a batch of 16384 instead of 32768"
    )
    with pytest.raises(BudgetError, match=says) as error:
        plan("10%")
    assert plan(error.value.least_bytes).peak_bytes == error.value.least_bytes


def test_a_plain_function_is_measured_but_not_changed():
    found = fgpu.plan(lambda x: jnp.sum(x @ x.T), X, target="a100")
    assert found.target == "a100" and found.memory.argument_bytes == X.size * 4
    with pytest.raises(ConfigurationError, match=r"fastgpu.value_and_grad"):
        fgpu.plan(jnp.sin, X, target="a100", memory_budget="50%")


def test_a_sharded_step_reports_one_device_and_its_collectives():
    module = fgpu.models.create("mlp", hidden=(512,) * 4, num_classes=16, dropout=0.0)
    mesh = absent_mesh("h100:2x4")
    loss = fgpu.supervised_loss(module, "softmax_cross_entropy_with_integer_labels")
    variables = jax.eval_shape(module.init, jax.random.key(0), X)
    state = jax.eval_shape(lambda v: fgpu.TrainState.create(v, TX, rng=0), variables)
    whole = fgpu.plan(fgpu.train_step(loss, TX), state, BATCH, target="h100")
    step = fgpu.train_step(fgpu.gather_params(loss, mesh), TX)
    split = fgpu.shard_fsdp(state, BATCH, mesh)
    found = fgpu.plan(step, *split, target="h100:2x4")
    assert found.memory.argument_bytes < 1.1 * whole.memory.argument_bytes / 8
    assert found.memory.temp_bytes < whole.memory.temp_bytes / 4
    assert found.collectives["all-gather"] >= 1
    assert "over all 8 devices" in str(found)


def test_a_batch_that_cannot_be_split_is_named():
    batch = {"inputs": jax.ShapeDtypeStruct((6, 2), jnp.float32)}
    with pytest.raises(BatchError, match=r"batch\['inputs'\].*4 devices"):
        fgpu.shard_fsdp({}, batch, absent_mesh("h100:4"))


@pytest.mark.parametrize(
    "text, count",
    [(123, 123), ("1GiB", 2**30), ("1.5 GB", 1.5e9), ("25%", 250), ("64kb", 64000), ("7b", 7)],
)
def test_budgets_are_read(text, count):
    assert parse_budget(text, lambda: 1000) == count


@pytest.mark.parametrize("text", ["", "lots", "5 parsecs", "-1GiB", 0, float("nan"), "0%", True])
def test_budgets_that_make_no_sense_say_what_would(text):
    with pytest.raises(ConfigurationError, match="expected: "):
        parse_budget(text, lambda: 1000)


def test_a_training_run_within_a_budget_has_the_same_losses():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2048, 64)).astype(np.float32)
    batch = {"inputs": x, "labels": (x[:, 0] > 0).astype(np.int32)}
    module = fgpu.models.create("mlp", hidden=(64,) * 12, num_classes=2, dropout=0.2)
    loss = fgpu.supervised_loss(module, "softmax_cross_entropy_with_integer_labels")
    variables = module.init(jax.random.key(0), x)

    def losses(**options):
        step, state = (
            fgpu.train_step(loss, TX, **options),
            fgpu.TrainState.create(variables, TX, rng=3),
        )
        out = []
        for _ in range(4):
            state, metrics = step(state, batch)
            out.append(float(metrics["loss"]))
        return out

    # Dropout's masks are computed again from their keys, so the losses are the same.
    np.testing.assert_allclose(losses(memory_budget="85%"), losses(), rtol=1e-5)


def test_the_programs_in_the_guide_run(capsys):
    guide = (Path(__file__).parents[2] / "docs/memory.md").read_text()
    namespace = {"__name__": "guide"}
    for block in re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL):
        exec(block, namespace)
    assert namespace["report"].peak_bytes < namespace["before"].peak_bytes
    assert np.isfinite(namespace["metrics"]["loss"])
