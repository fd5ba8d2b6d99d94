"""Inbound nodes: which layer is called on which tensors, in the formats of Keras 2 and 3."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastgpu.errors import FileError
from fastgpu.importers.keras.graph import Call, Structure, Tensor
from fastgpu.importers.keras.layers.constants import Slice, constant

Config = Mapping[str, Any]


def read_structure(nested: Any, offsets: Mapping[str, int]) -> Any:
    """`input_layers` or `output_layers`: the same structure with a `Tensor` for each triple.

    >>> read_structure({"y": ["dense", 0, 0]}, {})
    {'y': Tensor(layer='dense', call=0, index=0)}
    """
    if isinstance(nested, dict):
        return {key: read_structure(value, offsets) for key, value in nested.items()}
    if len(nested) == 3 and isinstance(nested[0], str):
        name, call, index = nested
        return Tensor(name, int(call) - offsets.get(name, 0), int(index))
    return [read_structure(item, offsets) for item in nested]


@dataclass
class Calls:
    """What `read_calls` finds: calls, offsets for `output_layers`, and ignored phases."""

    calls: list[Call] = field(default_factory=list)
    offsets: dict[str, int] = field(default_factory=dict)
    ignored_phases: dict[str, bool] = field(default_factory=dict)


def read_calls(entries: Sequence[Config], models: Mapping[str, str]) -> Calls:
    """All calls in a functional model. `models` gives the class of every nested model.

       A phase fixed in the graph, as in `base(x, training=False)`, holds in Keras 2. In Keras 3 the
       phase of the outermost call (which `fit` and `predict` always give) overrides it.
    Keras numbers the calls of a nested model from
       one where it counts the model's own construction as a call: Keras 2 everywhere (a Sequential
       only if it declares its input), Keras 3 only for Functional models in `output_layers`.
    """
    legacy = any(isinstance(node, list) for entry in entries for node in entry["inbound_nodes"])
    offsets = {
        entry_name(entry): 1
        for entry in entries
        if entry_name(entry) in models
        and (models[entry_name(entry)] != "Sequential" or (legacy and _declares_input(entry)))
    }
    found = Calls(offsets=offsets)
    names = {entry_name(entry) for entry in entries}
    for entry in entries:
        name = entry_name(entry)
        for number, node in enumerate(entry["inbound_nodes"]):
            if isinstance(node, list):
                args, kwargs = _legacy_node(node, offsets, names)
            else:
                args, kwargs = _decode(node["args"]), _decode(node.get("kwargs") or {})
            if not args and "inputs" in kwargs:
                args = [kwargs.pop("inputs")]
            training = kwargs.pop("training", None)
            if entry["class_name"] in ("TFOpLambda", "SlicingOpLambda"):
                kwargs.pop("name", None)
            kwargs = {key: value for key, value in kwargs.items() if value is not None}
            if not legacy and training is not None:
                if not _is_default(entry["class_name"], training):
                    found.ignored_phases[name] = training
                training = None
            call = Call(name, number, Structure.of(args), training, Structure.of(kwargs))
            found.calls.append(call)
    return found


def _is_default(class_name: str, training: bool) -> bool:
    """Whether a phase is what Keras writes for a layer by itself, which says nothing."""
    if training:
        return class_name.startswith("Random")
    return class_name.endswith(("Dropout", "Noise", "RNN", "LSTM", "GRU"))


def entry_name(entry: Config) -> str:
    """The name of an entry of `layers`."""
    return entry.get("name") or entry["config"]["name"]


def _declares_input(entry: Config) -> bool:
    layers = entry["config"] if isinstance(entry["config"], list) else entry["config"]["layers"]
    first = layers[0] if layers else {"class_name": "", "config": {}}
    return first["class_name"] == "InputLayer" or "batch_input_shape" in first["config"]


def _legacy_node(
    node: Any, offsets: Mapping[str, int], names: set[str]
) -> tuple[list[Any], dict[str, Any]]:
    """Keras 2: a nest of [layer, call, index, kwargs]; one tensor is not wrapped in a list."""
    kwargs: dict[str, Any] = {}

    def first(nested: Any) -> Any:
        if isinstance(nested, dict):
            return {key: first(item) for key, item in nested.items()}
        if nested and isinstance(nested[0], str):
            if len(nested) > 3:
                kwargs.update(nested[3])
            return _legacy_tensor(nested[:3], offsets)
        return [first(item) for item in nested]

    found = first(node)
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    return [found], _legacy_leaf(kwargs, offsets, names)


def _legacy_tensor(triple: list[Any], offsets: Mapping[str, int]) -> Any:
    name, call, index = triple
    if name == "_CONSTANT_VALUE":
        return constant(index, None)
    return Tensor(name, int(call) - offsets.get(name, 0), int(index))


def _legacy_leaf(value: Any, offsets: Mapping[str, int], names: set[str]) -> Any:
    """What may stand in a call of Keras 2: a triple that names a tensor, or a value."""
    if isinstance(value, dict):
        if value.get("class_name") == "__ellipsis__":
            return Slice(None, None, "...")
        read = {key: _legacy_leaf(item, offsets, names) for key, item in value.items()}
        if set(read) == {"start", "stop", "step"}:
            return Slice(read["start"], read["stop"], read["step"])
        return read
    if not isinstance(value, list):
        return value
    named = len(value) == 3 and isinstance(value[0], str)
    if named and (value[0] == "_CONSTANT_VALUE" or value[0] in names):
        return _legacy_tensor(value, offsets)
    return [_legacy_leaf(item, offsets, names) for item in value]


def _decode(value: Any) -> Any:
    """Keras 3: nested JSON in which tensors are objects and numbers stand for themselves."""
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("class_name") == "__keras_tensor__":
        name, call, index = value["config"]["keras_history"]
        return Tensor(str(name), int(call), int(index))
    if value.get("class_name") == "__slice__":
        config = value["config"]
        return Slice(config["start"], config["stop"], config["step"])
    if value.get("class_name") in ("__numpy__", "__tensor__"):
        return constant(value["config"]["value"], value["config"]["dtype"])
    if value.get("class_name") == "__ellipsis__":
        return Slice(None, None, "...")
    if value.get("class_name") in ("DTypePolicy", "FloatDTypePolicy"):
        return value["config"]["name"]
    if "class_name" in value:
        raise FileError(
            f"a layer is called with an object of class {value['class_name']!r}",
            expected="tensors, numbers, and lists or dicts of them",
            fix="compute the constant in a layer, or pass it as an input",
        )
    return {key: _decode(item) for key, item in value.items()}


def order_calls(calls: Iterable[Call], inputs: set[str], outputs: Structure) -> tuple[Call, ...]:
    """The calls in an order that can run, as close to the file's as possible.

    Raises `FileError` for a tensor that nobody produces, and for loops.
    """
    by_key = {(call.layer, call.number): call for call in calls}
    ordered: list[Call] = []
    state: dict[tuple[str, int], str] = {}
    for start in [*by_key, *(_key(leaf) for leaf in _tensors(outputs))]:
        stack = [start]
        while stack:  # An explicit stack: a network may be deeper than Python's recursion limit.
            key = stack[-1]
            if key[0] in inputs or state.get(key) == "done":
                stack.pop()
            elif key not in by_key:
                raise FileError(
                    f"the graph refers to call {key[1]} of layer {key[0]!r}, which it does not hold"
                )
            elif state.get(key) == "open":
                state[key] = "done"
                ordered.append(by_key[stack.pop()])
            else:
                state[key] = "open"
                call = by_key[key]
                leaves = [*_tensors(call.inputs), *_tensors(call.kwargs)]
                parents = [_key(leaf) for leaf in leaves]
                waiting = [parent for parent in parents if state.get(parent) != "done"]
                if any(state.get(parent) == "open" for parent in waiting):
                    raise FileError(f"layer {key[0]!r} depends on its own output")
                stack += reversed(waiting)
    return tuple(ordered)


def _tensors(structure: Structure) -> list[Tensor]:
    return [leaf for leaf in structure.leaves if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> tuple[str, int]:
    return tensor.layer, tensor.call
