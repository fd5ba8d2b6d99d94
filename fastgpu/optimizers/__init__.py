"""Optimizers: wrappers around optax transforms that change what their state costs."""

from fastgpu.optimizers.blockwise import Blockwise, dequantize, quantize
from fastgpu.optimizers.compressed import CompressedState, compressed

__all__ = ["Blockwise", "CompressedState", "compressed", "dequantize", "quantize"]
