"""Arguments and options that several commands share, and how results are printed."""

import ast
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastgpu.errors import FastGPUError

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A file (.keras, .h5, .onnx), or the name of a model in fastgpu.models (resnet18).",
    ),
]
Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help="An .npz file with the arrays inputs (or input_0, input_1, ...) and labels.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A setting of a model in fastgpu.models (num_classes=10); may be repeated.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, gpu, or cuda:N.")]
Loss = Annotated[str, typer.Option(help="A loss of optax, by name.")]
Precision = Annotated[
    str,
    typer.Option(help="default, float32, tf32, bf16-mixed or fp16-mixed (with a loss scale)."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples in a batch.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]

CROSS_ENTROPY = "softmax_cross_entropy_with_integer_labels"


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """`["a=1", "b=x"]` as `{"a": 1, "b": "x"}`; values are Python literals, or else strings.

    >>> parse_settings(["num_classes=10", "stage_sizes=(2, 2)", "name=small"])
    {'num_classes': 10, 'stage_sizes': (2, 2), 'name': 'small'}
    """
    parsed = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals:
            raise FastGPUError(f"--set {setting!r}", expected="--set NAME=VALUE", got=setting)
        try:
            parsed[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[name] = value
    return parsed


def parse_shape(shape: str) -> tuple[int, ...]:
    """The shape of one example, without the batch.

    >>> parse_shape("28,28,1")
    (28, 28, 1)
    """
    try:
        sizes = tuple(int(size) for size in shape.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise FastGPUError(f"--shape {shape!r}", expected="sizes like 28,28,1", got=shape)
    return sizes


def show(text: object, data: Any, as_json: bool) -> None:
    """Print `data` as JSON for a script, or `text` for a person."""
    print(json.dumps(data, indent=1, default=str) if as_json else text)
