"""Sides that run in this process: a function or a training step, with passes and without."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from fastgpu.benchmarking.worker import forget_peak, peak_resident_bytes
from fastgpu.compile import memory_report
from fastgpu.training import TrainState, TrainStep


class _InProcess(ABC):
    """A side in this process; resident memory is that of the process while the side runs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.resident_bytes: int | None = None

    def steps(self, count: int) -> list[float]:
        """The seconds of `count` steps, each waited for."""
        forget_peak()
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self._run()
            seconds.append(time.perf_counter() - start)
        if (peak := peak_resident_bytes()) is not None:
            self.resident_bytes = max(self.resident_bytes or 0, peak)
        return seconds

    def first_step(self) -> dict[str, Any]:
        """Compile, then run once."""
        start = time.perf_counter()
        compiled = self._compile()
        seconds = time.perf_counter() - start
        self._run()
        return {"compile_seconds": seconds, "peak_bytes": memory_report(compiled).peak_bytes}

    @abstractmethod
    def losses(self, count: int) -> list[float]:
        """The losses of the first `count` steps."""

    @abstractmethod
    def _compile(self) -> Any: ...

    @abstractmethod
    def _run(self) -> None: ...


class FunctionSide(_InProcess):
    """A function called again and again with the same arguments."""

    def __init__(self, name: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        super().__init__(name)
        self._fn, self._args = fn, jax.device_put(args)

    def losses(self, count: int) -> list[float]:
        """None: a function is not a training step."""
        return []

    def _compile(self) -> Any:
        self._compiled = jax.jit(self._fn).lower(*self._args).compile()
        return self._compiled

    def _run(self) -> None:
        jax.block_until_ready(self._compiled(*self._args))


class StepSide(_InProcess):
    """A training step on its own copy of the state."""

    def __init__(self, name: str, step: TrainStep, state: TrainState, batch: Any) -> None:
        super().__init__(name)
        self._step, self._batch = step, batch
        self._initial = _copy(state)
        self._state = _copy(state)

    def _compile(self) -> Any:
        return self._step.lower(self._state, self._batch).compile()

    def _run(self) -> None:
        self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready(metrics["loss"])

    def losses(self, count: int) -> list[float]:
        """The losses of `count` steps from the state that was given."""
        state, curve = _copy(self._initial), []
        for _ in range(count):
            state, metrics = self._step(state, self._batch)
            curve.append(float(metrics["loss"]))
        return curve


def _copy(state: TrainState) -> TrainState:
    """A step donates its state: each side needs its own, and the caller's must stay alive."""
    return jax.tree.map(lambda leaf: leaf.copy(), state)


@contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Compile for real, so that compile times mean something."""
    enabled = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
