"""Models as files that other programs run; each is reloaded and compared before it is done."""

from fastgpu.exporters.report import Check, ExportReport, SignatureReport
from fastgpu.exporters.savedmodel import export_saved_model
from fastgpu.exporters.signatures import Signature
from fastgpu.exporters.stablehlo import export_stablehlo
from fastgpu.exporters.stablehlo_model import StableHLOModel, load_stablehlo

__all__ = [
    "Check",
    "ExportReport",
    "Signature",
    "SignatureReport",
    "StableHLOModel",
    "export_saved_model",
    "export_stablehlo",
    "load_stablehlo",
]
