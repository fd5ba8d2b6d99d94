"""`fastgpu import`"""

from pathlib import Path
from typing import Annotated

import typer

from fastgpu.cli.options import AsJson, show


def import_model(
    model: Annotated[Path, typer.Argument(metavar="FILE", help="A Keras or ONNX file.")],
    as_json: AsJson = False,
) -> None:
    """Read a Keras or ONNX file and report every layer and variable: mapped, ignored, or refused.

    Example: fastgpu import model.onnx
    """
    import fastgpu as fgpu
    from fastgpu.cli.model import read_model_file

    fgpu.configure("cpu", cache=False, quiet=True)
    report = read_model_file(model).report
    show(report, report.to_dict(), as_json)
