"""The table of ONNX operators: every operator that fastgpu has an equal of, and its rules.

Each module enters its own, by kind. An operator that is not here but that ONNX itself defines by
other operators is expanded to those.
"""

from fastgpu.importers.onnx.operators import (
    attention,
    control,
    convolution,
    elementwise,
    indexing,
    losses,
    normalization,
    pooling,
    products,
    quantization,
    randomness,
    recurrent,
    reductions,
    resampling,
    sequences,
    shapes,
    signal,
)
from fastgpu.importers.onnx.operators.operator import TABLE, Call, Rule, find

KINDS = (
    elementwise,
    products,
    convolution,
    pooling,
    normalization,
    attention,
    recurrent,
    reductions,
    shapes,
    indexing,
    resampling,
    signal,
    quantization,
    control,
    sequences,
    randomness,
    losses,
)

__all__ = ["KINDS", "TABLE", "Call", "Rule", "find"]
