"""`fastgpu tune`"""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastgpu.cli.options import (
    CROSS_ENTROPY,
    AsJson,
    BatchSize,
    Data,
    Device,
    Loss,
    Model,
    Settings,
    parse_settings,
)


def tune(
    model: Model,
    data: Data,
    trials: Annotated[int, typer.Option(min=1)] = 10,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of one trial.")] = 3,
    batch_size: BatchSize = 32,
    learning_rate: Annotated[tuple[float, float], typer.Option(help="Lowest, highest.")] = (
        1e-5,
        1e-1,
    ),
    weight_decay: Annotated[tuple[float, float], typer.Option(help="Lowest, highest.")] = (
        1e-6,
        1e-1,
    ),
    held_out: Annotated[float, typer.Option(help="Share of DATA that scores a trial.")] = 0.2,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    loss: Loss = CROSS_ENTROPY,
    storage: Annotated[Path | None, typer.Option(help="SQLite file to resume from.")] = None,
    seed: int = 0,
    settings: Settings = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Search learning rate and weight decay for the least loss on held-out examples.

    Example: fastgpu tune model.keras train.npz --trials 20 --storage runs/tune.db
    """
    import fastgpu as fgpu
    from fastgpu.cli.data import load_data
    from fastgpu.cli.model import load_model
    from fastgpu.cli.training import make_optimizer, split

    configuration = fgpu.configure(device, seed=seed, quiet=True)
    train_data, eval_data = split(load_data(data), held_out, seed)
    loaded = load_model(model, parse_settings(settings), train_data["inputs"], seed)
    loss_fn = fgpu.supervised_loss(loaded.module, loss)
    step = fgpu.train_step(loss_fn, make_optimizer(optimizer, learning_rate[0], weight_decay[0]))

    def objective(config: dict[str, Any], trial: Any) -> float:
        tx = make_optimizer(optimizer, config["learning_rate"], config["weight_decay"])
        state = fgpu.TrainState.create(loaded.variables, tx, rng=configuration.rng)
        scores = [float("inf")]
        for epoch in range(epochs):
            one = fgpu.fit(
                step,
                state,
                train_data,
                epochs=1,
                batch_size=batch_size,
                seed=seed + epoch,
                progress=False,
            )
            state = one.state
            score = fgpu.evaluate(loss_fn, state, eval_data, batch_size=batch_size)["loss"]
            trial.report(epoch, score)
            scores.append(score)
        return min(scores)

    result = fgpu.tune(
        objective,
        {"learning_rate": ("log", *learning_rate), "weight_decay": ("log", *weight_decay)},
        trials=trials,
        storage=storage,
        seed=seed,
    )
    best = " ".join(
        f"--{name.replace('_', '-')} {value:.3g}" for name, value in result.best_config.items()
    )
    print(result.to_json() if as_json else f"best loss {result.best_value:.4g}: {best}")
