"""Compile for a GPU that is not in the machine.

XLA's GPU compiler needs a description of the device, not the device: cores, memory, caches,
compute capability and library versions. The program that comes out is the one that the device
would run, so its memory figures are the compiler's own. Only what would have to be timed on the
device (autotuning) is left out.

The warning: a compiler without a device picks default algorithms for convolutions and matrix
products, so scratch memory of the fastest algorithm may differ by some megabytes.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fastgpu.errors import ConfigurationError, MissingExtraError
from fastgpu.hardware import Device, Geometry, Target, parse_target

# Without a device there is nothing to time: neither algorithms nor the tiles of Triton kernels.
GPU_OPTIONS: dict[str, Any] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def absent_devices(target: str | Device | Target) -> list[Any]:
    """The devices of a GPU target as compile-only `jax.Device` objects, host by host.

    Use them in a `jax.sharding.Mesh` to describe shardings for a cluster that is not here.

    Raises `MissingExtraError` without the `plan` extra, `ConfigurationError` for an unknown target
    or one that is no GPU.
    """
    chosen = parse_target(target)
    if chosen.device.geometry is None:
        raise ConfigurationError(
            f"target {str(chosen)!r} is no GPU, so there is no absent device to compile for",
            expected="a GPU such as 'h100'",
            got=chosen.device.platform,
        )
    return list(_devices(chosen))


def absent_mesh(target: str | Device | Target) -> jax.sharding.Mesh:
    """A mesh with the axes "hosts" and "devices" over `absent_devices(target)`.

    >>> dict(absent_mesh("h100:4x8").shape)
    {'hosts': 4, 'devices': 8}
    """
    chosen = parse_target(target)
    devices = np.array(absent_devices(chosen), dtype=object)
    shape = (chosen.hosts, chosen.devices_per_host)
    return jax.sharding.Mesh(devices.reshape(shape), ("hosts", "devices"))


# XLA's CPU compiler removes barriers before it merges equal equations, which undoes recomputation
# (jax issue 19822), and by default orders equations for concurrency at the expense of memory.
_CPU_OPTIONS = {
    "xla_disable_hlo_passes": "cse_barrier_expander",
    "xla_cpu_enable_concurrency_optimized_scheduler": False,
}


def options_for(platform: str) -> dict[str, Any] | None:
    """Compiler options under which a memory plan holds on `platform`: `jax.jit` takes them.

    >>> sorted(options_for("cpu"))[1]
    'xla_disable_hlo_passes'
    """
    return dict(_CPU_OPTIONS) if platform == "cpu" else None


def compile_for(
    fn: Callable[..., Any],
    args: Sequence[Any],
    target: str | Device | Target | None,
    *,
    donate_argnums: tuple[int, ...] = (),
    out_shardings: Any = None,
) -> Any:
    """Compile `fn(*args)` for a target; arguments are arrays or `jax.ShapeDtypeStruct`.

    For a GPU the arguments go to the first absent device, unless they carry a sharding of their
    own over `absent_devices(target)`. For "cpu" or `None` the program is compiled for what JAX
    runs on. Returns what `jax.jit(fn).lower(*args).compile()` returns; a program for an absent
    device can be read, not run.

    >>> import jax, jax.numpy as jnp
    >>> from fastgpu.compile import memory_report
    >>> compiled = compile_for(jnp.sin, [jax.ShapeDtypeStruct((256,), jnp.float32)], "cpu")
    >>> memory_report(compiled).output_bytes
    1024
    """
    chosen = None if target is None else parse_target(target)
    structs = [jax.tree.map(shape_of, arg) for arg in args]
    if chosen is None or chosen.device.geometry is None:
        options = options_for("cpu" if chosen else jax.default_backend())
    else:
        placed = jax.sharding.SingleDeviceSharding(_devices(chosen)[0])
        structs = [jax.tree.map(functools.partial(_place, placed), arg) for arg in structs]
        options = GPU_OPTIONS
    keywords = {} if out_shardings is None else {"out_shardings": out_shardings}
    jitted = jax.jit(fn, donate_argnums=donate_argnums, **keywords)
    return jitted.lower(*structs).compile(compiler_options=options)


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and (of a struct only) sharding of an array, a number or a struct."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    aval = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def plain_shape(leaf: Any) -> jax.ShapeDtypeStruct:
    """`shape_of(leaf)` without its sharding: the whole value, as if on one device."""
    struct = shape_of(leaf)
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, weak_type=struct.weak_type)


def _place(sharding: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return leaf if leaf.sharding is not None else leaf.update(sharding=sharding)


@functools.cache
def _devices(target: Target) -> tuple[Any, ...]:
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise MissingExtraError(
            f"compiling for {str(target)!r} needs XLA's GPU compiler, which is not installed",
            expected="the packages of the extra 'plan' (no GPU and no CUDA libraries are needed)",
            got="jax-cuda12-plugin is missing",
            fix="pip install 'fastgpu[plan]'",
        )
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name=str(target),
        topology=f"{target.hosts}x{target.devices_per_host}x1",
        target_config=target_config(target.device),
    )
    return tuple(np.asarray(topology.devices, dtype=object))


def target_config(device: Device) -> str:
    """The description of a GPU that XLA's compiler asks for, as the text of its protocol buffer.

    >>> from fastgpu.hardware import device
    >>> "core_count: 132" in target_config(device("h100"))
    True
    """
    geometry = device.geometry
    assert isinstance(geometry, Geometry), device
    major, minor = geometry.compute_capability
    # Compute capabilities 9.0 and 10.0 exist with their own instructions, which XLA uses.
    feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {geometry.shared_memory_per_core}
  shared_memory_per_block_optin: {geometry.shared_memory_per_block}
  threads_per_core_limit: {geometry.threads_per_core}
  core_count: {geometry.cores}
  fpus_per_core: {geometry.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {int(device.bandwidth)}
  l2_cache_size: {geometry.l2_cache_bytes}
  clock_rate_ghz: {geometry.clock_ghz}
  device_memory_size: {device.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
  name: "{device.name}"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{device.name}"
"""
