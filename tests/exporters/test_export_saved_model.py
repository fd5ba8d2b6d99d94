"""`export_saved_model`: what it writes runs in TensorFlow alone; a failure leaves nothing."""

import json
import os
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpu.errors import ExportError, MissingExtraError
from fastgpu.exporters import (
    ExportReport,
    Signature,
    export_saved_model,
    lowering,
    savedmodel,
    verification,
)
from fastgpu.exporters.reload_savedmodel import Forbid


class TwoInputs(nn.Module):
    """Tokens and a picture to a dict of outputs, through the operations that TensorFlow lacks."""

    @nn.compact
    def __call__(self, tokens, picture, *, train: bool = False):
        x = nn.Conv(6, (3, 3), strides=2)(picture)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.gelu(x, approximate=False).mean((1, 2))
        x = jnp.concatenate([x, jax.lax.erf(nn.Embed(2, 4)(tokens)).mean(1)], axis=-1)
        logits = nn.Dense(5)(jnp.sinh(x) + jnp.arctanh(jnp.tanh(x) / 2))
        best = jax.lax.top_k(logits, 2)
        return {"logits": logits, "best": best, "half": logits.astype(jnp.bfloat16)}


def _tokens_and_picture(batch, time=7):
    rng = np.random.default_rng(batch)
    tokens = rng.integers(0, 2, (batch, time)).astype(np.int32)
    return tokens, rng.normal(size=(batch, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def two_inputs():
    module = TwoInputs()
    return module, module.init(jax.random.key(0), *_tokens_and_picture(2))


@pytest.fixture(scope="module")
def exported(two_inputs, tmp_path_factory):
    module, variables = two_inputs
    path = tmp_path_factory.mktemp("export") / "nested" / "model"
    report = export_saved_model(
        module,
        variables,
        path,
        inputs={"tokens": ((None, None), "int32"), "picture": (None, 8, 8, 3)},
        signatures={
            "logits": lambda variables, *inputs: module.apply(variables, *inputs)["logits"],
            "norms": Signature(lambda variables, x: (x @ x.T, [x.sum()]), inputs=[("n", 4)]),
        },
    )
    return path, report


@pytest.fixture(scope="module")
def in_tensorflow(exported, run_in_tensorflow):
    """The calls made in TensorFlow alone, and what it answered."""
    calls = []
    for batch, time in ((1, 7), (3, 2), (64, 9)):
        tokens, picture = _tokens_and_picture(batch, time)
        calls.append(("serving_default", {"tokens": tokens, "picture": picture}))
    calls.append(("logits", calls[0][1]))
    calls.append(("norms", {"input_0": np.ones((3, 4), np.float32)}))
    (answer,) = run_in_tensorflow([(str(exported[0]), calls)])
    return calls, *answer


def test_the_file_gives_the_live_numbers_in_tensorflow_alone(two_inputs, in_tensorflow):
    module, variables = two_inputs
    calls, outputs, _, _ = in_tensorflow
    for (_, inputs), got in zip(calls[:3], outputs[:3], strict=True):
        live = module.apply(variables, inputs["tokens"], inputs["picture"])
        assert {key: kind for key, (kind, _) in got.items()} == {
            "logits": "float32",
            "best_0": "float32",
            "best_1": "int32",
            "half": "bfloat16",
        }
        np.testing.assert_allclose(got["logits"][1], live["logits"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got["best_0"][1], live["best"][0], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(got["best_1"][1], live["best"][1])
        # One unit in the last place of bfloat16: the float32 below may round either way.
        half = np.asarray(live["half"], np.float64)
        np.testing.assert_allclose(got["half"][1], half, rtol=2**-7)
    np.testing.assert_array_equal(outputs[3]["output_0"][1], outputs[0]["logits"][1])
    np.testing.assert_array_equal(outputs[4]["output_0"][1], np.full((3, 3), 4))
    assert outputs[4]["output_1_0"][1] == 12


def test_weights_are_variables_and_only_params_are_trainable(two_inputs, exported, in_tensorflow):
    _, report = exported
    _, _, names, trainable = in_tensorflow
    paths = jax.tree_util.tree_leaves_with_path(two_inputs[1])
    expected = {"/".join(key.key for key in path) + ":0" for path, _ in paths}
    assert names == expected
    assert trainable == {name for name in expected if name.startswith("params/")}
    assert (report.variables, report.trainable_variables) == (len(names), len(trainable))


def test_the_report_says_what_was_written_and_lies_in_the_folder(exported):
    path, report = exported
    assert isinstance(report, ExportReport) and report.path == path
    assert [signature.name for signature in report.signatures] == [
        "serving_default",
        "logits",
        "norms",
    ]
    default = report.signatures[0]
    assert default.inputs == {
        "tokens": "int32[batch, d0_1]",
        "picture": "float32[batch, 8, 8, 3]",
    }
    assert default.outputs["best_1"] == "int32[batch, 2]"
    assert [check.sizes["batch"] for check in default.checks] == [1, 3]
    assert all(check.argmax_agreement == 1 for check in default.checks)
    assert json.loads((path / "fastgpu_export.json").read_text()) == json.loads(report.to_json())
    files = [file for file in path.rglob("*") if file.is_file()]
    assert report.bytes == sum(f.stat().st_size for f in files if f.suffix != ".json")
    text = str(report)
    assert "serving_default(tokens: int32[batch, d0_1]" in text and "batch 3" in text
    assert os.listdir(path.parent) == ["model"]


def _scale(variables, x):
    return x * variables["params"]["scale"]


_SCALE = {"params": {"scale": jnp.full((3,), 2.0)}}


def _reloaded_as(change):
    """A reload that gives the live outputs changed by `change`; it stands for a broken export."""

    def reloaded_outputs(folder, calls, work, *, on_cpu):
        assert (Path(folder) / "saved_model.pb").exists()
        return [{k: change(v) for k, v in call.expected.items()} for call in calls]

    return reloaded_outputs


def _nothing(value):
    return value


def test_a_reload_with_other_numbers_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "reloaded_outputs", _reloaded_as(lambda v: v * 1.001))
    with pytest.raises(ExportError, match="other numbers: output 'output_0'") as caught:
        export_saved_model(_scale, _SCALE, tmp_path / "a" / "out", inputs=(None, 3))
    message = str(caught.value)
    assert "expected: a relative error of at most 1.0e-04" in message
    assert "got: 1.0e-03" in message and "to do:" in message
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(verification, "reloaded_outputs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_saved_model(_scale, _SCALE, tmp_path / "out", inputs=(None, 3))
    assert os.listdir(tmp_path) == []


def test_a_model_that_tensorflow_cannot_run_leaves_nothing(tmp_path, monkeypatch):
    # Without the export pass this is what happens: the save succeeds, the first call fails.
    monkeypatch.setattr(savedmodel, "runnable_in_tensorflow", _nothing)
    with pytest.raises(ExportError, match="does not run in TensorFlow") as caught:
        export_saved_model(lambda _, x: jax.lax.erf(x), {}, tmp_path / "out", inputs=(None, 3))
    assert "StableHLO" in str(caught.value) or "erf" in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["cholesky", "svd", "eigh", "inv", "qr"])
def test_an_operation_without_tensorflow_code_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, name
):
    monkeypatch.setattr(verification, "live_calls", None)  # never reached
    with pytest.raises(ExportError, match="TensorFlow cannot run '") as caught:
        export_saved_model(
            lambda _, x: getattr(jnp.linalg, name)(x), {}, tmp_path / "out", inputs=(None, 4, 4)
        )
    assert "test_export_saved_model.py" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_target_that_exists_is_refused_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "reloaded_outputs", _reloaded_as(_nothing))
    target = tmp_path / "out"
    export_saved_model(_scale, _SCALE, target, inputs=(None, 3))
    before = (target / "fastgpu_export.json").read_text()
    with pytest.raises(ExportError, match="exists") as caught:
        export_saved_model(_scale, _SCALE, target, inputs=(None, 3))
    assert "expected: a path at which there is nothing yet" in str(caught.value)
    assert "to do: choose another path, or pass overwrite=True" in str(caught.value)

    monkeypatch.setattr(verification, "reloaded_outputs", _reloaded_as(lambda v: v + 1))
    with pytest.raises(ExportError, match="other numbers"):
        export_saved_model(_scale, _SCALE, target, inputs=(None, 3), overwrite=True)
    assert (target / "fastgpu_export.json").read_text() == before

    monkeypatch.setattr(verification, "reloaded_outputs", _reloaded_as(_nothing))
    export_saved_model(_scale, _SCALE, target, inputs=("rows", 3), overwrite=True)
    assert "[rows, 3]" in (target / "fastgpu_export.json").read_text()
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write"):
        export_saved_model(_scale, _SCALE, tmp_path / "file" / "out", inputs=(None, 3))
    assert os.listdir(tmp_path) == ["file"]


def test_sizes_that_cannot_be_symbolic_are_explained(tmp_path):
    def needs_equal_sizes(_, a, b):
        return a + b

    with pytest.raises(ExportError, match="cannot be lowered") as caught:
        export_saved_model(
            needs_equal_sizes, {}, tmp_path / "out", inputs=[(None, None), (None, None)]
        )
    assert 'inputs=[("batch", "time"), ("batch", "time")]' in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_weights_in_a_closure_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lowering, "LARGEST_PROGRAM", 1 << 20)
    baked = jnp.arange(1 << 20, dtype=jnp.float32)
    with pytest.raises(ExportError, match="arrays baked into it") as caught:
        export_saved_model(lambda _, x: x + baked[:3], {}, tmp_path / "out", inputs=(None, 3))
    assert "through `variables`" in str(caught.value)


def test_outputs_of_nan_are_no_proof(tmp_path):
    with pytest.raises(ExportError, match="nothing but NaN") as caught:
        export_saved_model(
            lambda _, x: jnp.sqrt(-1 - x * x), {}, tmp_path / "out", inputs=(None, 3)
        )
    assert "sample=" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_random_key_among_the_variables_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"variables\['key'\] is a random key"):
        export_saved_model(
            lambda _, x: x, {"key": jax.random.key(0)}, tmp_path / "out", inputs=(None, 3)
        )


def test_a_signature_needs_a_name_of_its_own(tmp_path):
    for name in ("serving_default", "not a name"):
        with pytest.raises(ExportError, match="cannot be named"):
            export_saved_model(
                _scale, _SCALE, tmp_path / "out", inputs=(None, 3), signatures={name: _scale}
            )


def test_an_older_calling_convention_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    from tensorflow.compiler.tf2xla.python import xla

    monkeypatch.setattr(xla, "call_module_maximum_supported_version", lambda: 9)
    with pytest.raises(ExportError, match="too old") as caught:
        export_saved_model(_scale, _SCALE, tmp_path / "out", inputs=(None, 3))
    assert "expected: calling convention 10" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_without_tensorflow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fastgpu\[tensorflow\]'"):
        export_saved_model(_scale, _SCALE, tmp_path / "out", inputs=(None, 3))
    assert os.listdir(tmp_path) == []


def test_a_sample_gives_values_and_sizes_to_the_verification():
    seen = []

    def fn(_, x):
        seen.append(x.shape)
        return x

    from fastgpu.exporters.signatures import input_specs, sample_arrays

    sample = np.arange(10, dtype=np.float32).reshape(2, 5)
    specs = input_specs(None, [(None, None)])
    arrays = sample_arrays(specs, None, sample)
    calls = verification.live_calls("f", fn, {}, specs, arrays, (1, 3))
    assert seen == [(1, 5), (3, 5)]
    np.testing.assert_array_equal(calls[1].inputs["input_0"], sample[[0, 1, 0]])


@pytest.mark.parametrize(
    ("text", "tolerance"),
    [("tensor<2x3xf32>, tensor<bf16>", 3e-2), ("tensor<f32>", 1e-4), ("tensor<4xf64>", 1e-9)],
)
def test_the_tolerance_follows_the_coarsest_float_type(text, tolerance):
    assert verification.default_tolerance(text) == tolerance


def test_integers_have_to_be_equal_and_nan_matches_nan():
    def check(expected, got):
        call = verification.Call("f", {}, {}, {"y": np.asarray(expected)})
        return verification.compare(call, {"y": np.asarray(got)}, 1e-4)

    assert check([1.0, np.nan], [1.0, np.nan]).max_error == 0
    assert check([2.0, np.inf], [2.0001, np.inf]).relative_error == pytest.approx(5e-5)
    for expected, got in (
        ([1, 2], [1, 3]),
        ([1.0, 2.0], [1.0, np.nan]),
        ([1.0, np.inf], [1.0, -np.inf]),
        ([1.0, 2.0], [[1.0, 2.0]]),
        ([1.0], np.ones(1, np.float16)),
    ):
        with pytest.raises(ExportError, match="other numbers"):
            check(expected, got)


def test_the_reloading_process_cannot_import_jax():
    with pytest.raises(ImportError, match=r"must run without 'jax\.numpy'"):
        Forbid().find_spec("jax.numpy")
    assert Forbid().find_spec("numpy") is None
