"""`fastgpu inspect`"""

from typing import Annotated, Any

import typer

from fastgpu.cli.options import (
    AsJson,
    BatchSize,
    Device,
    Model,
    Precision,
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
    precision: Precision = "default",
    disable: Annotated[
        list[str] | None, typer.Option(metavar="PASS", help="Leave a pass out; may be repeated.")
    ] = None,
    program: Annotated[bool, typer.Option("--program", help="Print the optimized jaxpr.")] = False,
    before: Annotated[
        str | None, typer.Option(metavar="PASS", help="Print the jaxpr that a pass is given.")
    ] = None,
    after: Annotated[
        str | None, typer.Option(metavar="PASS", help="Print the jaxpr that a pass returns.")
    ] = None,
    operations: Annotated[
        bool, typer.Option("--operations", help="Print whose code computes each operation.")
    ] = False,
    diff: Annotated[
        bool, typer.Option("--diff", help="Print what --disable changes in the program.")
    ] = False,
    settings: Settings = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Show what each pass does to the model's forward program: equations, FLOPs, bytes.

    Example: fastgpu inspect model.keras --batch-size 16 --operations
    """
    import jax
    import numpy as np

    import fastgpu as fgpu
    from fastgpu import ir
    from fastgpu.cli.model import load_model

    fgpu.configure(device, precision=precision, quiet=True)  # pyright: ignore[reportArgumentType]
    passes = fgpu.transforms.without(*disable) if disable else "default"
    example = np.zeros((1, *parse_shape(shape)), np.float32) if shape else None
    module, variables, inputs = load_model(model, parse_settings(settings), example)
    batch = [jax.ShapeDtypeStruct((batch_size, *one.shape), one.dtype) for one in inputs]
    arguments = (module.apply, variables, *batch)
    report = fgpu.transforms.inspect(*arguments, passes=passes, target=target)
    data: dict[str, Any] = {"passes": report.to_json()}
    parts = [str(report)]
    if operations:
        data["operations"] = report.operations()
        parts.append("\n".join(_row(row) for row in data["operations"]))
    if diff:
        data["diff"] = fgpu.transforms.inspect(*arguments, target=target).difference(report)
        parts.append(data["diff"])
    wanted = [report.before_pass(before)] if before else []
    wanted += [report.after_pass(after)] if after else []
    wanted += [report.after] if program else []
    parts += [ir.to_text(closed) for closed in wanted]
    show("\n\n".join(parts), data, as_json)


def _row(row: dict[str, Any]) -> str:
    inputs = ", ".join(row["inputs"])
    return (
        f"{row['code']:<16}{row['flops'] / 1e9:>9.3g} GFLOP  {row['operation']} {inputs}"
        f"  {row['source']}"
    )
