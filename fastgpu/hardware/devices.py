"""Device figures for pricing and compiling programs: memory, bandwidth, arithmetic, geometry.

Every GPU's figures are from NVIDIA's public data sheet or architecture white paper, dense (without
sparsity), named in `source`. `flops` are the rates of a matrix product under JAX's default
precision, which runs float32 products on tensor cores as TF32 where a GPU has them. The CPU's
figures are an order of magnitude for a small machine: prices on a CPU rank alternatives, they do
not predict seconds.
"""

from dataclasses import dataclass, field
from typing import Any

_GIB = 2**30


@dataclass(frozen=True)
class Geometry:
    """What a compiler asks about a GPU's cores.

    Sizes in bytes, clock in GHz; "core" is a streaming multiprocessor.

    >>> DEVICES["h100"].geometry.cores
    132
    """

    compute_capability: tuple[int, int]
    cores: int
    clock_ghz: float
    l2_cache_bytes: int

    @property
    def fpus_per_core(self) -> int:
        """Single-precision units in a core."""
        return 64 if self.compute_capability in ((7, 0), (7, 5), (8, 0)) else 128

    @property
    def threads_per_core(self) -> int:
        """Threads resident in a core."""
        return {(7, 5): 1024, (8, 6): 1536, (8, 9): 1536}.get(self.compute_capability, 2048)

    @property
    def shared_memory_per_core(self) -> int:
        """Bytes of shared memory in a core."""
        kib = {(7, 0): 96, (7, 5): 64, (8, 0): 164, (8, 6): 100, (8, 9): 100}
        return kib.get(self.compute_capability, 228) * 1024

    @property
    def shared_memory_per_block(self) -> int:
        """Bytes of shared memory that one block may ask for; from 8.0 on one KiB is reserved."""
        reserved = 1024 if self.compute_capability >= (8, 0) else 0
        return self.shared_memory_per_core - reserved


@dataclass(frozen=True)
class Device:
    """One kind of device: `platform` is JAX's name for it ("cpu", "cuda").

    `memory_bytes` in bytes, `bandwidth` in bytes per second, `flops` in operations per second for
    a matrix product of each dtype, `vector_flops` for everything else in float32.
    `interconnect` is the bandwidth between two devices of one host, `host_link` that to the
    host's memory, both in bytes per second and one direction; 0 where there is none.

    >>> Device("mine", "cuda", 24 * 2**30, 1e12, {"float32": 80e12}).peak_flops("float32")
    80000000000000.0
    """

    name: str
    platform: str
    memory_bytes: int
    bandwidth: float
    flops: dict[str, float] = field(hash=False)
    vector_flops: float = 0.0
    interconnect: float = 0.0
    host_link: float = 0.0
    geometry: Geometry | None = None
    source: str = ""

    def peak_flops(self, dtype: Any) -> float:
        """Operations per second for `dtype`; dtypes without a figure run at the float32 rate.

        >>> DEVICES["h100"].peak_flops("bfloat16") / DEVICES["h100"].peak_flops("float32")
        2.0
        """
        return self.flops.get(str(dtype), self.flops["float32"])

    def seconds(
        self, flops: float, bytes_moved: float, dtype: Any = "float32", matrix: bool = True
    ) -> float:
        """Roofline time: the slower of the arithmetic and the memory traffic.

        `matrix`: the operations are those of matrix products and convolutions.
        Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009.

        >>> DEVICES["h100"].seconds(flops=0, bytes_moved=3.35e12)
        1.0
        """
        rate = self.peak_flops(dtype) if matrix or not self.vector_flops else self.vector_flops
        return max(flops / rate, bytes_moved / self.bandwidth)


def _gpu(
    name: str,
    memory_bytes: int,
    bandwidth: float,
    tera: dict[str, float],
    geometry: Geometry,
    interconnect: float,
    host_link: float,
    source: str,
) -> Device:
    """A GPU from the units of a data sheet: GB/s and TFLOP/s; "vector" is its float32 rate."""
    flops = {dtype: rate * 1e12 for dtype, rate in tera.items() if dtype != "vector"}
    return Device(
        name,
        "cuda",
        memory_bytes,
        bandwidth * 1e9,
        flops,
        tera["vector"] * 1e12,
        interconnect * 1e9,
        host_link * 1e9,
        geometry,
        source,
    )


def _rates(f64: float, vector: float, f32: float, f16: float, bf16: float) -> dict[str, float]:
    return {"float64": f64, "vector": vector, "float32": f32, "float16": f16, "bfloat16": bf16}


_V100 = Geometry((7, 0), 80, 1.53, 6 << 20)
_T4 = Geometry((7, 5), 40, 1.59, 4 << 20)
_A100 = Geometry((8, 0), 108, 1.41, 40 << 20)
_HOPPER_SXM = Geometry((9, 0), 132, 1.98, 50 << 20)

DEVICES = {
    d.name: d
    for d in (
        Device("cpu", "cpu", 16 * _GIB, 20e9, {"float32": 150e9, "float64": 75e9}, 40e9),
        _gpu(
            "v100",
            16_935_682_048,
            900,
            _rates(7.8, 15.7, 15.7, 125, 15.7),
            _V100,
            150,
            16,
            "NVIDIA V100 data sheet (SXM2 16 GB), 2020; no bfloat16 units",
        ),
        _gpu(
            "t4",
            15_843_721_216,
            320,
            _rates(0.25, 8.1, 8.1, 65, 8.1),
            _T4,
            0,
            16,
            "NVIDIA T4 data sheet, 2019; no bfloat16 units",
        ),
        _gpu(
            "a10g",
            23_609_475_072,
            600,
            _rates(0.55, 35, 35, 70, 70),
            Geometry((8, 6), 80, 1.71, 6 << 20),
            0,
            32,
            "NVIDIA A10G figures of the AWS EC2 G5 data sheet, 2021",
        ),
        _gpu(
            "l4",
            23_580_639_232,
            300,
            _rates(0.47, 30.3, 60, 121, 121),
            Geometry((8, 9), 58, 2.04, 48 << 20),
            0,
            32,
            "NVIDIA L4 data sheet, 2023",
        ),
        _gpu(
            "a100-40gb",
            42_331_013_120,
            1555,
            _rates(19.5, 19.5, 156, 312, 312),
            _A100,
            300,
            32,
            "NVIDIA A100 data sheet (SXM4 40 GB), 2021",
        ),
        _gpu(
            "a100",
            85_100_068_864,
            2039,
            _rates(19.5, 19.5, 156, 312, 312),
            _A100,
            300,
            32,
            "NVIDIA A100 data sheet (SXM4 80 GB), 2021",
        ),
        _gpu(
            "rtx3090",
            25_438_126_080,
            936,
            _rates(0.56, 35.6, 35.6, 71, 71),
            Geometry((8, 6), 82, 1.695, 6 << 20),
            56,
            32,
            "NVIDIA Ampere GA102 white paper, 2020",
        ),
        _gpu(
            "rtx4090",
            25_386_352_640,
            1008,
            _rates(1.3, 82.6, 82.6, 165.2, 165.2),
            Geometry((8, 9), 128, 2.52, 72 << 20),
            0,
            32,
            "NVIDIA Ada white paper, 2022",
        ),
        _gpu(
            "rtx6000-ada",
            50_876_841_984,
            960,
            _rates(1.4, 91.1, 182.1, 364.2, 364.2),
            Geometry((8, 9), 142, 2.505, 96 << 20),
            0,
            32,
            "NVIDIA RTX 6000 Ada data sheet, 2023",
        ),
        _gpu(
            "h100-pcie",
            84_942_979_072,
            2000,
            _rates(51, 51, 378, 756, 756),
            Geometry((9, 0), 114, 1.755, 50 << 20),
            300,
            64,
            "NVIDIA H100 data sheet (PCIe), 2023",
        ),
        _gpu(
            "h100",
            84_942_979_072,
            3350,
            _rates(67, 67, 494.5, 989, 989),
            _HOPPER_SXM,
            450,
            64,
            "NVIDIA H100 data sheet (SXM), 2023",
        ),
        _gpu(
            "h200",
            151_397_597_184,
            4800,
            _rates(67, 67, 494.5, 989, 989),
            _HOPPER_SXM,
            450,
            64,
            "NVIDIA H200 data sheet (SXM), 2024",
        ),
        _gpu(
            "b200",
            191_514_411_008,
            7700,
            _rates(37, 75, 1125, 2250, 2250),
            Geometry((10, 0), 148, 1.965, 126 << 20),
            900,
            64,
            "NVIDIA DGX B200 data sheet, 2025, of which one GPU of eight",
        ),
    )
}
