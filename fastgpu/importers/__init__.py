"""Models from other frameworks, as linen modules with their variables."""

from fastgpu.importers.imported import Imported, ImportReport
from fastgpu.importers.keras import from_keras, register_keras_layer
from fastgpu.importers.nnx import from_nnx

__all__ = ["ImportReport", "Imported", "from_keras", "from_nnx", "register_keras_layer"]
