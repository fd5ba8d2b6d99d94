"""Rules for layer classes of one's own, which hold for every import in this process."""

from collections.abc import Callable
from typing import TypeVar

from fastgpu.errors import ConfigurationError
from fastgpu.importers.keras.layers import TABLE
from fastgpu.importers.keras.layers.layer import Layer

REGISTERED: dict[str, type[Layer]] = {}
Rule = TypeVar("Rule", bound=type[Layer])


def register_keras_layer(name: str) -> Callable[[Rule], Rule]:
    """Register a rule for a layer class of your own; `from_keras` then knows it everywhere.

    Args:
        name: the class's name in files: "Scale", or "my_package>Scale" as
            `keras.saving.register_keras_serializable("my_package")` writes it.

    Returns:
        A decorator for a subclass of `fastgpu.importers.keras.layers.Layer`.

    Raises:
        ConfigurationError: the name is that of a built-in class (`custom_objects` replaces those in
            one import), it is registered already, or what is decorated is no `Layer`.

    >>> from dataclasses import dataclass
    >>> from fastgpu.importers.keras.layers import Layer
    >>> @register_keras_layer("docs>Twice")
    ... @dataclass(frozen=True, kw_only=True)
    ... class Twice(Layer):
    ...     def call(self, state, x, *, train):
    ...         return 2 * x
    >>> "docs>Twice" in REGISTERED
    True
    """

    def register(rule: Rule) -> Rule:
        if not (isinstance(rule, type) and issubclass(rule, Layer)):
            raise ConfigurationError(
                f"{rule!r} is no rule for a Keras layer",
                expected="a subclass of fastgpu.importers.keras.layers.Layer",
                fix="for a function of the layer's inputs, pass from_keras(custom_objects=...)",
            )
        if name in TABLE:
            raise ConfigurationError(
                f"{name!r} is a built-in class of Keras",
                expected="the name of a class of your own",
                fix="replace a built-in class in one import with from_keras(custom_objects=...)",
            )
        known = REGISTERED.get(name)
        # A module that is reloaded defines its rules again.
        if known is not None and known.__qualname__ != rule.__qualname__:
            raise ConfigurationError(
                f"a rule for {name!r} is registered already",
                expected="one rule for each class",
                got=f"{known.__qualname__} and {rule.__qualname__}",
                fix="register one of them under another name",
            )
        REGISTERED[name] = rule
        return rule

    return register
