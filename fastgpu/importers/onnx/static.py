"""Which values must be known when the program is traced, because shapes follow from them.

Found backwards from the inputs that rules declare as static: what a known value is made of must be
known too, except behind an operator that reads nothing but a shape.
"""

from collections.abc import Iterable

from fastgpu.importers.onnx.graph import Graph, Node

# Their results are known whatever the values of their inputs are.
_SHAPES_ONLY = ("Shape", "Size", "SequenceLength", "OptionalHasElement")


class Static:
    """The names that must be known, for every graph of a model."""

    def __init__(self, graph: Graph) -> None:
        self.names: dict[Graph, set[str]] = {}
        self._walk(graph, ())

    def _walk(self, graph: Graph, outputs: Iterable[int]) -> set[str]:
        """The names in a graph that must be known, those from around it included."""
        known = self.names.setdefault(graph, set())
        known.update(graph.outputs[i] for i in outputs)
        for node in reversed(graph.nodes):
            wanted = [i for i, name in enumerate(node.outputs) if name and name in known]
            known.update(name for name in self._needs(node, wanted) if name)
        return known

    def _needs(self, node: Node, wanted: list[int]) -> Iterable[str]:
        if node.function is not None:
            inner = self._walk(node.function, wanted)
            return [
                a for a, b in zip(node.inputs, node.function.inputs, strict=False) if b in inner
            ]
        needs = []
        if node.rule is not None:
            needs += [name for i, name in enumerate(node.inputs) if node.rule.is_static(i)]
        if wanted and node.operator not in _SHAPES_ONLY:
            needs += node.inputs
        for graph in node.subgraphs():
            collected = node.operator == "Loop" and len(graph.outputs) > len(graph.inputs) - 1
            # arrays collected by step are as long as the loop: its number of steps is a shape
            needs += node.inputs[:2] if collected else ()
            needs += self._subgraph(node, graph, bool(wanted), collected)
        return needs

    def _subgraph(self, node: Node, graph: Graph, wanted: bool, counted: bool) -> list[str]:
        """What a subgraph needs of its node's inputs, and of the names around it."""
        outputs = set(range(len(graph.outputs))) if wanted else set()
        outputs |= {0} if counted and not graph.keeps_condition() else set()
        while True:
            inner = self._walk(graph, outputs)
            needed = [i for i, name in enumerate(graph.inputs) if name in inner]
            # a loop's state comes back as output i - 1, after the condition; a scan's as output i
            back = {i - 1 for i in needed if i >= 2} if node.operator == "Loop" else set(needed)
            back = {i for i in back if i < len(graph.outputs)} if node.operator != "If" else set()
            if back <= outputs:
                break
            outputs |= back
        own = {name for inside in graph.nodes for name in inside.outputs}
        own.update(graph.inputs, graph.constants)
        # the step and the condition of a loop are its own, not inputs of the node
        first = 2 if node.operator == "Loop" else 0
        passed = [node.inputs[i] for i in needed if first <= i < len(node.inputs)]
        return [*passed, *(name for name in inner if name not in own)]
