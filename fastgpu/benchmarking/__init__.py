"""Measuring fastgpu beside what it replaces, in one run and in turns."""

from fastgpu.benchmarking.comparison import benchmark
from fastgpu.benchmarking.report import BenchmarkReport, Row

__all__ = ["BenchmarkReport", "Row", "benchmark"]
