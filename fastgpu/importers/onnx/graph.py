"""A model's graph as plain data: nothing of protobuf, nothing that runs by itself."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastgpu.importers.onnx.operators import Rule

Path = tuple[str, ...]


@dataclass(frozen=True)
class Slot:
    """Where an array of the file lives: a collection, and its path there."""

    collection: str
    path: Path


@dataclass(frozen=True)
class Input:
    """An input of a model: its sizes (None for any, text for one that is the same everywhere).

    `shape` is None where the file does not say it; `sequence` where it is a list of arrays.
    """

    name: str
    sizes: tuple[int | str | None, ...] | None
    dtype: np.dtype[Any]
    sequence: bool = False


@dataclass(frozen=True, eq=False)
class Node:
    """One operation. Either `rule` computes it, or `function`, a graph without names from outside.

    `number` is unique in a model: random keys are made from it.
    """

    operator: str
    name: str
    number: int
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    rule: Rule | None = None
    function: "Graph | None" = None

    def __str__(self) -> str:
        return f"{self.operator} {self.name!r}"

    def subgraphs(self) -> "Iterator[Graph]":
        """The graphs among the attributes."""
        return (value for value in self.attributes.values() if isinstance(value, Graph))


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in an order in which they can run, and the arrays that the file holds for them.

    An array is in `constants`, as numpy, or its place is in `slots`, and it is a variable of the
    module. `initializers` are the names of those that are stored beside the nodes.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: list[Node]
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    initializers: frozenset[str] = frozenset()
    slots: dict[str, Slot] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Graph({len(self.nodes)} nodes, {', '.join(self.inputs)} -> {', '.join(self.outputs)})"
        )

    def keeps_condition(self) -> bool:
        """Whether a loop's body gives back its condition as it came, or always true."""
        name = self.outputs[0]
        producers = {output: node for node in self.nodes for output in node.outputs}
        while name in producers and producers[name].operator == "Identity":
            name = producers[name].inputs[0]
        constant = self.constants.get(name)
        always = constant is not None and constant.size == 1 and bool(constant.item())
        return always or (len(self.inputs) > 1 and name == self.inputs[1])

    def everything(self) -> "Iterator[Graph]":
        """This graph and every graph in it."""
        yield self
        for node in self.nodes:
            for inner in (*node.subgraphs(), *([node.function] if node.function else [])):
                yield from inner.everything()
