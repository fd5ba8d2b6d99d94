"""Which arrays of a file are variables of the module, in which collection, and under which name.

Floating initializers are trained ("params"), the moving statistics of batch normalizations are
"batch_stats", other large arrays "constants". What shapes follow from, and what is small and not
trained, is part of the graph.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fastgpu.importers.imported import ImportReport
from fastgpu.importers.onnx.dtypes import as_jax, is_float
from fastgpu.importers.onnx.graph import Graph, Path, Slot
from fastgpu.importers.onnx.static import Static

# Smaller arrays that nobody trains are constants of the program.
_SMALL = 1024
_STATISTICS = (3, 4)


def place(
    graph: Graph,
    static: Static,
    trainable: Callable[[str], bool] | None,
    report: ImportReport,
) -> dict[str, Any]:
    """Move arrays from the graph's constants to slots; gives the variables."""
    graphs = list(dict.fromkeys(graph.everything()))
    used = {name for each in graphs for name in _read_in(each)}
    _separate_statistics(graphs, used)
    statistics = {
        (each, node.inputs[i])
        for each in graphs
        for node in each.nodes
        if node.operator == "BatchNormalization" and node.rule is not None
        for i in _STATISTICS
        if node.inputs[i] in each.constants
    }
    paths = Paths()
    variables: dict[str, Any] = {}
    for each in graphs:
        known = static.names.get(each, set())
        for name, value in list(each.constants.items()):
            if name not in used:
                report.add("variable", name, "ignored", "nothing reads it")
                del each.constants[name]
                continue
            collection = _collection(each, name, value, known, statistics, trainable)
            if collection is None:
                if name in each.initializers:
                    report.add("variable", name, "mapped", f"{_type(value)}, a constant")
                continue
            array = _stored(value, name, report)
            slot = Slot(collection, paths.of(collection, name))
            each.slots[name] = slot
            del each.constants[name]
            _put(variables, slot, array)
            report.parameter_count += array.size
            where = f"{collection} as {'/'.join(slot.path)}"
            report.add("variable", name, "mapped", f"{_type(array)} in {where}")
    return variables


def _collection(
    graph: Graph,
    name: str,
    value: np.ndarray,
    known: set[str],
    statistics: set[tuple[Graph, str]],
    trainable: Callable[[str], bool] | None,
) -> str | None:
    """The collection that an array goes to; None if it stays in the graph."""
    if name in known:
        return None
    if (graph, name) in statistics:
        return "batch_stats"
    floating = is_float(value.dtype) and value.dtype.itemsize > 1
    if trainable is None:
        trained = floating and name in graph.initializers and value.ndim > 0
    else:
        trained = floating and bool(trainable(name))
    if trained:
        return "params"
    return "constants" if value.size > _SMALL else None


def _separate_statistics(graphs: list[Graph], used: set[str]) -> None:
    """Give every batch normalization statistics of its own.

    Exporters write equal arrays once and hand them round with Identity: those of all untrained
    layers are equal, and would then move together.
    """
    taken: set[str] = set()
    readers = Counter(name for graph in graphs for node in graph.nodes for name in node.inputs)
    for graph in graphs:
        producers = {name: node for node in graph.nodes for name in node.outputs}
        for position, node in enumerate(graph.nodes):
            if node.operator != "BatchNormalization" or node.rule is None:
                continue
            inputs = list(node.inputs)
            for i in _STATISTICS:
                source = inputs[i]
                while source in producers and producers[source].operator == "Identity":
                    source = producers[source].inputs[0]
                alone = source == inputs[i] and source not in taken
                alone = alone and readers[source] == 1
                if source in graph.constants and not alone:
                    own = f"{node.name}.{'mean' if i == _STATISTICS[0] else 'var'}"
                    while own in used or own in producers or own in graph.constants:
                        own += "_"
                    graph.constants[own] = graph.constants[source]
                    inputs[i] = own
                    used.add(own)
                taken.add(inputs[i])
            graph.nodes[position] = dataclasses.replace(node, inputs=tuple(inputs))


def _read_in(graph: Graph) -> set[str]:
    return {*graph.outputs, *(name for node in graph.nodes for name in node.inputs)}


def _stored(value: np.ndarray, name: str, report: ImportReport) -> jax.Array:
    array = as_jax(value, f"initializer {name!r}")
    if array.dtype != value.dtype:
        why = f"{value.dtype} became {array.dtype}: JAX has 32 bits unless jax_enable_x64 is set"
        report.add("option", name, "ignored", why)
    return array


def _type(value: Any) -> str:
    return f"{value.dtype}[{','.join(map(str, value.shape))}]"


def _put(variables: dict[str, Any], slot: Slot, value: jax.Array) -> None:
    scope = variables.setdefault(slot.collection, {})
    for name in slot.path[:-1]:
        scope = scope.setdefault(name, {})
    scope[slot.path[-1]] = value


class Paths:
    """Names of a file as paths of nested dicts: `a.b/c` is `a`, `b`, `c`, kept apart by numbers.

    >>> paths = Paths()
    >>> [paths.of("params", name) for name in ("conv.weight", "conv", "conv/weight")]
    [('conv', 'weight'), ('conv_1',), ('conv', 'weight_1')]
    """

    def __init__(self) -> None:
        self.leaves: set[Path] = set()
        self.branches: set[Path] = set()
        self.numbers: Counter[Path] = Counter()

    def of(self, collection: str, name: str) -> Path:
        """The path of a name, different from that of every name before."""
        parts = [part for part in re.split(r"[./]+", name) if part] or ["unnamed"]
        path = (collection, *parts)
        if any(path[:i] in self.leaves for i in range(2, len(path))):
            # a name on the way is itself an array: this one stays flat
            path = (collection, "_".join(parts))
        wanted = path
        while path in self.leaves or path in self.branches:
            self.numbers[wanted] += 1
            path = (*wanted[:-1], f"{wanted[-1]}_{self.numbers[wanted]}")
        self.leaves.add(path)
        self.branches.update(path[:i] for i in range(2, len(path)))
        return path[1:]
