"""Device figures for pricing programs: memory, bandwidth and arithmetic peaks.

GPU figures are from NVIDIA's data sheets (dense, without sparsity). The CPU's are an order of
magnitude for a small machine: prices on a CPU rank alternatives, they do not predict seconds.
"""

import difflib
from dataclasses import dataclass
from typing import Any

from fastgpu.errors import ConfigurationError

_GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One kind of device: `platform` is JAX's name for it ("cpu", "cuda").

    `memory_bytes` in bytes, `bandwidth` in bytes per second, `flops` in operations per second for
    a matrix product of each dtype.

    >>> Device("mine", "cuda", 24 * 2**30, 1e12, {"float32": 80e12}).peak_flops("float32")
    80000000000000.0
    """

    name: str
    platform: str
    memory_bytes: int
    bandwidth: float
    flops: dict[str, float]

    def peak_flops(self, dtype: Any) -> float:
        """Operations per second for `dtype`; dtypes without a figure run at the float32 rate.

        >>> device("h100").peak_flops("bfloat16") / device("h100").peak_flops("float32") > 10
        True
        """
        return self.flops.get(str(dtype), self.flops["float32"])

    def seconds(self, flops: float, bytes_moved: float, dtype: Any = "float32") -> float:
        """Roofline time: the slower of the arithmetic and the memory traffic.

        Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009.

        >>> device("h100").seconds(flops=0, bytes_moved=3.35e12)
        1.0
        """
        return max(flops / self.peak_flops(dtype), bytes_moved / self.bandwidth)


DEVICES = {
    d.name: d
    for d in (
        Device("cpu", "cpu", 16 * _GIB, 20e9, {"float32": 150e9, "float64": 75e9}),
        Device(
            # H100 SXM data sheet, 2023.
            "h100",
            "cuda",
            80 * _GIB,
            3.35e12,
            {"float64": 34e12, "float32": 67e12, "bfloat16": 989e12, "float16": 989e12},
        ),
        Device(
            # A100 80GB SXM data sheet, 2021.
            "a100",
            "cuda",
            80 * _GIB,
            2.039e12,
            {"float64": 9.7e12, "float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12},
        ),
        Device(
            # T4 data sheet, 2019; no bfloat16 units.
            "t4",
            "cuda",
            16 * _GIB,
            300e9,
            {"float64": 0.25e12, "float32": 8.1e12, "bfloat16": 8.1e12, "float16": 65e12},
        ),
    )
}


def device(name: str) -> Device:
    """Look a device up by name.

    Raises `ConfigurationError` naming the known devices, nearest first.

    >>> device("h100").platform
    'cuda'
    """
    if name in DEVICES:
        return DEVICES[name]
    near = difflib.get_close_matches(name, DEVICES, n=len(DEVICES), cutoff=0.0)
    raise ConfigurationError(
        f"unknown target {name!r}", expected=f"one of {', '.join(near)}", got=repr(name)
    )
