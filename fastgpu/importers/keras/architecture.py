"""From the config of a Keras model to a graph: layers, their options, and who calls whom.

Nothing is imported or executed that a config names: a layer becomes a rule of the table, something
from `custom_objects`, or a refusal. All refusals are raised together, before any weight is read.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from fastgpu.errors import FileError, UnsupportedLayerError
from fastgpu.importers.imported import ImportReport
from fastgpu.importers.keras.calls import order_calls, read_calls, read_structure
from fastgpu.importers.keras.dtypes import Policy
from fastgpu.importers.keras.graph import Call, Graph, Input, Structure, Tensor
from fastgpu.importers.keras.layers import REFUSED, TABLE
from fastgpu.importers.keras.layers.core import Identity
from fastgpu.importers.keras.layers.layer import Function, Layer, Path
from fastgpu.importers.keras.layers.operations import Operation
from fastgpu.importers.keras.layers.placed import Placed
from fastgpu.importers.keras.layers.registry import REGISTERED
from fastgpu.importers.keras.layers.tf_operations import tf_operation
from fastgpu.importers.keras.options import OptionReader, freeze

Config = Mapping[str, Any]
_FUNCTIONAL = ("Functional", "Model")
_MODELS = (*_FUNCTIONAL, "Sequential")
_DEEPEST = 32


def read_graph(
    config: Config, custom_objects: Mapping[str, Any], keras_version: str, report: ImportReport
) -> Graph:
    """The graph that `config`, a serialized Sequential or Functional model, describes.

    Raises `UnsupportedLayerError` naming every layer, option or policy that has no equal.
    """
    reader = ArchitectureReader(custom_objects, keras_version.startswith(("1.", "2.")), report)
    graph = reader.read_top(config)
    if any(placed.name == "params" for placed in graph.layers):
        reader.refused.append("'params' (Flax keeps this name for itself: rename the layer)")
    if reader.refused:
        raise UnsupportedLayerError(
            f"{report.source}: {len(reader.refused)} of its layers cannot be imported",
            expected="classes and options of fastgpu.importers.keras.layers.TABLE",
            got="; ".join(reader.refused),
            fix="pass custom_objects={name or class: replacement}: a function of the layer's "
            "inputs, or a fastgpu.importers.keras.layers.Layer subclass if it has weights, which "
            "register_keras_layer makes known to every import",
        )
    return graph


@dataclass
class ArchitectureReader:
    """Walks a config once, depth first, in the order in which Keras saves the weights."""

    custom_objects: Mapping[str, Any]
    keras_2: bool
    report: ImportReport
    refused: list[str] = field(default_factory=list)
    shared_paths: dict[int, Path] = field(default_factory=dict)

    def read_top(self, entry: Config) -> Graph:
        """The outermost model; a subclassed one may be declared in `custom_objects`."""
        class_name = self._alias(entry["class_name"])
        if class_name not in _MODELS or not isinstance(entry["config"], dict | list):
            self.refused.append(f"{entry['class_name']} (a subclassed model is code, not a graph)")
            return Graph("", (), Structure.of([]), (), (), Structure.of([]))
        return self._model(class_name, entry["config"], (), frozen=False)

    def _alias(self, class_name: str) -> str:
        """A built-in class that `custom_objects` says to use in the place of another."""
        replacement = self.custom_objects.get(class_name)
        return replacement if isinstance(replacement, str) else class_name

    def _model(self, class_name: str, config: Any, path: Path, frozen: bool) -> Graph:
        if len(path) > _DEEPEST:
            raise FileError(f"models nested deeper than {_DEEPEST}: {'/'.join(path)}")
        if isinstance(config, list):  # Keras before 2.3 wrote a Sequential as a bare list.
            config = {"name": "sequential", "layers": config}
        frozen = frozen or config.get("trainable") is False
        if class_name == "Sequential":
            return self._sequential(config, path, frozen)
        return self._functional(config, path, frozen)

    def _sequential(self, config: Config, path: Path, frozen: bool) -> Graph:
        entries = list(config["layers"])
        if entries and entries[0]["class_name"] == "InputLayer":
            spec = self._input(entries.pop(0), path)
        else:
            spec = _implied_input(config, entries)
        layers, calls = [], []
        tensor = Tensor(spec.name, 0, 0)
        last: Any = tensor
        for entry in entries:
            placed = self._place(entry, path, frozen)
            layers.append(placed)
            calls.append(Call(placed.name, 0, Structure.of([last])))
            last = Tensor(placed.name, 0, 0)
            if isinstance(placed.layer, Graph):
                last = placed.layer.outputs.relabel(placed.name)
        _unique([spec.name, *(layer.name for layer in layers)])
        return Graph(
            config["name"],
            (spec,),
            Structure.of([tensor]),
            tuple(layers),
            tuple(calls),
            Structure.of(last),
        )

    def _functional(self, config: Config, path: Path, frozen: bool) -> Graph:
        inputs: dict[str, Input] = {}
        layers: dict[str, Placed] = {}
        for entry in config["layers"]:
            if entry["class_name"] == "InputLayer":
                spec = self._input(entry, path)
                inputs[spec.name] = spec
            else:
                placed = self._place(entry, path, frozen)
                layers[placed.name] = placed
        if len(inputs) + len(layers) < len(config["layers"]):
            _unique([entry.get("name", entry["config"]["name"]) for entry in config["layers"]])
        input_structure = read_structure(config["input_layers"], {})
        models = {
            name: placed.class_name
            for name, placed in layers.items()
            if isinstance(placed.layer, Graph)
        }
        found = read_calls(config["layers"], models)
        for number, call in enumerate(found.calls):
            layer = layers[call.layer].layer
            self._check_arguments(call, layers[call.layer])
            if isinstance(layer, Layer) and layer.clears_masks and not self.keras_2:
                found.calls[number] = replace(call, clears_masks=True)
        for name, phase in found.ignored_phases.items():
            why = "overridden by the phase of the call, as Keras 3 does"
            if not phase:
                why += "; freeze the layer to keep its statistics"
            self.report.add("option", "/".join((*path, name, f"training={phase}")), "ignored", why)
        outputs = read_structure(config["output_layers"], found.offsets)
        if isinstance(outputs, list | tuple) and len(outputs) == 1:
            outputs = outputs[0]
        structure = Structure.of(input_structure)
        unknown = [leaf.layer for leaf in structure.leaves if leaf.layer not in inputs]
        if unknown:
            raise FileError(f"inputs {unknown} of model {config['name']!r} are no input layers")
        produced = Structure.of(outputs)
        return Graph(
            config["name"],
            tuple(inputs[leaf.layer] for leaf in structure.leaves),
            structure,
            tuple(layers.values()),
            order_calls(found.calls, set(inputs), produced),
            produced,
        )

    def _input(self, entry: Config, path: Path) -> Input:
        config = entry["config"]
        name = config.get("name") or entry["name"]
        shape = config.get("batch_shape", config.get("batch_input_shape"))
        for option in ("sparse", "ragged", "optional"):
            if config.get(option):
                self._refuse((*path, name), "InputLayer", f"option {option}=True")
        dtype = Policy.from_config(config.get("dtype")).compute_dtype
        return Input(name, tuple(shape) if shape else (), dtype)

    def _place(self, entry: Config, path: Path, frozen: bool) -> Placed:
        """One entry of `layers`; what is refused is noted and replaced by an identity."""
        config = entry["config"]
        name = entry.get("name") or (config["name"] if isinstance(config, dict) else "sequential")
        path = self.shared_paths.setdefault(entry.get("shared_object_id", id(entry)), (*path, name))
        return self._placed(entry, name, path, frozen)

    def _placed(self, entry: Config, name: str, path: Path, frozen: bool) -> Placed:
        config, class_name = entry["config"], entry["class_name"]
        if isinstance(config, dict):
            frozen = frozen or config.get("trainable") is False
        policy, layer = Policy(), Identity()
        try:
            if class_name not in _MODELS:
                policy = Policy.from_config(config.get("dtype"))
            layer = self._layer(entry, name, path, frozen)
        except UnsupportedLayerError as error:
            self._refuse(path, class_name, error.summary)
        else:
            self.report.add("layer", "/".join(path), "mapped", class_name)
        return Placed(name, class_name, path, layer, policy, frozen)

    def _layer(self, entry: Config, name: str, path: Path, frozen: bool) -> Layer | Graph:
        config, class_name = entry["config"], entry["class_name"]
        custom = self.custom_objects.get(name, self.custom_objects.get(class_name))
        if custom is not None and not isinstance(custom, str):
            return self._custom(custom, config, path, frozen)
        class_name = custom or class_name
        if custom is None and not _is_builtin(entry):
            for known in (entry.get("registered_name"), class_name):
                if known in REGISTERED:
                    return self._options(path, frozen).build(REGISTERED[known], config)
            raise UnsupportedLayerError(f"a custom class of {entry.get('module')!r}")
        if class_name in _MODELS:
            return self._model(class_name, config, path, frozen)
        if _is_operation(entry):
            return _operation(class_name, config)
        if class_name in ("TFOpLambda", "SlicingOpLambda"):
            return tf_operation(config)
        if class_name not in TABLE:
            raise UnsupportedLayerError(REFUSED.get(class_name, "no such layer in the table"))
        return self._options(path, frozen).build(TABLE[class_name], config)

    def _custom(self, custom: Any, config: Config, path: Path, frozen: bool) -> Layer:
        if isinstance(custom, Layer):
            return custom
        if isinstance(custom, type) and issubclass(custom, Layer):
            return self._options(path, frozen).build(custom, config)
        if callable(custom):
            return Function(function=custom)
        raise UnsupportedLayerError(f"custom_objects gives {custom!r}, no function and no Layer")

    def _options(self, path: Path, frozen: bool) -> OptionReader:
        def note(option: str, reason: str) -> None:
            self.report.add("option", "/".join((*path, option)), "ignored", reason)

        def place(entry: Config, below: Path) -> Placed:
            return self._placed(entry, below[-1], (*path, *below), frozen)

        return OptionReader(self.custom_objects, self.keras_2, note, place)

    def _check_arguments(self, call: Call, placed: Placed) -> None:
        """Refuse arguments of a call that a rule does not take."""
        if any(refused.startswith(f"{'/'.join(placed.path)!r} ") for refused in self.refused):
            return
        taken = {"mask"}
        if isinstance(placed.layer, Layer):
            function = placed.layer.call
            if isinstance(placed.layer, Function | Operation):
                function = placed.layer.function
            parameters = inspect.signature(function).parameters.values()
            if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                return
            taken = {parameter.name for parameter in parameters}
        given = jax.tree.unflatten(call.kwargs.tree, call.kwargs.leaves)
        unknown = sorted(set(given) - taken)
        if unknown:
            self._refuse(placed.path, placed.class_name, f"call argument {unknown}")

    def _refuse(self, path: Path, class_name: str, reason: str) -> None:
        self.refused.append(f"{'/'.join(path)!r} ({class_name}: {reason})")


def _is_builtin(entry: Config) -> bool:
    """Whether a class is Keras's own; files of the older format do not say, and mean Keras."""
    module = entry.get("module")
    package = str(entry.get("registered_name") or "")
    if module is None:
        return ">" not in package
    return str(module).split(".")[0] in ("keras", "tf_keras")


def _is_operation(entry: Config) -> bool:
    """Whether an entry is a `keras.ops` call; older files tell it only by what it lacks."""
    if entry.get("module") is not None:
        return str(entry["module"]).startswith(("keras.src.ops", "keras.ops"))
    return not {"trainable", "dtype"} & set(entry["config"])


def _operation(class_name: str, config: Config) -> Operation:
    options = {}
    for key, value in config.items():
        policy = key == "dtype" and isinstance(value, dict)
        if key not in ("name", "trainable") and not policy:
            options[key] = freeze(key, value)
    return Operation.from_config(class_name, options)


def _implied_input(config: Config, entries: list[Config]) -> Input:
    """The input of a Sequential that has no input layer: its first layer or the build shape."""
    first = entries[0]["config"] if entries and isinstance(entries[0]["config"], dict) else {}
    shape = (
        first.get("batch_input_shape")
        or first.get("batch_shape")
        or config.get("build_input_shape")
    )
    dtype = Policy.from_config(first.get("dtype")).compute_dtype if "dtype" in first else "float32"
    return Input("(input)", tuple(shape) if shape else (), dtype)


def _unique(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise FileError(f"two layers of one model are called {name!r}")
