"""Which values must be known when the program is traced, because shapes follow from them.

Found backwards from the inputs that rules declare as static: what a known value is made of must be
known too, except behind an operator that reads nothing but a shape.
"""

from collections.abc import Collection, Iterable

from fastgpu.importers.onnx.graph import Graph, Node

# Their results are known whatever the values of their inputs are.
_SHAPES_ONLY = ("Shape", "Size", "SequenceLength", "OptionalHasElement")
_CONTROL = ("If", "Loop", "Scan")


class Static:
    """The names that must be known, for every graph of a model."""

    def __init__(self, graph: Graph) -> None:
        self.names: dict[Graph, set[str]] = {}
        self._walked: dict[Graph, set[int]] = {}
        self._walk(graph, ())

    def _walk(self, graph: Graph, outputs: Collection[int]) -> set[str]:
        """The names in a graph that must be known, those from around it included."""
        known = self.names.setdefault(graph, set())
        if graph in self._walked and self._walked[graph].issuperset(outputs):
            return known  # nested loops would otherwise be walked twice at every level
        self._walked.setdefault(graph, set()).update(outputs)
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
        if node.operator in _CONTROL:
            for graph in node.subgraphs():
                needs += self._control(node, graph, wanted)
        elif wanted and node.operator not in _SHAPES_ONLY:
            needs += node.inputs
        return needs

    def _control(self, node: Node, graph: Graph, wanted: list[int]) -> list[str]:
        """What a branch, or a loop's body, needs of its node's inputs and of the names around it.

        A loop's state is input i + 2 and output i + 1 of its body, after step and condition.
        """
        inputs_before, outputs_before = (2, 1) if node.operator == "Loop" else (0, 0)
        states = max(len(graph.inputs) - inputs_before, 0) if node.operator != "If" else 0
        collected = node.operator == "Loop" and len(graph.outputs) - outputs_before > states
        outputs = {i + outputs_before for i in wanted if i + outputs_before < len(graph.outputs)}
        if collected and not graph.keeps_condition():
            outputs.add(0)
        while True:
            inner = self._walk(graph, outputs)
            formal = {i for i, name in enumerate(graph.inputs) if name in inner}
            # what a state is made of, and what it starts from, is known or unknown together
            formal |= {i - outputs_before + inputs_before for i in outputs if i >= outputs_before}
            back = {i - inputs_before for i in formal if inputs_before <= i}
            back = {i + outputs_before for i in back if i < states}
            back = {i for i in back if i < len(graph.outputs)}
            if back <= outputs:
                break
            outputs |= back
        own = {name for inside in graph.nodes for name in inside.outputs}
        own.update(graph.inputs, graph.constants)
        passed = [i for i in formal if inputs_before <= i < len(node.inputs)] if states else []
        # arrays collected by step are as long as the loop: its number of steps is a shape
        decides = {"If": 1, "Loop": 2, "Scan": 0}[node.operator] if wanted or collected else 0
        around = (name for name in inner if name not in own)
        return [*node.inputs[:decides], *(node.inputs[i] for i in passed), *around]
