"""Models from other frameworks, as linen modules with their variables."""

from fastgpu.importers.imported import Imported, ImportReport
from fastgpu.importers.keras import from_keras, register_keras_layer
from fastgpu.importers.nnx import from_nnx
from fastgpu.importers.onnx import from_onnx

__all__ = [
    "ImportReport",
    "Imported",
    "from_keras",
    "from_nnx",
    "from_onnx",
    "register_keras_layer",
]
