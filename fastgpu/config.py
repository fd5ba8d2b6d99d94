"""What has to be settled before JAX starts: device, precision, memory, compilation cache, Keras.

The one warning: JAX reads most of this once, when its backend starts. Call `configure` first.
"""

import logging
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from types import FrameType
from typing import Literal, get_args

import jax
import platformdirs
from jax.experimental.compilation_cache import compilation_cache

from fastgpu.errors import ConfigurationError
from fastgpu.hardware.after_import import after_import
from fastgpu.hardware.backend import backend_started, first_use_of_jax
from fastgpu.hardware.sizes import parse_budget

Precision = Literal["default", "float32", "tf32", "bfloat16", "bf16-mixed", "fp16-mixed"]
LogLevel = Literal["debug", "info", "warning", "error"]

_MATMUL_PRECISION = {
    "default": None,
    "float32": "float32",
    "tf32": "tensorfloat32",
    "bfloat16": "bfloat16",
    # Not a setting of JAX's: fastgpu's transforms ask for it.
    "bf16-mixed": None,
    "fp16-mixed": None,
}
_CACHE_LIMIT_BYTES = 4 * 2**30
_CACHE_MIN_COMPILE_SECONDS = 0.5  # below it, reading the file costs what compiling does
_KERAS_TRAINER = "keras.src.backend.jax.trainer"
_ACCELERATE_ALL = "fastgpu.keras_integration:accelerate_all"
_log = logging.getLogger("fastgpu")
_keras_accelerated = False
_in_force: "Configuration | None" = None


@dataclass(frozen=True)
class Configuration:
    """What is in force after `configure`. Sizes are in bytes, `memory_fraction` is of one GPU.

    `device` is what was asked for, `platform` and `device_names` are what runs. `None` means that
    JAX's own default (or the environment) decides.

    >>> c = Configuration(
    ...     "auto", "cpu", ("cpu",), "default", None, None, "8GiB", None, False, 0, "warning"
    ... )
    >>> print(c)
    fastgpu runs on cpu (asked for: auto)
      devices        cpu
      precision      default
      GPU memory     preallocate: JAX's default, fraction: JAX's default
      Keras steps    within 8GiB
      compile cache  off
      seed 0, deterministic off, log level warning
    """

    device: str
    platform: str
    device_names: tuple[str, ...]
    precision: Precision
    preallocate: bool | None
    memory_fraction: float | None
    memory_budget: int | float | str | None
    cache_dir: Path | None
    deterministic: bool
    seed: int
    log_level: LogLevel

    @property
    def rng(self) -> jax.Array:
        """A new JAX random key made from `seed`: the same one at each access."""
        return jax.random.key(self.seed)

    def __str__(self) -> str:
        def shown(value: object) -> str:
            return "JAX's default" if value is None else str(value)

        return "\n".join(
            (
                f"fastgpu runs on {self.platform} (asked for: {self.device})",
                f"  devices        {', '.join(self.device_names)}",
                f"  precision      {self.precision}",
                f"  GPU memory     preallocate: {shown(self.preallocate)}, "
                f"fraction: {shown(self.memory_fraction)}",
                f"  Keras steps    within {self.memory_budget or 'any memory'}",
                f"  compile cache  {self.cache_dir or 'off'}",
                f"  seed {self.seed}, deterministic {'on' if self.deterministic else 'off'}, "
                f"log level {self.log_level}",
            )
        )


def configure(
    device: str = "auto",
    *,
    precision: Precision = "default",
    preallocate: bool | None = None,
    memory_fraction: float | None = None,
    memory_budget: int | float | str | None = None,
    cache: bool | str | os.PathLike[str] = True,
    keras: bool = True,
    deterministic: bool = False,
    seed: int = 0,
    log_level: LogLevel = "warning",
    quiet: bool = False,
) -> Configuration:
    """Settle device, precision, memory, compilation cache and seed; start JAX; print the result.

    Args:
      device: "auto" (a GPU if JAX finds one; `JAX_PLATFORMS` is respected), "cpu", "gpu", or
        "cuda:1" to see only that GPU. Where there is no such GPU the program runs on the CPU, and
        a warning says so.
      precision: of float32 matrix products and convolutions, as `jax_default_matmul_precision`.
        "default" is the device's own (TF32 on recent NVIDIA GPUs); "float32" is exact; "tf32" and
        "bfloat16" allow as little as that, and a device that has no such unit computes with more
        (NVIDIA GPUs take TF32 for both, CPUs take float32). Arrays keep their dtypes.
        "bf16-mixed" and "fp16-mixed" are the default of `precision=` in `optimize`,
        `value_and_grad` and `train_step`; other programs, and Keras's, stay as they are.
      preallocate: whether JAX takes its share of GPU memory at once.
      memory_fraction: that share, in (0, 1].
      memory_budget: what a Keras model's training step may take, weights and optimizer included:
        bytes, "8GiB", or "60%" of what it takes otherwise. `None` is no budget. Of a step of your
        own it is `fastgpu.train_step` that takes a budget.
      cache: where compiled programs are kept between runs: True for the user's cache folder (or
        `JAX_COMPILATION_CACHE_DIR`), a path, or False. A folder that cannot be written is warned
        about and left out. Beyond 4 GiB the oldest programs are deleted.
      keras: whether Keras models, `tf.keras` included, train on JAX through fastgpu's passes. For
        programs that import Keras or TensorFlow after this call. `KERAS_BACKEND` is respected: set
        to another backend, or with Keras imported before, Keras stays as it is.
      deterministic: run-to-run equal numbers on GPUs (XLA's `--xla_gpu_deterministic_ops`, which
        gives up autotuning and some fast kernels).
      seed: recorded; `Configuration.rng` is the random key made from it.
      log_level: of the `fastgpu` and `jax` loggers.
      quiet: print nothing.

    A second call may change everything that needs no restart: precision, memory_budget, cache,
    seed, log level.

    Raises:
      ConfigurationError: a setting is unknown, or JAX has started already and cannot take it; the
        message names the line to move.

    >>> configuration = configure(device="cpu", seed=7)  # doctest: +SKIP
    fastgpu runs on cpu (asked for: cpu)
    ...
    """
    global _in_force
    _check_values(device, precision, memory_fraction, seed, log_level)
    if memory_budget is not None:
        parse_budget(memory_budget, lambda: 1000)
    needs_restart = {
        "device": device,
        "preallocate": preallocate,
        "memory_fraction": memory_fraction,
        "deterministic": deterministic,
    }
    if _in_force is None:
        _refuse_if_too_late(sys._getframe(1))
        _set_environment(device, preallocate, memory_fraction, deterministic)
    else:
        _refuse_changes(_in_force, needs_restart, sys._getframe(1))
    _set_log_level(log_level)
    jax.config.update("jax_default_matmul_precision", _MATMUL_PRECISION[precision])
    cache_dir = _set_cache(cache)
    if keras:
        _accelerate_keras()
    if _in_force is None:
        platform, names = _start(device)
        _in_force = Configuration(
            device,
            platform,
            names,
            precision,
            preallocate,
            memory_fraction,
            memory_budget,
            cache_dir,
            deterministic,
            seed,
            log_level,
        )
    else:
        _in_force = replace(
            _in_force,
            precision=precision,
            memory_budget=memory_budget,
            cache_dir=cache_dir,
            seed=seed,
            log_level=log_level,
        )
    if not quiet:
        print(_in_force)
    return _in_force


def default_precision() -> str | None:
    """The mixed precision that transforms take when they are given none, if `configure` set one.

    >>> default_precision() is None
    True
    """
    return _in_force.precision if _in_force and "mixed" in _in_force.precision else None


def default_memory_budget() -> int | float | str | None:
    """What Keras's training steps may take, if `configure` set it.

    >>> default_memory_budget() is None
    True
    """
    return _in_force.memory_budget if _in_force else None


def _check_values(
    device: str, precision: str, memory_fraction: float | None, seed: int, log_level: str
) -> None:
    def check(good: bool, name: str, expected: str, got: object) -> None:
        if not good:
            raise ConfigurationError(
                f"configure: `{name}` is not a known setting", expected=expected, got=repr(got)
            )

    check(
        isinstance(device, str) and bool(re.fullmatch(r"auto|cpu|gpu|cuda(:\d+)?", device)),
        "device",
        "'auto', 'cpu', 'gpu' or 'cuda:N' (N counts the visible GPUs from 0)",
        device,
    )
    check(precision in _MATMUL_PRECISION, "precision", _options(Precision), precision)
    check(log_level in get_args(LogLevel), "log_level", _options(LogLevel), log_level)
    check(
        memory_fraction is None or 0 < memory_fraction <= 1,
        "memory_fraction",
        "a number in (0, 1], or None",
        memory_fraction,
    )
    check(isinstance(seed, int) and 0 <= seed < 2**63, "seed", "an int in [0, 2**63)", seed)


def _options(literal: object) -> str:
    return ", ".join(map(repr, get_args(literal)))


def _refuse_if_too_late(caller: FrameType) -> None:
    if not backend_started():
        return
    culprit = first_use_of_jax(caller)
    raise ConfigurationError(
        "configure was called after JAX had started, when it no longer reads its environment",
        expected="a call before the first array is made or the first device is asked for",
        got=f"a call at {_line(caller)}" + (f"; JAX was used at {culprit}" if culprit else ""),
        fix=f"move {_line(caller)} above "
        + (culprit or "the first use of JAX, best to right after the imports"),
    )


def _refuse_changes(now: Configuration, asked: dict[str, object], caller: FrameType) -> None:
    satisfied = {
        "device": ("auto", now.device, now.platform),
        "preallocate": (None, now.preallocate),
        "memory_fraction": (None, now.memory_fraction),
        "deterministic": (now.deterministic,),
    }
    changed = [name for name, value in asked.items() if value not in satisfied[name]]
    if changed:
        raise ConfigurationError(
            f"JAX has started, so {', '.join(f'`{name}`' for name in changed)} cannot change",
            expected=", ".join(f"{name}={getattr(now, name)!r}" for name in changed),
            got=", ".join(f"{name}={asked[name]!r}" for name in changed) + f" at {_line(caller)}",
            fix="pass these settings in the program's first call of configure",
        )


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _set_environment(
    device: str, preallocate: bool | None, memory_fraction: float | None, deterministic: bool
) -> None:
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif device != "auto":  # asked for in code: stronger than JAX_PLATFORMS
        jax.config.update("jax_platforms", None)
    if device.startswith("cuda:"):
        jax.config.update("jax_cuda_visible_devices", device.removeprefix("cuda:"))
    if preallocate is not None:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = str(preallocate).lower()
    if memory_fraction is not None:
        os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # JAX refuses to see both names
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(memory_fraction)
    if deterministic:
        flags = os.environ.get("XLA_FLAGS", "").split()
        os.environ["XLA_FLAGS"] = " ".join([*flags, "--xla_gpu_deterministic_ops=true"])


def _set_log_level(log_level: LogLevel) -> None:
    _log.setLevel(log_level.upper())
    # "warning" is what JAX does unasked; setting it would undo the user's TF_CPP_MIN_LOG_LEVEL
    for_jax = "NOTSET" if log_level == "warning" else log_level.upper()
    jax.config.update("jax_logging_level", for_jax)


def _set_cache(cache: bool | str | os.PathLike[str]) -> Path | None:
    """Point JAX at the cache folder; None if there is none, or none that can be written."""
    folder = _cache_folder(cache)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
            _delete_oldest(folder, _CACHE_LIMIT_BYTES)
        except OSError as error:
            _log.warning("compiled programs will not be kept: %s", error)
            folder = None
    compilation_cache.reset_cache()  # JAX decides once, at its first compilation, whether to use it
    jax.config.update("jax_compilation_cache_dir", None if folder is None else str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _CACHE_MIN_COMPILE_SECONDS)
    return folder


def _accelerate_keras() -> None:
    """Choose Keras's JAX backend, and what happens when it is imported."""
    global _keras_accelerated
    if _keras_accelerated:
        return
    if os.environ.setdefault("KERAS_BACKEND", "jax") != "jax":
        _log.info("Keras is left alone: KERAS_BACKEND=%s", os.environ["KERAS_BACKEND"])
        return
    if "keras" in sys.modules and _KERAS_TRAINER not in sys.modules:
        _log.warning(
            "Keras was imported before fastgpu.configure() and does not run on JAX: it is left as "
            "it is. Move configure() above the first import of Keras or TensorFlow"
        )
        return
    # TensorFlow, which may still read the data, must not take a GPU's whole memory.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    _keras_accelerated = True
    # By name: what does it lies layers above, and is imported when Keras is.
    after_import(_KERAS_TRAINER, lambda trainer: resolve_name(_ACCELERATE_ALL)(trainer))


def _cache_folder(cache: bool | str | os.PathLike[str]) -> Path | None:
    if cache is False:
        return None
    if cache is True:
        named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
        return Path(named) if named else platformdirs.user_cache_path("fastgpu") / "xla"
    return Path(cache).expanduser().absolute()


def _delete_oldest(folder: Path, limit_bytes: int) -> None:
    entries = sorted(
        ((stat.st_mtime, stat.st_size, path) for path, stat in _files(folder)), reverse=True
    )
    kept = 0
    for _, size, path in entries:
        kept += size
        if kept > limit_bytes:
            path.unlink(missing_ok=True)  # another process may have been faster


def _files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    return [(Path(e.path), e.stat()) for e in os.scandir(folder) if e.name.endswith("-cache")]


def _start(device: str) -> tuple[str, tuple[str, ...]]:
    """Start the backend; returns its platform and the names of its devices."""
    try:
        devices = jax.devices()
    except RuntimeError as error:
        jax.config.update("jax_platforms", "cpu")
        devices = jax.devices()
        _log.warning("running on the CPU: %s", str(error).splitlines()[0])
    else:
        if device not in ("auto", "cpu") and devices[0].platform != "gpu":
            _log.warning(
                "running on the CPU: device %r was asked for and JAX finds no GPU. Does "
                "`nvidia-smi` list one, and is JAX's plugin installed "
                "(pip install 'fastgpu[cuda12]')?",
                device,
            )
    names = [f"{d.id}: {d.device_kind}" if d.platform != "cpu" else "cpu" for d in devices]
    return devices[0].platform, tuple(names)
