"""`fastgpu export`"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fastgpu.cli.options import AsJson, Model, Settings, parse_settings, parse_shape


class Format(StrEnum):
    """What an exported model can be."""

    savedmodel = "savedmodel"
    stablehlo = "stablehlo"


def export(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    format: Annotated[
        Format, typer.Option(help="A TensorFlow SavedModel, or a StableHLO program for JAX.")
    ] = Format.savedmodel,
    run: Annotated[
        Path | None, typer.Option(help="A folder of fastgpu train: export its trained variables.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Shape of one example, where the model has none: 28,28,1.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Write a SavedModel or a StableHLO program, reload it, and compare before it counts.

    Example: fastgpu export model.keras exported/ --run runs/first
    Example: fastgpu export model.onnx program/ --format stablehlo
    """
    import numpy as np

    import fastgpu as fgpu
    from fastgpu.cli.model import is_model_file, load_model
    from fastgpu.cli.run_folder import read_config, read_variables

    examples = None
    if shape:
        examples = np.zeros((1, *parse_shape(shape)), np.float32)
    elif run:
        examples = tuple(np.zeros((1, *s), t) for s, t in read_config(run)["inputs"])
    fgpu.configure("cpu", quiet=True)
    module, variables, inputs = load_model(model, parse_settings(settings), examples)
    if run:
        variables = read_variables(run, variables)
    # an imported module knows more of its inputs than one example shows
    specs = None if is_model_file(model) else [((None, *i.shape), i.dtype) for i in inputs]
    write = {Format.savedmodel: fgpu.export_saved_model, Format.stablehlo: fgpu.export_stablehlo}
    report = write[format](module, variables, out, inputs=specs, overwrite=overwrite)
    print(report.to_json() if as_json else report)
