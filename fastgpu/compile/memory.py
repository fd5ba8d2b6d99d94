"""What the compiler says of a compiled program: the bytes it needs."""

import ctypes
import sys
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MemoryReport:
    """The compiler's own figures for one program, in bytes on one device.

    `alias_bytes` are outputs that reuse the memory of donated arguments.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    code_bytes: int

    @property
    def peak_bytes(self) -> int:
        """argument + output - alias + temp + code."""
        return (
            self.argument_bytes
            + self.output_bytes
            - self.alias_bytes
            + self.temp_bytes
            + self.code_bytes
        )

    def to_json(self) -> dict[str, int]:
        """The figures and their sum, as a JSON-ready dict."""
        return {**asdict(self), "peak_bytes": self.peak_bytes}


def memory_report(compiled: Any) -> MemoryReport:
    """Read the memory figures of `jax.jit(fn).lower(...).compile()`.

    Raises `ValueError` when the backend gives none.

    >>> import jax, jax.numpy as jnp
    >>> compiled = jax.jit(lambda x: x + 1).lower(jnp.ones(256)).compile()
    >>> memory_report(compiled).argument_bytes
    1024
    """
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError("this backend gives no memory figures for a compiled program")
    return MemoryReport(
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
        temp_bytes=stats.temp_size_in_bytes,
        code_bytes=stats.generated_code_size_in_bytes,
    )


def return_freed_memory() -> None:
    """Give what was freed back to the system: glibc keeps it, up to 200 MiB after a compilation.

    In a process that plans before it trains, that would stay resident for good.

    >>> return_freed_memory()
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)
