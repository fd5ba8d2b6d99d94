"""Which variables a graph declares, and which stored weight becomes each of them."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from fastgpu.importers.keras.layers.placed import Placed, values_of

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
    _check_precision(graph.layers, source)
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
            jax.eval_shape(
                lambda *xs, to=declarations: values_of(graph.run(to, xs, False)), *shapes
            )
        except FileError:
            raise
        except Exception as error:  # Whatever JAX, or a custom layer, says about unfit shapes.
            failure = error
        else:
            places = {path: number for number, path in enumerate(_places(graph.layers))}
            return {
                path: list(declarations.layers[path].values())
                for path in sorted(declarations.layers, key=lambda path: _place(path, places))
            }
    raise FileError(
        f"the layers of {source} do not fit together",
        expected="a graph that runs on the inputs it declares",
        got=f"{type(failure).__name__}: {failure}",
        fix="check the config; if it loads in Keras, please report it",
    ) from failure


def _places(layers: Iterable[Placed]) -> Iterator[Path]:
    """The paths of all layers in the order of the config, which is Keras's order of weights."""
    for placed in layers:
        yield placed.path
        nested = placed.layer
        yield from _places(nested.layers if isinstance(nested, Graph) else placed.children())


def _place(path: Path, places: Mapping[Path, int]) -> int:
    while path not in places:
        path = path[:-1]
    return places[path]


def _check_precision(layers: Iterable[Placed], source: str) -> None:
    """JAX would silently compute a float64 model in float32."""
    for placed in layers:
        nested = placed.layer
        _check_precision(nested.layers if isinstance(nested, Graph) else placed.children(), source)
        if isinstance(nested, Graph):
            continue
        if "float64" in (placed.policy.compute_dtype, placed.policy.variable_dtype) and (
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
    problems: list[str] = []
    pairs: list[tuple[Path, Declared, Stored]] = []
    wanted = _by_owner(declared, stored)
    for path in sorted({*wanted, *stored}, key=str):
        problems += _pair(path, wanted.get(path, []), stored.get(path, []), pairs)
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
    return _with_memories(variables, declared)


def _with_memories(
    variables: dict[str, Any], declared: Mapping[Path, list[Declared]]
) -> dict[str, Any]:
    """Add what stateful layers remember: zeros, which Keras does not save."""
    for path, names in declared.items():
        for memory in names:
            if memory.collection == "rnn_state":
                scope = variables.setdefault("rnn_state", {})
                for name in path:
                    scope = scope.setdefault(name, {})
                scope[memory.name] = jnp.zeros(memory.shape, memory.dtype)
    return variables


def _by_owner(
    declared: Mapping[Path, list[Declared]], stored: Mapping[Path, list[Stored]]
) -> dict[Path, list[tuple[Path, Declared]]]:
    """The declared variables by the path under which the source keeps them.

    Some sources keep the weights of a layer and of all its parts in one list.
    """
    owners: dict[Path, list[tuple[Path, Declared]]] = {}
    for path, names in declared.items():
        prefixes = (path[:length] for length in range(len(path), 0, -1))
        owner = next((prefix for prefix in prefixes if prefix in stored), path)
        kept = [(path, name) for name in names if name.collection != "rnn_state"]
        owners.setdefault(owner, []).extend(kept)
    return owners


def _pair(
    owner: Path,
    declared: list[tuple[Path, Declared]],
    stored: list[Stored],
    pairs: list[tuple[Path, Declared, Stored]],
) -> list[str]:
    """Match the weights of one layer by name where both sides have one, else by order.

    Parts of a layer may have weights of the same name; these are matched in order.
    """
    layer = "/".join(owner)
    names = [wanted.name for _, wanted in declared]
    if declared and not Counter(names) - Counter(found.name or "" for found in stored):
        left = list(stored)
        matches = []
        for path, wanted in declared:
            found = next(found for found in left if found.name == wanted.name)
            left.remove(found)
            matches.append((path, wanted, found))
        extra = left
    else:
        pairing = zip(declared, stored, strict=False)
        matches = [(path, wanted, found) for (path, wanted), found in pairing]
        extra = stored[len(declared) :]
    problems = [f"layer {layer!r}: {found.where} {found.shape} is left over" for found in extra]
    problems += [
        f"layer {'/'.join(path)!r}: {wanted.name} {wanted.shape} is missing"
        for path, wanted in declared[len(matches) :]
    ]
    problems += [
        f"layer {'/'.join(path)!r}: {wanted.name} is {wanted.shape} in the config and "
        f"{found.shape} in {found.where}"
        for path, wanted, found in matches
        if wanted.shape != found.shape
    ]
    pairs += matches
    return problems
