"""`fastgpu train`"""

from pathlib import Path
from typing import Annotated

import typer

from fastgpu.cli.options import (
    CROSS_ENTROPY,
    AsJson,
    BatchSize,
    Data,
    Device,
    Loss,
    Model,
    Precision,
    Settings,
    parse_settings,
    show,
)


def train(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="The run folder; an unfinished run there goes on.")],
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    batch_size: BatchSize = 32,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 1e-3,
    weight_decay: Annotated[float, typer.Option(min=0.0)] = 1e-4,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    loss: Loss = CROSS_ENTROPY,
    precision: Precision = "default",
    eval_data: Annotated[Path | None, typer.Option(help="Evaluated after each epoch.")] = None,
    seed: int = 0,
    settings: Settings = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Train a model on arrays; writes metrics, checkpoints and the trained variables to --out.

    Example: fastgpu train model.keras train.npz --out runs/first --epochs 5
    """
    import fastgpu as fgpu
    from fastgpu.cli.data import load_data
    from fastgpu.cli.model import load_model
    from fastgpu.cli.run_folder import write_config, write_variables
    from fastgpu.cli.training import make_optimizer

    config = {
        "model": model,
        "settings": parse_settings(settings),
        "data": str(data),
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "optimizer": optimizer,
        "loss": loss,
        "eval_data": eval_data and str(eval_data),
        "seed": seed,
        "precision": precision,
    }
    configuration = fgpu.configure(device, precision=precision, seed=seed, quiet=True)  # pyright: ignore[reportArgumentType]
    tx = make_optimizer(optimizer, learning_rate, weight_decay)
    arrays = load_data(data)
    held_out = load_data(eval_data) if eval_data else None
    module, variables, inputs = load_model(model, config["settings"], arrays["inputs"], seed)
    config["inputs"] = [[list(one.shape), one.dtype.name] for one in inputs]
    step = fgpu.train_step(fgpu.supervised_loss(module, loss), tx)
    state = fgpu.TrainState.create(variables, tx, rng=configuration.rng)
    write_config(out, config)
    state, history = fgpu.fit(
        step,
        state,
        arrays,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        eval_data=held_out,
        run_dir=out,
    )
    path = write_variables(out, state.variables)
    last = history[-1] if history else {}
    result = {"run": out, "steps": int(state.step), "variables": path, "last": last}
    show(f"{int(state.step)} steps; trained variables in {path}", result, as_json)
