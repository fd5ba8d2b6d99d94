"""ONNX models as linen modules.

    file -> ModelProto -> graph -> which values must be known -> module and variables

No code from a file runs: operators become rules of the table in `operators`, functions their
bodies, and external data is read only from the model's own folder.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastgpu.errors import FileError, UnsupportedLayerError
from fastgpu.importers.imported import Imported, ImportReport
from fastgpu.importers.onnx.files import open_model
from fastgpu.importers.onnx.graph import Graph, Input
from fastgpu.importers.onnx.module import OnnxModel
from fastgpu.importers.onnx.parse import Parser, read_input
from fastgpu.importers.onnx.static import Static
from fastgpu.importers.onnx.weights import place

__all__ = ["OnnxModel", "from_onnx"]


def from_onnx(
    source: Any,
    *,
    constants: Mapping[str, Any] | None = None,
    shapes: Mapping[str, Sequence[int | None]] | None = None,
    trainable: Callable[[str], bool] | None = None,
) -> Imported:
    """Import an ONNX model (opset 6 to 28) as a linen module with its variables.

    Args:
        source: the path of a `.onnx` file, with its external data beside it; its bytes; or an
            `onnx.ModelProto`.
        constants: inputs by name that are to be constants of the program. An input that a shape
            depends on (the target of a Reshape, the k of a TopK) has to be one.
        shapes: sizes of inputs by name in the place of those in the file, None for any size: for a
            model exported for one batch size that does not depend on it.
        trainable: which floating arrays of the file are trained, by name. Left out: every floating
            initializer that is no scalar and no moving statistic.

    Returns:
        `Imported(module, variables, report)`. `module.apply(variables, *inputs)` equals the ONNX
        model; see `OnnxModel` for training and for the collections. 64-bit numbers become 32-bit
        ones, as in all of JAX, unless `jax_enable_x64` is set.

    Raises:
        UnsupportedLayerError: operators, attributes or types without an equal, all of them by name;
            another opset; a shape that depends on an input's values.
        FileError: anything else that is wrong with the file.
        MissingExtraError: the onnx package is not installed.

    >>> from onnx import parser
    >>> model = parser.parse_model('''
    ...     <ir_version: 8, opset_import: ["" : 17]>
    ...     double (float[n, 2] x) => (float[n, 2] y)
    ...     <float[2] w = {2, 3}> { y = Mul(x, w) }''')
    >>> imported = from_onnx(model)
    >>> imported.variables["params"]["w"].tolist()
    [2.0, 3.0]
    >>> imported.module.apply(imported.variables, np.ones((1, 2), "float32")).tolist()
    [[2.0, 3.0]]
    """
    name, model, external = open_model(source)
    report = ImportReport(name)
    parser = Parser(model, name, external)
    fixed = _fixed(constants or {}, model.graph)
    graph, inputs = parser.model(model.graph, fixed)
    static = Static(graph)
    _refuse_inputs(graph, inputs, static)
    for value in fixed:
        report.add("option", value, "mapped", "an input that is a constant of the program")
    for node in graph.nodes:
        body = "" if node.function is None else ", by its definition"
        report.add("layer", node.name, "mapped", f"{node.operator}{body}")
    variables = place(graph, static, trainable, report)
    if model.training_info:
        report.add("option", "training_info", "ignored", "train it with fastgpu")
    return Imported(OnnxModel(graph, _reshaped(inputs, shapes or {})), variables, report)


def _fixed(constants: Mapping[str, Any], graph: Any) -> dict[str, np.ndarray]:
    """Fixed inputs as arrays of the types that the file declares."""
    dtypes = {value.name: read_input(value).dtype for value in graph.input}
    try:
        return {name: np.asarray(value, dtypes.get(name)) for name, value in constants.items()}
    except (TypeError, ValueError) as error:
        raise FileError("constants={...} holds no array", got=str(error)) from error


def _refuse_inputs(graph: Graph, inputs: Sequence[Input], static: Static) -> None:
    needed = [each.name for each in inputs if each.name in static.names[graph]]
    if needed:
        raise UnsupportedLayerError(
            f"shapes in the model depend on the values of {', '.join(needed)}",
            expected="shapes that follow from the shapes of the inputs and from constants",
            fix="fix them: from_onnx(..., constants={"
            + ", ".join(f"{name!r}: value" for name in needed)
            + "})",
        )


def _reshaped(
    inputs: Sequence[Input], shapes: Mapping[str, Sequence[int | None]]
) -> tuple[Input, ...]:
    unknown = sorted(set(shapes) - {each.name for each in inputs})
    if unknown:
        raise FileError(
            f"shapes={{...}} names {', '.join(unknown)}",
            expected=", ".join(each.name for each in inputs),
        )
    return tuple(
        dataclasses.replace(each, sizes=tuple(shapes[each.name])) if each.name in shapes else each
        for each in inputs
    )
