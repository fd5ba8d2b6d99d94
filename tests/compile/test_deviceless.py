"""Compiling for GPUs that are not in the machine: XLA's GPU compiler, and its own figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastgpu.compile import absent_devices, compile_for, memory_report
from fastgpu.compile.budget import count_collectives
from fastgpu.errors import ConfigurationError, MissingExtraError
from fastgpu.hardware import DEVICES

GPUS = [name for name, d in DEVICES.items() if d.platform == "cuda"]
X = jax.ShapeDtypeStruct((256, 512), jnp.float32)
W = jax.ShapeDtypeStruct((512, 1024), jnp.float32)


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_a_compiler(name):
    compiled = compile_for(lambda x, w: jnp.tanh(x @ w), (X, W), name)
    memory = memory_report(compiled)
    assert memory.argument_bytes == (256 * 512 + 512 * 1024) * 4
    assert memory.output_bytes == 256 * 1024 * 4
    assert "gemm" in compiled.as_text() or "triton" in compiled.as_text()


def test_donated_arguments_are_aliased():
    compiled = compile_for(lambda x: x * 2, (X,), "h100", donate_argnums=(0,))
    memory = memory_report(compiled)
    assert memory.alias_bytes == memory.output_bytes == X.size * 4
    assert memory.peak_bytes == X.size * 4 + memory.temp_bytes + memory.code_bytes


def test_a_sharded_program_reports_one_device_and_its_collectives():
    devices = np.array(absent_devices("h100:2x4")).reshape(2, 4)
    mesh = Mesh(devices, ("data", "model"))

    def place(struct, *spec):
        return struct.update(sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    compiled = compile_for(
        lambda x, w: jnp.sum(x @ w), (place(X, "data"), place(W, None, "model")), "h100:2x4"
    )
    memory = memory_report(compiled)
    assert memory.argument_bytes == (256 // 2 * 512 + 512 * 1024 // 4) * 4
    assert count_collectives(compiled.as_text())["all-reduce"] >= 1


def test_a_cpu_has_no_absent_devices():
    with pytest.raises(ConfigurationError, match="expected: a GPU"):
        absent_devices("cpu")


def test_without_the_extra_the_error_names_the_pip_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fastgpu\[plan\]'"):
        absent_devices("t4:3")
