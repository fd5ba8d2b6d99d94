"""`fastgpu import`"""

from pathlib import Path
from typing import Annotated

import typer

from fastgpu.cli.options import AsJson, show


def import_model(
    model: Annotated[Path, typer.Argument(metavar="FILE", help="A Keras file (.keras, .h5).")],
    as_json: AsJson = False,
) -> None:
    """Read a Keras file and report every layer and variable: mapped, ignored, or refused.

    Example: fastgpu import model.keras
    """
    import fastgpu as fgpu

    fgpu.configure("cpu", cache=False, quiet=True)
    report = fgpu.from_keras(model).report
    show(report, report.to_dict(), as_json)
