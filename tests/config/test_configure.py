"""`configure` runs once per process, so each test asks a new one, several things at a time."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpu.config import Configuration, _delete_oldest
from fastgpu.errors import ConfigurationError
from fastgpu.hardware.backend import first_use_of_jax


def run(program: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `program` as a file in an environment without JAX settings and with its own home."""
    script = tmp_path / "script.py"
    script.write_text(program)
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "XLA_", "KERAS_"))
    }
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env=inherited | home | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_importing_starts_no_backend_and_configure_does(tmp_path: Path) -> None:
    result = run(
        """
import fastgpu, fastgpu.config
from fastgpu.hardware.backend import backend_started
assert not backend_started()
assert not backend_started(), "asking started it"
fastgpu.configure(quiet=True)
assert backend_started()
""",
        tmp_path,
        JAX_PLATFORMS="cpu",
    )
    # `import jax` itself logs that a machine with the CUDA plugin has no GPU.
    notice = re.compile("cudart_stub|absl::InitializeLog")
    lines = [line for line in result.stderr.splitlines() if not notice.search(line)]
    assert (result.returncode, result.stdout, lines) == (0, "", [])


def test_what_is_asked_for_is_in_force_and_printed(tmp_path: Path) -> None:
    result = run(
        """
import json, os
import jax, jaxlib.xla_client, optax
import fastgpu as fgpu
c = fgpu.configure(device="cpu", precision="float32", preallocate=False, memory_fraction=0.5,
                   deterministic=True, seed=7, log_level="error")
gpu = jaxlib.xla_client.generate_pjrt_gpu_plugin_options()  # what JAX hands its GPU plugin
dot = jax.make_jaxpr(lambda x: x @ x)(jax.numpy.ones((2, 2))).eqns[0]
assert c.platform == jax.default_backend() == "cpu"
assert dot.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
assert gpu["preallocate"] is False and float(gpu["memory_fraction"]) == 0.5, gpu
assert os.environ["XLA_FLAGS"].split() == ["--xla_cpu_enable_fast_math=false",
                                           "--xla_gpu_deterministic_ops=true"]
assert (jax.random.key_data(c.rng) == jax.random.key_data(jax.random.key(7))).all()
assert c.cache_dir is not None and str(c.cache_dir) in str(c)

again = fgpu.configure(device="cpu", precision="tf32", deterministic=True, seed=8, cache=False)
assert (again.preallocate, again.precision, again.seed, again.cache_dir) == (False, "tf32", 8, None)
dot = jax.make_jaxpr(lambda x: x @ x)(jax.numpy.ones((2, 2))).eqns[0]
assert dot.params["precision"] == (jax.lax.Precision.HIGH,) * 2

def product(**settings):
    closed = jax.make_jaxpr(fgpu.optimize(lambda x: x @ x, **settings))(jax.numpy.ones((2, 2)))
    (dot,) = (eqn for eqn in fgpu.ir.walk(closed) if eqn.primitive.name == "dot_general")
    return dot.invars[0].aval.dtype.name, dot.params["precision"]

exact, low = (jax.lax.Precision.HIGHEST,) * 2, (jax.lax.Precision.DEFAULT,) * 2
assert product() == ("float32", (jax.lax.Precision.HIGH,) * 2)
assert product(precision="float32") == ("float32", exact)
assert product(precision="bf16-mixed") == ("bfloat16", low)
fgpu.configure(precision="fp16-mixed", deterministic=True, cache=False, quiet=True)
assert product() == ("float16", low)
assert product(precision="default") == ("float32", low)
assert product(precision={}) == ("float32", None)
state = fgpu.TrainState.create({"params": jax.numpy.ones(2)}, optax.sgd(1.0), rng=0)
assert state.loss_scale is not None
""",
        tmp_path,
        XLA_FLAGS="--xla_cpu_enable_fast_math=false",
        XLA_PYTHON_CLIENT_MEM_FRACTION="0.9",
    )
    assert result.returncode == 0, result.stderr
    assert "fastgpu runs on cpu (asked for: cpu)" in result.stdout
    assert "seed 7, deterministic on, log level error" in result.stdout
    assert "precision      tf32" in result.stdout and "compile cache  off" in result.stdout


@pytest.mark.parametrize("device", ["gpu", "cuda:1"])
def test_without_a_gpu_it_falls_back_to_the_cpu_and_says_so(device: str, tmp_path: Path) -> None:
    result = run(
        f"""
import fastgpu as fgpu
c = fgpu.configure(device={device!r}, quiet=True)
assert (c.device, c.platform) == ({device!r}, "cpu")
fgpu.configure(device={device!r}, quiet=True)
fgpu.configure(device="cpu", quiet=True)  # that is what runs
""",
        tmp_path,
        CUDA_VISIBLE_DEVICES="",
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("running on the CPU") == 1
    assert device in result.stderr and "fastgpu[cuda12]" in result.stderr


def test_a_platform_that_cannot_start_falls_back_too(tmp_path: Path) -> None:
    result = run(
        "import fastgpu\nassert fastgpu.configure(quiet=True).platform == 'cpu'",
        tmp_path,
        JAX_PLATFORMS="nonsense",
    )
    assert result.returncode == 0, result.stderr
    assert "running on the CPU: Unable to initialize backend 'nonsense'" in result.stderr


def test_too_late_it_names_the_line_to_move_and_what_started_jax(tmp_path: Path) -> None:
    program = """
import jax
import jax.numpy as jnp
import fastgpu as fgpu
f = jax.jit(lambda x: jnp.zeros(3) + x)
x = jnp.ones(3)
fgpu.configure()
"""
    result = run(program, tmp_path, JAX_PLATFORMS="cpu")
    script = tmp_path / "script.py"
    assert result.returncode == 1
    assert "ConfigurationError: configure was called after JAX had started" in result.stderr
    assert f"to do: move {script}:7 above {script}:6 `x = jnp.ones(3)`" in result.stderr


def test_too_late_because_of_an_array_in_another_module(tmp_path: Path) -> None:
    (tmp_path / "constants.py").write_text("import jax.numpy as jnp\nMEAN = jnp.zeros(3)\n")
    program = "import constants\nimport fastgpu\nfastgpu.configure()\n"
    result = run(program, tmp_path, JAX_PLATFORMS="cpu")
    assert f"{tmp_path / 'constants.py'}, where the global `MEAN` is an array" in result.stderr


def test_what_needs_a_restart_cannot_change_in_a_second_call(tmp_path: Path) -> None:
    result = run(
        """
import fastgpu as fgpu
from fastgpu.errors import ConfigurationError
first = fgpu.configure(device="cpu", quiet=True)
for change in ({"device": "gpu"}, {"memory_fraction": 0.5}, {"deterministic": True}):
    (name, value), = change.items()
    try:
        fgpu.configure(**change)
    except ConfigurationError as error:
        assert f"`{name}` cannot change" in str(error), error
        assert f"got: {name}={value!r} at {__file__}:8" in str(error), error
        assert "first call" in error.fix
    else:
        raise AssertionError(change)
assert fgpu.configure(quiet=True) == first
""",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr


def test_compiled_programs_are_kept_for_the_next_process(tmp_path: Path) -> None:
    program = """
import json, sys
import jax, jax.numpy as jnp
import fastgpu as fgpu
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
c = fgpu.configure(device="cpu", quiet=True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(json.dumps([str(c.cache_dir), events.count("/jax/compilation_cache/cache_hits")]))
"""
    first = json.loads(run(program, tmp_path).stdout)
    second = json.loads(run(program, tmp_path).stdout)
    assert first == [str(tmp_path / "cache" / "fastgpu" / "xla"), 0]
    assert second[1] > 0
    named = json.loads(run(program, tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "n")).stdout)
    assert named == [str(tmp_path / "n"), 0]


def test_a_cache_folder_that_cannot_be_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, where a folder should be")
    result = run(
        f"""
import fastgpu as fgpu
c = fgpu.configure(device="cpu", cache={str(tmp_path / "file" / "cache")!r})
assert c.cache_dir is None
""",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "compiled programs will not be kept" in result.stderr
    assert "compile cache  off" in result.stdout


def test_the_oldest_programs_are_deleted_beyond_the_limit(tmp_path: Path) -> None:
    for age, name in enumerate(["new-cache", "old-cache", "older-cache"]):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (tmp_path / "not ours").write_bytes(b"x" * 100)
    _delete_oldest(tmp_path, limit_bytes=25)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new-cache", "not ours", "old-cache"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"device": "gpu:x"}, "'cuda:N'"),
        ({"precision": "float8"}, "'default', 'float32', 'tf32', 'bfloat16'"),
        ({"precision": "mixed_bfloat16"}, "'tf32', 'bfloat16', 'bf16-mixed', 'fp16-mixed'"),
        ({"memory_fraction": 90}, r"\(0, 1\]"),
        ({"log_level": "loud"}, "'warning'"),
        ({"seed": -1}, "an int in"),
    ],
)
def test_unknown_settings_are_refused_before_anything_is_set(
    settings: dict[str, object], expected: str
) -> None:
    from fastgpu import configure

    before = dict(os.environ)
    with pytest.raises(ConfigurationError, match=expected) as error:
        configure(**settings)  # pyright: ignore[reportArgumentType]
    ((name, value),) = settings.items()
    assert f"`{name}`" in error.value.summary and error.value.got == repr(value)
    assert dict(os.environ) == before


def test_lazy_calls_are_not_taken_for_the_first_use(tmp_path: Path) -> None:
    script = tmp_path / "lazy.py"
    script.write_text(
        "import sys\nimport jax\nfrom jax import numpy as jnp\n"
        "g = jax.grad(lambda x: jnp.sum(x))\n"
        "def f(x):\n    return jnp.sin(x)\n"
        "spec = jax.ShapeDtypeStruct((1,), 'float32')\n"
        "frame = sys._getframe()\n"
        "n = jax.devices\n"
    )
    scope: dict[str, object] = {}
    exec(compile(script.read_text(), str(script), "exec"), scope)
    found = first_use_of_jax(scope["frame"])  # pyright: ignore[reportArgumentType]
    # Other test modules in this process may well hold arrays: this script must not be blamed.
    assert "lazy.py" not in (found or "")


def test_a_configuration_is_frozen() -> None:
    configuration = Configuration(
        "auto", "cpu", ("cpu",), "default", None, None, None, None, False, 0, "warning"
    )
    with pytest.raises(AttributeError):
        configuration.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
