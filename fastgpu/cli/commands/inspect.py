"""`fastgpu inspect`"""

from typing import Annotated

import typer

from fastgpu.cli.options import (
    AsJson,
    BatchSize,
    Device,
    Model,
    Settings,
    parse_settings,
    parse_shape,
    show,
)


def inspect(
    model: Model,
    batch_size: BatchSize = 1,
    shape: Annotated[str | None, typer.Option(help="Shape of one example: 224,224,3.")] = None,
    target: Annotated[str | None, typer.Option(help="Device to optimize for: cpu, h100.")] = None,
    program: Annotated[bool, typer.Option("--program", help="Print the optimized jaxpr.")] = False,
    settings: Settings = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Show what each pass does to the model's forward program: equations, FLOPs, bytes.

    Example: fastgpu inspect model.keras --batch-size 16
    """
    import jax
    import numpy as np

    import fastgpu as fgpu
    from fastgpu.cli.model import load_model

    fgpu.configure(device, quiet=True)
    example = np.zeros((1, *parse_shape(shape)), np.float32) if shape else None
    module, variables, inputs = load_model(model, parse_settings(settings), example)
    batch = [jax.ShapeDtypeStruct((batch_size, *one.shape), one.dtype) for one in inputs]
    report = fgpu.transforms.inspect(module.apply, variables, *batch, target=target)
    data = {"passes": report.to_json()}
    show(f"{report}\n\n{report.after}" if program else report, data, as_json)
