"""Keras dtype policies: the dtype a layer computes in, and the one its weights are kept in."""

from dataclasses import dataclass
from typing import Any

from fastgpu.errors import UnsupportedLayerError

_PLAIN = (
    *("float16", "bfloat16", "float32", "float64", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)
_MIXED = {"mixed_float16": "float16", "mixed_bfloat16": "bfloat16"}
_POLICY_CLASSES = ("DTypePolicy", "FloatDTypePolicy", "Policy")


@dataclass(frozen=True)
class Policy:
    """The dtypes of one layer, as Keras names them.

    >>> Policy.from_config("mixed_bfloat16")
    Policy(compute_dtype='bfloat16', variable_dtype='float32')
    """

    compute_dtype: str = "float32"
    variable_dtype: str = "float32"

    @classmethod
    def from_config(cls, config: Any) -> "Policy":
        """Read the `dtype` option of a layer: a name, a serialized policy, or nothing.

        Raises `UnsupportedLayerError` for quantized policies and policy maps.
        """
        if config is None:
            return cls()
        name = config
        if isinstance(config, dict):
            if config.get("class_name") not in _POLICY_CLASSES:
                raise UnsupportedLayerError(f"dtype policy {config.get('class_name')!r}")
            name = config["config"]["name"]
        if name in _MIXED:
            return cls(_MIXED[name], "float32")
        if name not in _PLAIN:
            raise UnsupportedLayerError(f"dtype policy {name!r}")
        return cls(name, name)
