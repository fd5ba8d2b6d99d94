"""`fastgpu plan`"""

from pathlib import Path
from typing import Annotated

import typer

from fastgpu.cli.options import (
    CROSS_ENTROPY,
    AsJson,
    BatchSize,
    Loss,
    Model,
    Precision,
    Settings,
    parse_settings,
    parse_shape,
    show,
)


def plan(
    model: Model,
    target: Annotated[
        str, typer.Option(help="Device to plan for: cpu, h100, h100:8, h100:4x8.")
    ] = "h100",
    batch_size: BatchSize = 16,
    shape: Annotated[str | None, typer.Option(help="Shape of one example: 224,224,3.")] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="16GiB, 8000MB, or 60% of the peak without a budget.")
    ] = None,
    accumulate_steps: Annotated[
        str, typer.Option(help="Microbatches for each batch: a number, or auto.")
    ] = "1",
    compress: Annotated[
        str | None, typer.Option(help="Values may wait in fewer bits: int8 or bfloat16.")
    ] = None,
    precision: Precision = "default",
    tokens: Annotated[bool, typer.Option("--tokens", help="Inputs are token numbers.")] = False,
    labels: Annotated[
        str | None,
        typer.Option(help="Shape of one example's labels; by default the output's, less classes."),
    ] = None,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Split state and batch over the target's devices.")
    ] = False,
    loss: Loss = CROSS_ENTROPY,
    save: Annotated[
        list[Path] | None, typer.Option(help="Also write a .json, .png, .svg or .pdf file.")
    ] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a training step (Adam) fits a device, what fills it, and what a budget costs.

    The device need not be there. Example: fastgpu plan resnet50 --shape 224,224,3 --batch-size 184
    --target h100 --memory-budget 50%
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import fastgpu as fgpu
    from fastgpu.cli.model import load_model
    from fastgpu.compile import absent_mesh
    from fastgpu.training import gather_params, shard_fsdp

    fgpu.configure("cpu", precision=precision, quiet=True)  # pyright: ignore[reportArgumentType]
    kind = np.int32 if tokens else np.float32
    example = np.zeros((1, *parse_shape(shape)), kind) if shape else None
    module, variables, inputs = load_model(model, parse_settings(settings), example)
    tx = optax.adam(1e-3)
    loss_fn = fgpu.supervised_loss(module, loss)
    state = jax.eval_shape(lambda v: fgpu.TrainState.create(v, tx, rng=0), variables)
    batch_inputs = tuple(
        jax.ShapeDtypeStruct((batch_size, *one.shape), one.dtype) for one in inputs
    )
    if labels is None:
        out = jax.eval_shape(lambda v, x: module.apply(v, *x), variables, batch_inputs)
        labels_shape = jax.tree.leaves(out)[0].shape[:-1]
    else:
        labels_shape = (batch_size, *(parse_shape(labels) if labels else ()))
    batch = {
        "inputs": batch_inputs[0] if len(batch_inputs) == 1 else batch_inputs,
        "labels": jax.ShapeDtypeStruct(labels_shape, jnp.int32),
    }
    if fsdp:
        mesh = absent_mesh(target)
        loss_fn = gather_params(loss_fn, mesh)
        state, batch = shard_fsdp(state, batch, mesh)
    steps = int(accumulate_steps) if accumulate_steps.isdigit() else accumulate_steps
    step = fgpu.train_step(loss_fn, tx, accumulate_steps=steps, compress=compress)  # pyright: ignore[reportArgumentType]
    report = fgpu.plan(step, state, batch, target=target, memory_budget=memory_budget)
    for path in save or ():
        report.save(path)
    show(report, report.to_json(), as_json)
