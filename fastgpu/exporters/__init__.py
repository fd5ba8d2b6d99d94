"""Models as files that other programs run; each is reloaded and compared before it is done."""

from fastgpu.exporters.report import Check, ExportReport, SignatureReport
from fastgpu.exporters.savedmodel import export_saved_model
from fastgpu.exporters.signatures import Signature

__all__ = ["Check", "ExportReport", "Signature", "SignatureReport", "export_saved_model"]
