"""`export_stablehlo`: the folder runs without the model's code; damaged folders are refused."""

import dataclasses
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from fastgpu.errors import BatchError, ExportError, FileError
from fastgpu.exporters import export_stablehlo, load_stablehlo, lowering, verification
from fastgpu.exporters.manifest import describe_file
from fastgpu.exporters.stablehlo_model import unknown_custom_calls
from fastgpu.importers import from_keras


class Tagger(nn.Module):
    """Tokens and features to a dict of outputs; weights in two dtypes, two open sizes."""

    @nn.compact
    def __call__(self, tokens, features):
        x = nn.gelu(nn.BatchNorm(use_running_average=True)(features), approximate=False)
        words = nn.Embed(3, 4, param_dtype=jnp.bfloat16)(tokens).astype(jnp.float32)
        logits = nn.Dense(5)(jnp.concatenate([x, words.mean(1)], axis=-1))
        return {
            "logits": logits,
            "best": jax.lax.top_k(logits, 2),
            "words": words.reshape(-1, 4),
            "factor": jnp.linalg.cholesky(logits.T @ logits + jnp.eye(5)),
        }


INPUTS = {"tokens": ((None, "time"), "int32"), "features": (None, 6)}

# What a user without fastgpu does: JAX's own reader is enough where the weights are inside.
PROGRAM = """
import pickle, sys
sys.modules["fastgpu"] = sys.modules["flax"] = sys.modules["tensorflow"] = None
import jax

folder, calls, answers = sys.argv[1:]
program = jax.export.deserialize(bytearray(open(folder + "/program.bin", "rb").read()))
results = [jax.device_get(program.call(*inputs)) for inputs in pickle.load(open(calls, "rb"))]
pickle.dump(results, open(answers, "wb"))
"""


def _arrays(batch, time):
    rng = np.random.default_rng(batch)
    tokens = rng.integers(0, 3, (batch, time)).astype(np.int32)
    return tokens, rng.normal(size=(batch, 6)).astype(np.float32)


CALLS = [_arrays(1, 9), _arrays(8, 2)]


@pytest.fixture(scope="module")
def tagger():
    module = Tagger()
    return module, jax.jit(module.init)(jax.random.key(0), *_arrays(2, 3))


@pytest.fixture(scope="module")
def live(tagger):
    """What the live function gives for `CALLS`, by the names that outputs get."""
    module, variables = tagger
    found = []
    for inputs in CALLS:
        outputs = jax.jit(module.apply)(variables, *inputs)
        best, where = outputs.pop("best")
        found.append({**outputs, "best_0": best, "best_1": where})
    return found


@pytest.fixture(scope="module")
def exports(tagger, tmp_path_factory):
    """Both ways to store weights: path and report."""
    folder = tmp_path_factory.mktemp("export") / "nested"
    settings = {"inputs": INPUTS, "platforms": ("cpu", "cuda", "tpu")}
    found = {}
    for how, sizes in (("inside", (1, 3)), ("separate", (3,))):
        path = folder / how
        report = export_stablehlo(*tagger, path, weights=how, batch_sizes=sizes, **settings)
        found[how] = (path, report)
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder to damage copies of; its verification is the other tests' subject."""
    path = tmp_path_factory.mktemp("small") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "outputs_of_script", _in_this_process)
        export_stablehlo(lambda w, x: x @ w, np.ones((3, 2)), path, inputs=(None, 3))
    return path


def _in_this_process(script, folder, calls, work, settings):
    model = load_stablehlo(folder)
    return [jax.device_get(model(**inputs)) for inputs in calls]


def _assert_equal(got, live):
    assert got.keys() == live.keys()
    for name, value in live.items():
        assert got[name].dtype == value.dtype
        # float32, the same XLA: fusions differ, so a few units in the last place
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["inside", "separate"])
def test_the_program_gives_the_live_numbers_at_every_size(exports, live, how):
    model = load_stablehlo(exports[how][0])
    for inputs, expected in zip(CALLS, live, strict=True):
        _assert_equal(model(*inputs), expected)
    assert repr(model).startswith(
        "StableHLOModel(tokens: int32[batch, time], features: float32[batch, 6]) -> (best_0:"
    )


def test_the_model_is_one_more_function_to_jit(exports, live):
    model = load_stablehlo(exports["inside"][0])
    tokens, features = CALLS[0]
    doubled = jax.jit(lambda t, f: model(t, features=f)["logits"] * 2)(tokens, features)
    np.testing.assert_allclose(doubled, 2 * live[0]["logits"], rtol=1e-5, atol=1e-6)


def test_jax_alone_runs_a_program_with_its_weights_inside(exports, live, tmp_path):
    (tmp_path / "calls").write_bytes(pickle.dumps(CALLS))
    files = [exports["inside"][0], tmp_path / "calls", tmp_path / "answers"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-I", "-c", PROGRAM, *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = pickle.loads((tmp_path / "answers").read_bytes())
    for got, expected in zip(answers, live, strict=True):
        _assert_equal(got, expected)


@pytest.mark.parametrize("how", ["inside", "separate"])
def test_the_folder_holds_manifest_program_and_report(tagger, exports, how):
    path, report = exports[how]
    files = {"stablehlo.json", "program.bin", "fastgpu_export.json"}
    separate = how == "separate"
    assert set(os.listdir(path)) == files | ({"weights.safetensors"} if separate else set())
    manifest = json.loads((path / "stablehlo.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("fastgpu-stablehlo", 1)
    assert manifest["jax"] == jax.__version__
    assert manifest["platforms"] == ["cpu", "cuda", "tpu"]
    assert manifest["inputs"][0] == {"name": "tokens", "shape": ["batch", "time"], "dtype": "int32"}
    shapes = {entry["name"]: entry["shape"] for entry in manifest["outputs"]}
    assert shapes["logits"] == ["batch", 5] and shapes["words"] == ["batch*time", 4]
    program = (path / "program.bin").read_bytes()
    assert manifest["program"] == {
        "bytes": len(program),
        "sha256": hashlib.sha256(program).hexdigest(),
    }
    assert (manifest["weights"] is not None) == separate
    assert json.loads((path / "fastgpu_export.json").read_text())["format"] == "StableHLO"
    assert str(report).startswith(f"{path}: StableHLO, ")
    assert report.variables == len(jax.tree.leaves(tagger[1]))
    (signature,) = report.signatures
    sizes = [check.sizes for check in signature.checks]
    one_and_three = [{"batch": 1, "time": 32}, {"batch": 3, "time": 40}]
    assert sizes == ([{"batch": 3, "time": 32}] if separate else one_and_three)
    assert max(check.relative_error for check in signature.checks) < 1e-5


@pytest.mark.parametrize(
    ("inputs", "named", "said"),
    [
        ((), {}, "other inputs than it has"),
        ((CALLS[0][0],) * 3, {}, "other inputs than it has"),
        (CALLS[0], {"tokens": CALLS[0][0]}, "other inputs than it has"),
        ((CALLS[0][0],), {"image": CALLS[0][1]}, "other inputs than it has"),
        ((CALLS[0][0], CALLS[1][1]), {}, "got: float32[8, 6]"),
        ((CALLS[0][0], CALLS[0][1][0]), {}, "expected: float32[batch, 6], batch = 1"),
        ((CALLS[0][0] * 1.0, CALLS[0][1]), {}, "expected: int32[batch, time]"),
        ((CALLS[0][0][:0], CALLS[0][1][:0]), {}, "sizes, of at least 1"),
    ],
)
def test_other_inputs_are_refused(exports, inputs, named, said):
    with pytest.raises(BatchError) as caught:
        load_stablehlo(exports["inside"][0])(*inputs, **named)
    assert said in str(caught.value)


def _change(folder, **fields):
    manifest = json.loads((folder / "stablehlo.json").read_text())
    (folder / "stablehlo.json").write_text(json.dumps(manifest | fields))


def _flip_a_bit(folder):
    data = bytearray((folder / "program.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "program.bin").write_bytes(data)


def _garbage_with_its_hash(folder):
    (folder / "program.bin").write_bytes(b"garbage")
    stored = {"bytes": 7, "sha256": hashlib.sha256(b"garbage").hexdigest()}
    _change(folder, program=stored)


def _link(folder):
    shutil.move(folder / "program.bin", folder.parent / "elsewhere")
    (folder / "program.bin").symlink_to(folder.parent / "elsewhere")


NO_HASH = {"bytes": 3, "sha256": "../../etc"}
HUGE = {"bytes": 1 << 40, "sha256": "0" * 64}
FLOAT = {"name": "input_0", "shape": ["batch", 4], "dtype": "float32"}
DAMAGE = {
    "a flipped bit": (_flip_a_bit, "is not the file that was exported"),
    "cut short": (lambda f: os.truncate(f / "program.bin", 100), "got: 100 bytes"),
    "no program": (lambda f: (f / "program.bin").unlink(), "got: nothing"),
    "a link": (_link, "not a link"),
    "garbage": (_garbage_with_its_hash, "is no program that JAX"),
    "no manifest": (lambda f: (f / "stablehlo.json").unlink(), "got: nothing"),
    "no JSON": (lambda f: (f / "stablehlo.json").write_text("{"), "expected: JSON"),
    "deep JSON": (lambda f: (f / "stablehlo.json").write_text("[" * 10**5), "expected: JSON"),
    "a list": (lambda f: (f / "stablehlo.json").write_text("[]"), "is no manifest"),
    "a huge manifest": (lambda f: os.truncate(f / "stablehlo.json", 1 << 21), "is too large"),
    "format": (lambda f: _change(f, format="onnx"), "is no manifest"),
    "version": (lambda f: _change(f, version=2), "got: version 2"),
    "platforms": (lambda f: _change(f, platforms=["cpu", "abacus"]), "field 'platforms'"),
    "elsewhere": (lambda f: _change(f, platforms=["tpu"]), "was not exported for cpu"),
    "other platforms": (lambda f: _change(f, platforms=["cpu"]), "do not belong together"),
    "hash": (lambda f: _change(f, program=NO_HASH), "field 'program' is damaged"),
    "size": (lambda f: _change(f, program=HUGE), "field 'program' is damaged"),
    "weights": (lambda f: _change(f, weights=HUGE), "weights.safetensors cannot be read"),
    "inputs": (lambda f: _change(f, inputs=[FLOAT]), "do not belong together"),
    "no inputs": (lambda f: _change(f, inputs=None), "field 'inputs' is damaged"),
    "twice": (lambda f: _change(f, inputs=[FLOAT, FLOAT]), "field 'inputs' is damaged"),
    "objects": (lambda f: _change(f, inputs=[FLOAT | {"dtype": "O"}]), "field 'inputs'"),
    "negative": (lambda f: _change(f, inputs=[FLOAT | {"shape": [-1]}]), "field 'inputs'"),
    "64 bits": (lambda f: _change(f, inputs=[FLOAT | {"dtype": "float64"}]), "jax_enable_x64"),
    "convention": (lambda f: _change(f, calling_convention_version=99), "calling convention 99"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_refused(small, tmp_path, kind):
    damage, said = DAMAGE[kind]
    folder = shutil.copytree(small, tmp_path / "copy")
    damage(folder)
    with pytest.raises(FileError, match=re.escape(said)) as caught:
        load_stablehlo(folder)
    assert "to do:" in str(caught.value)


def _mutated(value, rng):
    """A JSON document with one place changed."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        if rng.random() < 0.2:
            del value[key]
        else:
            value[key] = _mutated(value[key], rng)
        return value
    return rng.choice([None, True, -1, 1.5, 10**30, "x", "", [], {}, [[]], ["cpu"], "O", [{}]])


def test_no_manifest_does_more_than_be_refused(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "copy")
    manifest = folder / "stablehlo.json"
    text, rng = manifest.read_text(), random.Random(0)
    refused = 0
    for _ in range(300):
        manifest.write_text(json.dumps(_mutated(json.loads(text), rng)))
        try:
            load_stablehlo(folder)
        except FileError:
            refused += 1
    assert refused > 250


def test_separate_weights_are_checked_like_the_program(tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "outputs_of_script", _in_this_process)

    def scale(weights, x):
        return x * weights["a/b"] + weights["shift"][0].astype(np.float32)

    weights = {"shift": [np.array([2, 3], jnp.int4)], "a/b": np.float32(3)}
    with pytest.raises(ExportError, match="got: int4"):
        export_stablehlo(scale, weights, tmp_path / "out", inputs=(None, 2), weights="separate")
    weights["shift"] = [np.array([2, 3], np.int8)]
    export_stablehlo(scale, weights, tmp_path / "out", inputs=(None, 2), weights="separate")
    outputs = load_stablehlo(tmp_path / "out")(np.ones((1, 2)))["output_0"]
    np.testing.assert_array_equal(outputs, [[5, 6]])

    stored = tmp_path / "out" / "weights.safetensors"
    for data, said in ((b"garbage!!", "cannot be read"), (None, "do not belong together")):
        save_file({"a/b": np.float32([3])}, stored) if data is None else stored.write_bytes(data)
        with pytest.raises(FileError, match="is not the file that was exported"):
            load_stablehlo(tmp_path / "out")
        described = dataclasses.asdict(describe_file(stored))
        _change(tmp_path / "out", weights=described)
        with pytest.raises(FileError, match=said):
            load_stablehlo(tmp_path / "out")


def test_programs_that_bring_code_along_are_refused(small, tmp_path):
    text = 'custom_call @lapack_spotrf_ffi(%0) custom_call @cusolver_potrf_ffi custom_call @"Eigh"'
    assert unknown_custom_calls(text) == []
    foreign = ["tpu_custom_call", "xla_ffi_python_cpu_callback", "xla_python_gpu_callback"]
    text = " ".join(f"stablehlo.custom_call @{name}(%0)" for name in foreign)
    assert unknown_custom_calls(text) == foreign

    # written around the exporter, which would not write it
    def call(x):
        return {"output_0": jax.ffi.ffi_call("brought_along", x)(x)}

    allowed = [jax.export.DisabledSafetyCheck.custom_call("brought_along")]
    exported = jax.export.export(jax.jit(call), disabled_checks=allowed, platforms=("cpu", "cuda"))
    folder = shutil.copytree(small, tmp_path / "foreign")
    (folder / "program.bin").write_bytes(exported(np.ones((3,), np.float32)).serialize())
    one = {"shape": [3], "dtype": "float32"}
    _change(
        folder,
        program=dataclasses.asdict(describe_file(folder / "program.bin")),
        inputs=[one | {"name": "input_0"}],
        outputs=[one | {"name": "output_0"}],
    )
    with pytest.raises(FileError, match="calls code that does not belong to XLA") as refused:
        load_stablehlo(folder)
    assert "got: brought_along" in str(refused.value)


def test_what_calls_python_cannot_be_exported(tmp_path):
    shape = jax.ShapeDtypeStruct((2,), np.float32)
    for inputs in ([shape], [(None, 2)]):
        with pytest.raises(ExportError) as caught:
            export_stablehlo(
                lambda _, x: jax.pure_callback(np.sin, shape, x[..., :2].reshape(-1)[:2]),
                {},
                tmp_path / "out",
                inputs=inputs,
            )
        assert "callback" in str(caught.value)
    assert os.listdir(tmp_path) == []


REFUSED = {
    "no such platform": ({"platforms": ("cpu", "gpu")}, "names from cpu, cuda, rocm, tpu"),
    "no platform": ({"platforms": ()}, "unknown platforms"),
    "not here": ({"platforms": ("tpu",)}, "cannot be verified on this machine"),
    "weights": ({"weights": "nowhere"}, 'expected: "inside" or "separate"'),
    "sizes": ({"inputs": [("batch", 4)]}, "cannot be lowered for cpu, cuda"),
    "sample": ({"sample": np.ones((2, 4))}, "another shape than the input"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_exported_leaves_nothing(tmp_path, kind):
    settings, said = REFUSED[kind]
    with pytest.raises(ExportError) as caught:
        export_stablehlo(
            lambda w, x: x @ w,
            np.ones((3, 2)),
            tmp_path / "out",
            **{"inputs": [(None, 3)], **settings},
        )
    assert said in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_large_weights_are_asked_to_be_separate(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgpu.exporters.stablehlo.LARGEST_PROGRAM", 1 << 10)
    with pytest.raises(ExportError, match='weights="separate"'):
        export_stablehlo(lambda w, x: x * w, np.ones(999), tmp_path / "out", inputs=(None, 999))
    monkeypatch.setattr(lowering, "LARGEST_PROGRAM", 1 << 10)
    baked = jnp.arange(999.0)
    with pytest.raises(ExportError, match="arrays baked into it"):
        export_stablehlo(lambda _, x: x * baked, {}, tmp_path / "out", inputs=(None, 999))
    assert os.listdir(tmp_path) == []


def test_a_reloaded_copy_with_other_numbers_leaves_nothing(small, tmp_path, monkeypatch):
    def off_by_a_thousandth(*arguments):
        return [
            {name: value * 1.001 for name, value in result.items()}
            for result in _in_this_process(*arguments)
        ]

    monkeypatch.setattr(verification, "outputs_of_script", off_by_a_thousandth)
    model = (lambda w, x: x @ w, np.ones((3, 2)))
    with pytest.raises(ExportError, match="other numbers"):
        export_stablehlo(*model, tmp_path / "out", inputs=(None, 3))
    folder = shutil.copytree(small, tmp_path / "old")
    with pytest.raises(ExportError, match="other numbers"):
        export_stablehlo(*model, folder, inputs=(None, 3), overwrite=True)
    assert os.listdir(tmp_path) == ["old"]
    assert load_stablehlo(folder)(np.ones((1, 3)))["output_0"].shape == (1, 2)
    export_stablehlo(*model, folder, inputs=(None, 3), overwrite=True, tolerance=0.01)


def test_a_process_that_fails_leaves_nothing_and_is_quoted(tmp_path, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("raise MemoryError('out of it')")
    monkeypatch.setattr("fastgpu.exporters.reload_stablehlo.__file__", str(broken))
    with pytest.raises(ExportError, match="got: MemoryError: out of it"):
        export_stablehlo(lambda w, x: x, {}, tmp_path / "out", inputs=(None, 3))
    assert os.listdir(tmp_path) == ["broken.py"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_keras_file_becomes_a_program(tmp_path):
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    image, extra = keras.Input((None, None, 2), name="image"), keras.Input((5,), name="extra")
    x = layers.BatchNormalization()(layers.Conv2D(6, 3, activation="relu")(image))
    x = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), layers.Dense(4)(extra)])
    keras_model = keras.Model([image, extra], {"tags": layers.Dense(9, "sigmoid")(x)})
    keras_model.save(tmp_path / "model.keras")
    imported = from_keras(tmp_path / "model.keras")
    export_stablehlo(imported.module, imported.variables, tmp_path / "out")
    model = load_stablehlo(tmp_path / "out")
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=size).astype(np.float32) for size in ((4, 9, 7, 2), (4, 5))]
    np.testing.assert_allclose(
        model(*arrays)["tags"], keras_model.predict(arrays, verbose=0)["tags"], rtol=1e-4, atol=1e-5
    )
