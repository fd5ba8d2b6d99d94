"""A layer's config dict read into the fields of its rule; nothing in it is silently dropped."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastgpu.errors import UnsupportedLayerError
from fastgpu.importers.keras.layers.activations import ACTIVATIONS, LINEAR, Activation
from fastgpu.importers.keras.layers.initializers import GLOROT_UNIFORM, Initializer
from fastgpu.importers.keras.layers.layer import ANY, Layer
from fastgpu.importers.keras.layers.placed import Placed
from fastgpu.importers.keras.names import snake_case

# Read by the graph, not by the rules.
_COMMON = frozenset({"name", "trainable", "dtype", "batch_shape", "batch_input_shape"})
_NOT_IN_THE_OUTPUTS = {
    "_regularizer": "a penalty on the loss, not part of the outputs: add it to your loss",
    "_constraint": "applied by Keras after each update, not part of the outputs",
}


@dataclass(frozen=True)
class OptionReader:
    """Turns config values into hashable options; `note` reports what is ignored, and why.

    `place` reads a layer that is an option of this one; its weights lie at a path below it.
    """

    custom_objects: Mapping[str, Any]
    keras_2: bool
    note: Callable[[str, str], None]
    place: Callable[[Any, tuple[str, ...]], Placed]

    def build(self, rule: type[Layer], config: Mapping[str, Any]) -> Layer:
        """A rule with its options from `config`.

        Raises `UnsupportedLayerError` for an option the rule does not know, or a value it has no
        equal of; the message is the option alone, the caller adds the layer.
        """
        fields = {field.name for field in dataclasses.fields(rule)}
        options: dict[str, Any] = {}
        for key, value in rule.complete(config, self.keras_2).items():
            name = rule.renamed.get(key, key)
            if name in rule.nested:
                options[name] = self._nested(rule.nested[name], value)
            elif name in fields:
                options[name] = self._option(name, value)
            elif key not in _COMMON:
                self._check_other(rule, key, value)
        try:
            return rule(**options)
        except (TypeError, ValueError) as error:
            raise UnsupportedLayerError(f"option {error}") from error

    def _nested(self, attribute: str, value: Any) -> Any:
        """One layer, or a list of them, which Keras saves by class name and count."""
        if not isinstance(value, list):
            return None if value is None else self.place(value, (attribute,))
        counts: Counter[str] = Counter()
        placed = []
        for entry in value:
            name = snake_case(entry["class_name"])
            number = f"_{counts[name]}" if counts[name] else ""
            counts[name] += 1
            placed.append(self.place(entry, (attribute, f"{name}{number}")))
        return tuple(placed)

    def _option(self, name: str, value: Any) -> Any:
        if name.endswith("activation"):
            return self._activation(value)
        if name.endswith("_initializer"):
            initializer = Initializer.from_config(value)
            if initializer is None:
                self.note(name, "no equal of this initializer: module.init draws Glorot uniform")
            return initializer or GLOROT_UNIFORM
        return freeze(name, value)

    def _check_other(self, rule: type[Layer], key: str, value: Any) -> None:
        for suffix, reason in _NOT_IN_THE_OUTPUTS.items():
            if key.endswith(suffix):
                if value is not None:
                    self.note(key, reason)
                return
        if key == "autocast" and value is True:  # The rule's own `autocast` decides.
            return
        if key in rule.penalties:
            self.note(key, _NOT_IN_THE_OUTPUTS["_regularizer"])
            return
        allowed = rule.fixed.get(key, ())
        if allowed is not ANY and freeze(key, value) not in allowed:
            raise UnsupportedLayerError(f"option {key}={value!r}")

    def _activation(self, value: Any) -> Activation:
        if value is None:
            return LINEAR
        if isinstance(value, dict) and value.get("class_name") == "function":
            value = value.get("config")
        if isinstance(value, str):
            if callable(self.custom_objects.get(value)):
                return Activation(value, self.custom_objects[value])
            if value == "hard_sigmoid" and self.keras_2:
                return Activation("hard_sigmoid (Keras 2)")
            if value in ACTIVATIONS:
                return Activation(value)
        shown = value.get("class_name") if isinstance(value, dict) else value
        raise UnsupportedLayerError(f"activation {shown!r}")


def freeze(name: str, value: Any) -> Any:
    """A JSON value in hashable form: lists become tuples, stored arrays nested tuples.

    >>> freeze("padding", [[0, 1], [2, 3]])
    ((0, 1), (2, 3))
    """
    if isinstance(value, list | tuple):
        return tuple(freeze(name, item) for item in value)
    if isinstance(value, dict):
        if value.get("class_name") in ("__numpy__", "__tensor__"):
            return freeze(name, value["config"]["value"])
        raise UnsupportedLayerError(f"option {name}={value.get('class_name')!r}")
    return value
