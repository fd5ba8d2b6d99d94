"""From protobuf to `Graph`: names resolved, functions expanded, every refusal collected first.

Bounds come before work: the number of nodes after expansion, and how deep graphs and functions are
nested. A function that calls itself is nested too deep.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fastgpu.errors import FileError, UnsupportedLayerError, require
from fastgpu.importers.onnx.dtypes import ELEMENT_TYPES, element_type, type_name
from fastgpu.importers.onnx.graph import Graph, Input, Node
from fastgpu.importers.onnx.operators import Rule, find
from fastgpu.importers.onnx.tensors import ExternalData, read_tensor

OLDEST_OPSET, NEWEST_OPSET = 6, 28
_MOST_NODES = 500_000
_DEEPEST = 24
_STANDARD = ("", "ai.onnx")
# Attributes that are element types.
_TYPES = {"to", "dtype", "output_dtype", "output_datatype", "precision", "softmax_precision"}
# Attributes of AttributeProto by its type; tensors, graphs and the rest are read by themselves.
_PLAIN = {1: "f", 2: "i", 6: "floats", 7: "ints"}


class Parser:
    """Reads the graphs of one model."""

    def __init__(self, model: Any, source: str, external: ExternalData) -> None:
        self.source, self.external = source, external
        self.opsets = self._opsets(model.opset_import)
        self.functions = {
            (function.domain, function.name, function.overload): function
            for function in model.functions
        }
        self.refused: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}
        self.count, self.numbers = 0, itertools.count()
        if len(self.functions) != len(model.functions):
            raise FileError(f"{source} defines a function twice")

    def model(self, graph: Any, fixed: Mapping[str, np.ndarray]) -> tuple[Graph, list[Input]]:
        """The main graph and its inputs; inputs in `fixed` become constants."""
        stored = {tensor.name for tensor in graph.initializer}
        declared = [value for value in graph.input if value.name not in stored]
        names = [value.name for value in declared]
        unknown = sorted(set(fixed) - set(names))
        if unknown:
            raise FileError(
                f"{self.source} has no inputs {', '.join(unknown)}", expected=", ".join(names)
            )
        left = [value for value in declared if value.name not in fixed]
        parsed = self.graph(graph, [value.name for value in left], {}, {}, 0, self.opsets, fixed)
        self._raise_refusals()
        if not parsed.outputs:
            raise FileError(f"{self.source} has no outputs")
        return parsed, [read_input(value) for value in left]

    def graph(
        self,
        graph: Any,
        inputs: Iterable[str],
        scope: Mapping[str, None],
        values: Mapping[str, Any],
        depth: int,
        opsets: Mapping[str, int],
        fixed: Mapping[str, np.ndarray] | None = None,
    ) -> Graph:
        """One graph. `scope` has the names around it, `values` the attributes of a function."""
        self._check_depth(depth)
        if graph.sparse_initializer:
            self._refuse("sparse initializers", "store them as dense arrays")
        constants = dict(fixed or {})
        for tensor in graph.initializer:
            if tensor.name in constants or not tensor.name:
                raise self._twice(tensor.name)
            constants[tensor.name] = self._tensor(tensor, f"initializer {tensor.name!r}")
        initializers = frozenset(constants).difference(fixed or ())
        names = tuple(inputs)
        if len(set(names)) != len(names):
            raise self._twice(next(name for name in names if names.count(name) > 1))
        visible = dict.fromkeys([*scope, *constants, *names])
        nodes = self._nodes(graph.node, visible, constants, values, depth, opsets)
        outputs = tuple(value.name for value in graph.output)
        self._check_outputs(outputs, visible)
        return Graph(names, outputs, nodes, constants, initializers)

    def _nodes(
        self,
        protos: Any,
        visible: dict[str, None],
        constants: dict[str, np.ndarray],
        values: Mapping[str, Any],
        depth: int,
        opsets: Mapping[str, int],
    ) -> list[Node]:
        nodes = []
        produced: set[str] = set()
        self.count += len(protos)
        if self.count > _MOST_NODES:
            raise FileError(
                f"{self.source} has too many nodes",
                expected=f"at most {_MOST_NODES:,} after functions are expanded",
            )
        for proto in _in_order(protos, visible, self.source):
            for name in filter(None, proto.output):
                if name in produced or name in constants:
                    raise self._twice(name)
                produced.add(name)
            attributes = self._attributes(proto, visible, values, depth, opsets)
            if proto.op_type == "Constant" and proto.domain in _STANDARD:
                constants[proto.output[0]] = _constant(attributes, proto)
            else:
                nodes.append(self._node(proto, attributes, depth, opsets))
            visible.update(dict.fromkeys(filter(None, proto.output)))
        return nodes

    def _node(
        self, proto: Any, attributes: dict[str, Any], depth: int, opsets: Mapping[str, int]
    ) -> Node:
        name = proto.name or next(filter(None, proto.output), proto.op_type)
        standard = proto.domain in _STANDARD
        opset = opsets.get("" if standard else proto.domain, 0)
        rule, function = None, None
        custom = self.functions.get((proto.domain, proto.op_type, proto.overload))
        if custom is not None:
            function = self._function(custom, attributes, depth, None)
        elif standard and (rule := find(proto.op_type, opset)) is not None:
            self._check_call(rule, proto, attributes, name)
        elif standard and (schema := _schema_function(proto.op_type, opset)) is not None:
            function = self._function(schema.function_body, attributes, depth, schema)
        else:
            label = proto.op_type if standard else f"{proto.domain}.{proto.op_type}"
            self._refuse(label, "no rule in the table")
        return Node(
            proto.op_type,
            name,
            next(self.numbers),
            opset,
            tuple(proto.input),
            tuple(proto.output),
            attributes if function is None else {},
            rule,
            function,
        )

    def _check_call(self, rule: Rule, proto: Any, attributes: dict[str, Any], name: str) -> None:
        unknown = sorted(set(attributes) - rule.attributes)
        if unknown:
            self._refuse(f"{rule.operator} with {', '.join(unknown)}", "no such attribute")
        missing = sorted(rule.needed - set(attributes))
        if missing:
            raise FileError(f"{rule.operator} {name!r} has no {', '.join(missing)}")
        for attribute in _TYPES & set(attributes):
            if attributes[attribute] not in (0, *ELEMENT_TYPES):
                self._refuse(
                    f"{rule.operator} to {type_name(attributes[attribute])}", "no such type in JAX"
                )
        given = len(proto.input)
        if given < rule.required or (given > len(rule.inputs) and not rule.variadic):
            raise FileError(
                f"{rule.operator} {name!r} has {given} inputs",
                expected=f"{rule.required} to {len(rule.inputs)}: {', '.join(rule.inputs)}",
            )

    def _function(
        self, function: Any, attributes: Mapping[str, Any], depth: int, schema: Any
    ) -> Graph:
        """A function's body with the attributes of one call put in."""
        self._check_depth(depth + 1)
        opsets = {**self.opsets, **self._opsets(function.opset_import)}
        values: dict[str, Any] = {}
        defaults = list(function.attribute_proto)
        if schema is not None:
            defaults += [
                a.default_value for a in schema.attributes.values() if a.default_value.name
            ]
        for default in defaults:
            values[default.name] = self._attribute(default, {}, {}, depth, opsets)
        values.update(attributes)
        inputs = tuple(function.input)
        constants: dict[str, np.ndarray] = {}
        visible = dict.fromkeys(inputs)
        nodes = self._nodes(function.node, visible, constants, values, depth + 1, opsets)
        outputs = tuple(function.output)
        self._check_outputs(outputs, visible)
        return Graph(inputs, outputs, nodes, constants)

    def _attributes(
        self,
        proto: Any,
        visible: Mapping[str, None],
        values: Mapping[str, Any],
        depth: int,
        opsets: Mapping[str, int],
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for attribute in proto.attribute:
            if attribute.name in found:
                raise self._twice(f"{proto.op_type}.{attribute.name}")
            if attribute.ref_attr_name:
                if attribute.ref_attr_name in values:
                    found[attribute.name] = values[attribute.ref_attr_name]
            else:
                found[attribute.name] = self._attribute(attribute, visible, values, depth, opsets)
        return found

    def _attribute(
        self,
        attribute: Any,
        visible: Mapping[str, None],
        values: Mapping[str, Any],
        depth: int,
        opsets: Mapping[str, int],
    ) -> Any:
        kind = attribute.type
        if kind in _PLAIN:
            value = getattr(attribute, _PLAIN[kind])
            return value if kind <= 2 else tuple(value)
        if kind == 3:
            return _text(attribute.s)
        if kind == 8:
            return tuple(_text(value) for value in attribute.strings)
        if kind == 4:
            return self._tensor(attribute.t, f"attribute {attribute.name!r}")
        if kind == 5:
            inputs = [value.name for value in attribute.g.input]
            return self.graph(attribute.g, inputs, visible, values, depth + 1, opsets)
        if kind == 13:
            return None  # the type of an absent optional value
        self._refuse(f"the attribute {attribute.name}", f"attributes of type {kind} are not read")
        return None

    def _tensor(self, tensor: Any, where: str) -> np.ndarray:
        try:
            return read_tensor(tensor, where, self.external)
        except UnsupportedLayerError as error:
            self._refuse(error.summary, "no such arrays in JAX")
            return np.zeros((), np.float32)

    def _opsets(self, imports: Any) -> dict[str, int]:
        found = {
            "" if entry.domain in _STANDARD else entry.domain: entry.version for entry in imports
        }
        version = found.get("", OLDEST_OPSET)
        if not OLDEST_OPSET <= version <= NEWEST_OPSET:
            raise UnsupportedLayerError(
                f"{self.source} is written in opset {version}",
                expected=f"opset {OLDEST_OPSET} to {NEWEST_OPSET}",
                fix="convert it with onnx.version_converter, or export it again",
            )
        return found

    def _refuse(self, what: str, reason: str) -> None:
        self.refused[what] += 1
        self.reasons[what] = reason

    def _raise_refusals(self) -> None:
        if self.refused:
            listed = ", ".join(
                f"{name} ({self.reasons[name]}{f', {n} times' if n > 1 else ''})"
                for name, n in sorted(self.refused.items())
            )
            raise UnsupportedLayerError(
                f"{self.source} has parts without an equal in fastgpu",
                expected="the operators listed in docs/onnx.md",
                got=listed,
                fix="export the model without them, or compute these parts outside it",
            )

    def _check_depth(self, depth: int) -> None:
        if depth > _DEEPEST:
            raise FileError(
                f"{self.source} nests graphs or functions too deep, or a function calls itself",
                expected=f"at most {_DEEPEST} levels",
            )

    def _check_outputs(self, outputs: Iterable[str], visible: Mapping[str, None]) -> None:
        missing = [name for name in outputs if name not in visible]
        if missing:
            raise FileError(f"{self.source}: nothing computes the output {missing[0]!r}")

    def _twice(self, name: str) -> FileError:
        return FileError(
            f"{self.source} gives the name {name!r} twice" if name else f"{self.source}: no name",
            expected="one value of each name",
            fix="do not use this file, or export the model again",
        )


def _in_order(protos: Any, visible: Mapping[str, None], source: str) -> list[Any]:
    """Nodes in an order in which they can run; mostly it is their own."""
    done = set(visible) | {""}
    waiting: dict[str, list[int]] = {}
    missing: dict[int, int] = {}
    producer = {name: i for i, proto in enumerate(protos) for name in proto.output if name}
    ready, order = [], []
    for i, proto in enumerate(protos):
        names = {n for n in _read_by(proto) if n not in done and n in producer}
        unknown = [n for n in proto.input if n not in done and n not in producer]
        if unknown:
            raise FileError(
                f"{source}: nothing computes {unknown[0]!r}, which "
                f"{proto.op_type} {proto.name!r} reads"
            )
        missing[i] = len(names)
        for name in names:
            waiting.setdefault(name, []).append(i)
        if not names:
            ready.append(i)
    ready.reverse()
    while ready:
        i = ready.pop()
        order.append(protos[i])
        for name in dict.fromkeys(filter(None, protos[i].output)):
            for reader in waiting.pop(name, ()):
                missing[reader] -= 1
                if not missing[reader]:
                    ready.append(reader)
    if len(order) != len(protos):
        stuck = next(proto for i, proto in enumerate(protos) if missing[i])
        raise FileError(
            f"{source}: the graph is cyclic at {stuck.op_type} {stuck.name!r}",
            fix="do not use this file, or export the model again",
        )
    return order


def _read_by(proto: Any) -> set[str]:
    """The names that a node reads, also those that its graphs take from around them."""
    names = set(proto.input)
    for attribute in proto.attribute:
        if attribute.type == 5:
            graph = attribute.g
            inner: set[str] = {value.name for value in graph.output}
            own = {value.name for value in (*graph.input, *graph.initializer)}
            for node in graph.node:
                inner |= _read_by(node)
                own.update(node.output)
            names |= inner - own
    return names


def _schema_function(operator: str, opset: int) -> Any:
    """ONNX's own definition of an operator by others, if it has one that needs no types."""
    defs = require("onnx.defs", "onnx")
    if not defs.has(operator, opset):
        return None
    schema = defs.get_schema(operator, opset)
    return schema if schema.has_function else None


def _constant(attributes: Mapping[str, Any], proto: Any) -> np.ndarray:
    if len(attributes) != 1 or len(proto.output) != 1:
        raise FileError(f"Constant {proto.name!r} has {len(attributes)} values", expected="one")
    ((kind, value),) = attributes.items()
    dtypes = {"value_float": "float32", "value_floats": "float32"}
    dtypes |= {"value_int": "int64", "value_ints": "int64"}
    if kind == "value" and isinstance(value, np.ndarray):
        return value
    if kind not in dtypes:
        raise UnsupportedLayerError(
            f"Constant {proto.name!r} holds {kind}", expected="value, " + ", ".join(dtypes)
        )
    try:
        return np.asarray(value, dtypes[kind])
    except (TypeError, ValueError) as error:
        raise FileError(f"Constant {proto.name!r}: {kind} is no number", got=repr(value)) from error


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise FileError("an attribute's text is not UTF-8", got=repr(value[:40])) from error


def read_input(value: Any) -> Input:
    """What a file declares of an input."""
    where = f"input {value.name!r}"
    kind = value.type.WhichOneof("value")
    sequence = kind == "sequence_type"
    type_ = value.type.sequence_type.elem_type if sequence else value.type
    if kind == "optional_type":
        type_ = value.type.optional_type.elem_type
        sequence = type_.WhichOneof("value") == "sequence_type"
        type_ = type_.sequence_type.elem_type if sequence else type_
    if type_.WhichOneof("value") != "tensor_type":
        raise UnsupportedLayerError(f"{where} is {kind or 'of no type'}", expected="a tensor")
    tensor = type_.tensor_type
    dtype = element_type(tensor.elem_type, where)
    if sequence or not tensor.HasField("shape"):
        return Input(value.name, None, dtype, sequence)
    sizes: list[int | str | None] = []
    for dim in tensor.shape.dim:
        which = dim.WhichOneof("value")
        fixed = which == "dim_value" and dim.dim_value >= 0
        sizes.append(dim.dim_value if fixed else dim.dim_param if which == "dim_param" else None)
    return Input(value.name, tuple(size if size != "" else None for size in sizes), dtype)
