"""`fastgpu benchmark`"""

from typing import Annotated, Any

import typer

from fastgpu.cli.options import (
    CROSS_ENTROPY,
    AsJson,
    BatchSize,
    Data,
    Loss,
    Model,
    Settings,
    parse_settings,
    show,
)


def benchmark(
    model: Model,
    data: Data,
    batch_size: BatchSize = 16,
    against: Annotated[
        str | None,
        typer.Option(
            help="Out of unoptimized,keras-jax,keras-tensorflow; by default all that apply."
        ),
    ] = None,
    loss: Loss = CROSS_ENTROPY,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of a side in a round.")] = 4,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Time a training step on the first batch of DATA beside Keras and the unoptimized step.

    Example: fastgpu benchmark model.keras train.npz --against keras-tensorflow
    """
    import fastgpu as fgpu
    from fastgpu.cli.data import load_data
    from fastgpu.cli.model import is_keras_file, load_model
    from fastgpu.cli.training import take

    batch = take(load_data(data), slice(0, batch_size))
    options: dict[str, Any] = {
        "against": against.split(",") if against else None,
        "rounds": rounds,
        "steps": steps,
    }
    if is_keras_file(model):
        report = fgpu.benchmark(model, batch, loss=loss, **options)
    else:
        import optax

        fgpu.configure(quiet=True)
        module, variables, _ = load_model(model, parse_settings(settings), batch["inputs"])
        tx = optax.adam(1e-3)
        state = fgpu.TrainState.create(variables, tx, rng=0)
        step = fgpu.train_step(fgpu.supervised_loss(module, loss), tx)
        report = fgpu.benchmark(step, state, batch, name=model, **options)
    show(report, report.to_json(), as_json)
