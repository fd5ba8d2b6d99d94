"""Which variables a graph declares, and which stored weight becomes each of them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fastgpu.errors import ConfigurationError, FileError, WeightsError
from fastgpu.importers.imported import ImportReport
from fastgpu.importers.keras.graph import Graph
from fastgpu.importers.keras.layers.initializers import Initializer
from fastgpu.importers.keras.layers.layer import Path

# What stands for a size that the model leaves open. No weight depends on it, but a pooled axis must
# not run empty, and axes that meet again after pooling must divide evenly.
_STAND_INS = (256, 224, 1024, 48)
_SHOWN = 10


@dataclass(frozen=True)
class Declared:
    """A variable that a layer asks for."""

    collection: str
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Stored:
    """A weight in a file or in a live model; `name` is None where the source goes by order."""

    where: str
    name: str | None
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class WeightSource(Protocol):
    """Something that holds weights."""

    def find(self, graph: Graph) -> tuple[dict[Path, list[Stored]], dict[str, str]]:
        """The stored weights of every layer path in Keras's order, and what is no layer's.

        The second value maps the place of each leftover to the reason why it may be ignored, or to
        "" if there is none.
        """
        ...


class Declarations:
    """Stands in for the variables while a graph is traced, and notes what is asked for."""

    def __init__(self) -> None:
        self.layers: dict[Path, dict[str, Declared]] = {}

    def get(
        self,
        collection: str,
        path: Path,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        initializer: Initializer,
    ) -> jax.Array:
        """Note a variable; the value is a zero of its shape."""
        declared = Declared(collection, name, shape, dtype)
        known = self.layers.setdefault(path, {}).setdefault(name, declared)
        if known != declared:
            raise FileError(
                f"layer {'/'.join(path)!r} is called on inputs that need different weights",
                expected=f"{name} {known.shape}",
                got=str(shape),
            )
        return jnp.zeros(shape, dtype)

    def put(self, collection: str, path: Path, name: str, value: jax.Array) -> None:
        """Nothing is kept."""

    def key(self, path: Path) -> jax.Array:
        """Any key: only shapes are traced."""
        return jax.random.key(0)


def declare(graph: Graph, source: str) -> dict[Path, list[Declared]]:
    """The variables of every layer, by tracing the graph on abstract inputs.

    Raises `FileError` if the layers do not fit together.
    """
    _check_precision(graph, source)
    open_sizes = any(None in spec.shape[1:] for spec in graph.inputs)
    unknown = [spec.name for spec in graph.inputs if not spec.shape]
    if unknown:
        raise FileError(
            f"{source} does not say the shape of its input",
            expected="an Input layer, or a model that was built before it was saved",
            fix="call the Keras model on a batch once, then save it again",
        )
    failure: Exception | None = None
    for size in _STAND_INS if open_sizes else _STAND_INS[:1]:
        declarations = Declarations()
        shapes = [
            jax.ShapeDtypeStruct(
                (spec.shape[0] or 1, *(size if n is None else n for n in spec.shape[1:])),
                jax.dtypes.canonicalize_dtype(spec.dtype),
            )
            for spec in graph.inputs
        ]
        try:
            jax.eval_shape(lambda *xs, to=declarations: graph.run(to, xs, False), *shapes)
        except FileError:
            raise
        except Exception as error:  # Whatever JAX, or a custom layer, says about unfit shapes.
            failure = error
        else:
            return {path: list(names.values()) for path, names in declarations.layers.items()}
    raise FileError(
        f"the layers of {source} do not fit together",
        expected="a graph that runs on the inputs it declares",
        got=f"{type(failure).__name__}: {failure}",
        fix="check the config; if it loads in Keras, please report it",
    ) from failure


def _check_precision(graph: Graph, source: str) -> None:
    """JAX would silently compute a float64 model in float32."""
    for placed in graph.layers:
        if isinstance(placed.layer, Graph):
            _check_precision(placed.layer, source)
        elif "float64" in (placed.policy.compute_dtype, placed.policy.variable_dtype) and (
            jax.dtypes.canonicalize_dtype("float64") != jnp.float64
        ):
            raise ConfigurationError(
                f"layer {placed.name!r} of {source} computes in float64",
                expected="64-bit numbers switched on in JAX",
                got="jax_enable_x64=False",
                fix='jax.config.update("jax_enable_x64", True) before from_keras',
            )


def fill(
    declared: Mapping[Path, list[Declared]],
    stored: Mapping[Path, list[Stored]],
    leftovers: Mapping[str, str],
    report: ImportReport,
) -> dict[str, Any]:
    """Read every declared variable from where it is stored.

    Returns collections of nested dicts. Raises `WeightsError` naming every weight that is missing,
    left over, or of another shape; then nothing is read.
    """
    problems, pairs = [], []
    for path in sorted({*declared, *stored}, key=str):
        problems += _pair(path, declared.get(path, []), stored.get(path, []), pairs)
    problems += [f"{where} belongs to no layer" for where, why in leftovers.items() if not why]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise WeightsError(
            f"the weights of {report.source} are not those of its config",
            expected="one stored weight for every variable of every layer, of the same shape",
            got="; ".join(problems[:_SHOWN]) + more,
            fix="save config and weights together, from one model",
        )
    variables: dict[str, Any] = {}
    for path, wanted, found in pairs:
        scope = variables.setdefault(wanted.collection, {})
        for name in path:
            scope = scope.setdefault(name, {})
        dtype = jax.dtypes.canonicalize_dtype(wanted.dtype)
        scope[wanted.name] = jnp.asarray(found.read().astype(dtype, copy=False))
        report.parameter_count += math.prod(wanted.shape)
        name = "/".join((*path, wanted.name))
        shape = ",".join(map(str, wanted.shape))
        report.add("variable", name, "mapped", f"{dtype}[{shape}] in {wanted.collection}")
    for where, why in leftovers.items():
        report.add("variable", where, "ignored", why)
    return variables


def _pair(
    path: Path,
    declared: list[Declared],
    stored: list[Stored],
    pairs: list[tuple[Path, Declared, Stored]],
) -> list[str]:
    """Match the weights of one layer by name where both sides have one, else by order."""
    layer = "/".join(path)
    by_name = {found.name: found for found in stored}
    if declared and all(wanted.name in by_name for wanted in declared):
        matches = [(wanted, by_name.pop(wanted.name)) for wanted in declared]
        extra = list(by_name.values())
    else:
        matches = list(zip(declared, stored, strict=False))
        extra = stored[len(declared) :]
    problems = [f"layer {layer!r}: {found.where} {found.shape} is left over" for found in extra]
    problems += [
        f"layer {layer!r}: {wanted.name} {wanted.shape} is missing"
        for wanted in declared[len(matches) :]
    ]
    problems += [
        f"layer {layer!r}: {wanted.name} is {wanted.shape} in the config and {found.shape} in "
        f"{found.where}"
        for wanted, found in matches
        if wanted.shape != found.shape
    ]
    pairs += [(path, wanted, found) for wanted, found in matches]
    return problems
